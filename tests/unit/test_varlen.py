"""Windows laid end to end give what padded ones give: the same logits, losses and gradients."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering import synthetic
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures
from qa_dist.tasks.question_answering.task import QuestionAnswering
from qa_dist.training.varlen import FAMILIES, Packed, obstacle, packed, run_model, switch_on
from tests.helpers import DISTIL_SIZES, SIZES, features_of
from tests.tokenizers import FAMILIES as TOKENIZERS

EXAMPLES = synthetic.generate(SyntheticConfig(train_examples=10, long_share=0.5, seed=5), "train")
TASK = object.__new__(QuestionAnswering)  # the loss needs no data
SHAPES: dict[str, dict[str, Any]] = dict.fromkeys(FAMILIES, SIZES) | {"distilbert": DISTIL_SIZES}


def features(tokenizer: str) -> QuestionAnsweringFeatures:
    made = TOKENIZERS[tokenizer](synthetic.texts(EXAMPLES))
    return features_of(EXAMPLES, made, max_length=96, stride=24)


def new_model(family: str, vocab_size: int, pad: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocab_size, pad_token_id=pad, **SHAPES[family])
    return AutoModelForQuestionAnswering.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_windows_give_what_padded_ones_give(family: str):
    roberta_like = "roberta" in family or family in ("camembert", "data2vec-text")
    windows = features("roberta" if roberta_like else "bert")
    batch = windows.collate(np.arange(len(windows)))
    assert len(set(windows.lengths)) > 3
    if family == "distilbert" or roberta_like:
        batch.inputs.pop("token_type_ids", None)
    vocabulary = int(batch.inputs["input_ids"].max()) + 1
    pad = int(windows._padding["input_ids"])

    def run(model: Any, given: Any) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
        output = run_model(model, given)
        losses = TASK.loss(output, given)
        losses.sum().backward()
        return output, losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, other = (new_model(family, vocabulary, pad) for _ in range(2))
    expected, expected_losses, expected_gradients = run(plain, batch)
    laid_out = packed(batch, switch_on(other))
    assert laid_out.positions == windows.lengths.sum() < batch.positions
    output, losses, gradients = run(other, laid_out)

    real = batch.inputs["attention_mask"].bool()
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(output[name][real], expected[name][real], atol=1e-5, rtol=0)
    torch.testing.assert_close(losses, expected_losses, atol=1e-5, rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-5, rtol=1e-4, msg=name)


def test_windows_do_not_see_each_other():
    """A window's logits do not change when another window of the batch does."""
    windows = features("bert")
    model = new_model("bert", int(windows.tokens["input_ids"].values.max()) + 1, 0)
    first = switch_on(model)

    def logits(indices: list[int]) -> torch.Tensor:
        batch = packed(windows.collate(np.array(indices)), first)
        with torch.no_grad():
            return run_model(model, batch).start_logits[0, : windows.lengths[0]]

    torch.testing.assert_close(logits([0, 1, 2]), logits([0, 3]), atol=1e-6, rtol=0)


def test_what_cannot_be_packed_is_told():
    cpu = torch.device("cpu")
    assert obstacle(new_model("bert", 50, 0), cpu, "bf16") == "it needs an NVIDIA GPU"
    deberta: Any = SimpleNamespace(config=SimpleNamespace(model_type="deberta-v2"))
    assert "models of type 'deberta-v2' cannot use it" in str(obstacle(deberta, cpu, "bf16"))


def test_a_packed_batch_moves_as_a_whole():
    moved = packed(features("bert").collate(np.arange(3)), 0).to(torch.device("meta"))
    assert isinstance(moved, Packed)
    tensors = [
        moved.places,
        moved.index,
        *moved.inputs.values(),
        *moved.packed_inputs.values(),
        *moved.targets.values(),
    ]
    assert all(tensor.is_meta for tensor in tensors)
