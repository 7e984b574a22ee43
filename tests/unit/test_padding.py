"""Padding on either side changes neither the loss of a feature nor the answer found in it."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering import synthetic
from qa_dist.tasks.question_answering.decoding import candidates, decode
from qa_dist.tasks.question_answering.task import QuestionAnswering
from tests.helpers import DISTIL_SIZES, SIZES, features_of
from tests.tokenizers import FAMILIES, SCRIPTS

EXAMPLES = synthetic.generate(SyntheticConfig(train_examples=12, long_share=0.5, seed=3), "train")
TEXTS = [*synthetic.texts(EXAMPLES), *3 * SCRIPTS]
TASK = object.__new__(QuestionAnswering)  # the loss needs no data
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", SIZES),
    "distilbert": (
        "distilbert",
        DISTIL_SIZES,
    ),
    "electra": ("bert", {**SIZES, "embedding_size": 16}),
    "roberta": ("roberta", {**SIZES, "pad_token_id": 1}),
    "albert": ("albert", {**SIZES, "embedding_size": 16}),
    "deberta-v2": (
        "deberta",
        {
            **SIZES,
            "relative_attention": True,
            "position_buckets": 32,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
    ),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
}
"""Model type -> family of its tokenizer, and settings of a tiny one."""


@pytest.mark.parametrize("family", FAMILIES)
def test_collate_pads_as_the_tokenizer(family: str):
    tokenizer = FAMILIES[family](TEXTS)
    features = features_of(EXAMPLES, tokenizer, tokenizer.padding_side)
    indices = np.array([int(features.lengths.argmin()), 0, int(features.lengths.argmax())])
    batch = features.collate(indices)
    rows = [{name: tokens[int(i)].tolist() for name, tokens in features.tokens.items()} for i in indices]
    expected = tokenizer.pad(rows, padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert set(batch.inputs) == set(expected)
    for name, tensor in batch.inputs.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", ["bert", "xlnet"])
def test_positions_follow_the_padding(family: str):
    tokenizer = FAMILIES[family](TEXTS)
    left, right = features_of(EXAMPLES, tokenizer, "left"), features_of(EXAMPLES, tokenizer, "right")
    indices = np.arange(len(left))
    batches = left.collate(indices), right.collate(indices)
    shift = batches[0].inputs["input_ids"].shape[1] - left.lengths
    assert shift.max() > 8
    for name, positions in batches[1].targets.items():
        np.testing.assert_array_equal(positions.numpy(), left.scalars[name])
        np.testing.assert_array_equal(batches[0].targets[name].numpy(), left.scalars[name] + shift)
        tokens = [
            batch.inputs["input_ids"].gather(1, batch.targets[name][:, None] - int(name == "context_end"))
            for batch in batches
        ]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "roberta", "xlnet"])
def test_a_confident_model_is_read_back_from_batches(family: str, padding_side: str):
    """Through collate, candidates and decode, with batches of different widths."""
    features = features_of(EXAMPLES, FAMILIES[family](TEXTS), padding_side)
    outputs = []
    for indices in np.array_split(np.arange(len(features)), 5):
        batch = features.collate(indices)
        start, end = torch.zeros(2, *batch.inputs["input_ids"].shape)
        rows = torch.arange(len(indices))
        start[rows, batch.targets["start_position"]] = 9.0
        end[rows, batch.targets["end_position"]] = 9.0
        # padding and question have no say, whatever their logits are
        outside = torch.ones_like(start, dtype=torch.bool)
        for row, (begin, stop, cls) in enumerate(
            zip(*(batch.targets[name] for name in ("context_begin", "context_end", "cls")), strict=True)
        ):
            outside[row, begin:stop] = False
            outside[row, cls] = False
        spans = (batch.targets[name] for name in ("context_begin", "context_end", "cls"))
        outputs.append(candidates(start + 99 * outside, end + 99 * outside, *spans, n_best=5))
    merged = {name: torch.cat([output[name] for output in outputs]).numpy() for name in outputs[0]}
    answers = decode(merged, features, len(EXAMPLES), n_best=5, max_answer_length=30)
    first = np.searchsorted(answers.example, np.arange(len(EXAMPLES)))
    texts = [e.context[answers.start_char[j] : answers.end_char[j]] for e, j in zip(EXAMPLES, first, strict=True)]
    assert texts == [e.answers[0] for e in EXAMPLES]
    held = np.bincount(features.example, features.scalars["start_position"] == features.scalars["cls"])
    np.testing.assert_array_equal(answers.null_score, np.where(held < np.bincount(features.example), 0.0, 18.0))


@pytest.mark.parametrize("model_type", MODELS)
def test_the_loss_of_a_feature_does_not_depend_on_its_batch(model_type: str):
    family, settings = MODELS[model_type]
    tokenizer = FAMILIES[family](TEXTS)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **settings)
    model = AutoModelForQuestionAnswering.from_config(config).eval()
    features = features_of(EXAMPLES, tokenizer, tokenizer.padding_side)
    order = np.argsort(features.lengths)
    short, long = order[:2], order[-1]
    assert features.lengths[long] > features.lengths[short].max() + 8

    def losses(indices: list[int]) -> list[float]:
        batch = features.collate(np.array(indices))
        with torch.no_grad():
            return TASK.loss(model(**batch.inputs), batch).tolist()

    alone = [losses([int(i)])[0] for i in short]
    together = losses([int(short[0]), int(long), int(short[1])])
    assert alone == pytest.approx([together[0], together[2]], abs=1e-5)
    assert together[1] == pytest.approx(losses([int(long)])[0], abs=1e-5)
