"""The windows equal the tokenizer's own, word for word, and of each word one prediction is kept: the best informed."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedTokenizerBase

from qa_dist.config import SyntheticConfig
from qa_dist.errors import UserError
from qa_dist.tasks.splits import Examples
from qa_dist.tasks.token_classification import synthetic
from qa_dist.tasks.token_classification.data import Example
from qa_dist.tasks.token_classification.decoding import decode, found_entities
from qa_dist.tasks.token_classification.features import (
    IGNORED,
    TokenClassificationFeatures,
    build_features,
    words_apart,
)
from qa_dist.tasks.token_classification.task import TokenClassification
from qa_dist.tasks.tokenizer import train_tokenizer
from qa_dist.tasks.windows import padding_of
from qa_dist.training.varlen import packed, run_model, switch_on
from tests.helpers import SIZES
from tests.tokenizers import FAMILIES, SCRIPTS

CORPUS = synthetic.generate(SyntheticConfig(train_examples=30, long_share=0.2), "train")
CORPUS += [
    Example(
        f"script-{i}",
        tuple(f"{text} \u200b x\u0301y ,".split(" ") * 5),
        ("B-person",) * len(f"{text} a b c".split(" ") * 5),
        "x",
    )
    for i, text in enumerate(SCRIPTS)
]
TEXTS = [*(" ".join(e.words) for e in CORPUS), *3 * SCRIPTS]
TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {name: build(TEXTS) for name, build in FAMILIES.items()}
TOKENIZERS["trained here"] = train_tokenizer(TEXTS, 500, {"model_type": "bert"})
for one in TOKENIZERS.values():
    words_apart(one)
LABELS = ["O", "B-organisation", "I-organisation", "B-person", "I-person", "B-place", "I-place"]
TASK: Any = object.__new__(TokenClassification)  # loss and outputs need no data


def features_of(
    examples: list[Example], name: str = "bert", *, max_length: int = 40, stride: int = 10, labelled: bool = True
) -> TokenClassificationFeatures:
    tokenizer = TOKENIZERS[name]
    labels = LABELS if labelled else None
    table = build_features(examples, tokenizer, labels, max_length=max_length, stride=stride).combine_chunks()
    side = tokenizer.padding_side
    padding = padding_of(tokenizer)
    return TokenClassificationFeatures(table, "", padding, lambda: Examples(examples), side, max_length, labelled)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("max_length", "stride"), [(24, 0), (40, 13), (512, 128), (17, 9)])
def test_windows_equal_the_tokenizers_own(name: str, max_length: int, stride: int):
    tokenizer = TOKENIZERS[name]
    rows = build_features(CORPUS, tokenizer, LABELS, max_length=max_length, stride=stride).to_pylist()
    own = tokenizer(
        [list(example.words) for example in CORPUS],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    assert [row["input_ids"] for row in rows] == own["input_ids"]
    assert [row["example"] for row in rows] == list(own["overflow_to_sample_mapping"])
    if "token_type_ids" in own:
        assert [row["token_type_ids"] for row in rows] == own["token_type_ids"]
    seen: dict[int, int] = {}
    for i, row in enumerate(rows):
        words, special = own.word_ids(i), own.sequence_ids(i)
        inside = [j for j, sequence in enumerate(special) if sequence == 0]
        assert (row["begin"], row["end"]) == ((inside[0], inside[-1] + 1) if inside else (row["begin"], row["begin"]))
        is_first_window = row["example"] not in seen
        seen[row["example"]] = i
        labels = CORPUS[row["example"]].labels
        for j, word in enumerate(words):
            begins = special[j] == 0 and (j == inside[0] or words[j - 1] != word)
            if begins and j == inside[0] and not is_first_window:
                # whether its word begins here is seen from the window before, which holds what is in front of it
                begins = row["word"][j] >= 0
            assert row["word"][j] == (word if begins else -1)
            assert row["label"][j] == (LABELS.index(labels[word]) if begins else IGNORED)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_word_with_tokens_is_labelled_in_some_window(name: str):
    tokenizer = TOKENIZERS[name]
    features = features_of(CORPUS, name, max_length=24, stride=0)  # without a stride: in exactly one
    pairs = zip(np.repeat(features.example, features.lengths).tolist(), features.word.values.tolist(), strict=True)
    found = [pair for pair in pairs if pair[1] >= 0]
    expected = []
    for i, example in enumerate(CORPUS):
        own = tokenizer(list(example.words), is_split_into_words=True, add_special_tokens=False).word_ids()
        expected += [(i, word) for word in dict.fromkeys(own)]
    assert found == expected
    lost = sum(len(e.words) for e in CORPUS) - len(expected)
    note = f"{lost:,} words have no token, so no entity is found in them"
    assert features.notes == ([note] if lost else [])


def llama_like(texts: list[str]) -> PreTrainedTokenizerBase:
    """Whose words are cut by a pattern before they become bytes."""
    tokenizer: Any = FAMILIES["roberta"](texts)
    cut = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s+"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    return tokenizer


@pytest.mark.parametrize("build", [FAMILIES["roberta"], llama_like])
def test_byte_level_words_are_encoded_as_in_a_text(build: Any):
    tokenizer = build(TEXTS)
    before = tokenizer(" Ada lives", add_special_tokens=False)["input_ids"]
    words_apart(tokenizer)
    assert tokenizer(["Ada", "lives"], is_split_into_words=True, add_special_tokens=False)["input_ids"] == before
    assert tokenizer("Ada lives", add_special_tokens=False)["input_ids"] == before


def test_the_layout_of_xlnet():
    tokenizer = TOKENIZERS["xlnet"]
    (row,) = build_features(
        [Example("x", ("Ada", "lives"), ("B-person", "O"), "x")], tokenizer, LABELS, max_length=64, stride=0
    ).to_pylist()
    text = tokenizer("Ada lives", add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == [*text, tokenizer.sep_token_id, tokenizer.cls_token_id]
    assert row["token_type_ids"] == [0] * (len(text) + 1) + [2]


def test_windows_without_room():
    with pytest.raises(
        UserError, match=r"data.stride: 14 tokens .* data.max_length 16 with 2 special tokens; lower it"
    ):
        features_of(CORPUS, max_length=16, stride=14)
    assert len(features_of([Example("x", ("Ada",), ("O",), "x")], max_length=16, stride=14)) == 1  # none is cut
    with pytest.raises(UserError, match=r"data.max_length: 2 leaves no room beside the 2 special tokens of a window"):
        features_of(CORPUS, max_length=2, stride=0)


def test_unknown_labels_are_named_with_their_places():
    examples = [
        Example("0", ("a", "b"), ("O", "B-thing"), "f.conll:3", 3),
        Example("1", ("c",), ("I-x",), "g.jsonl, line 1"),
    ]
    with pytest.raises(UserError) as error:
        features_of([*CORPUS[:2], *examples])
    assert "'B-thing' (f.conll:4); 'I-x' (g.jsonl, line 1, token 1)" in str(error.value)
    assert "I-place" in str(error.value)


# --------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_collating(name: str):
    features = features_of(CORPUS, name)
    indices = np.array([3, 0, len(features) - 1])
    batch = features.collate(indices)
    assert all(
        tensor.shape == batch.inputs["input_ids"].shape for tensor in (*batch.inputs.values(), batch.targets["label"])
    )
    assert batch.targets["label"].shape[1] % 8 == 0
    for row, i in enumerate(indices):
        real = batch.inputs["attention_mask"][row].bool()
        assert batch.inputs["input_ids"][row][real].tolist() == features.tokens["input_ids"][i].tolist()
        assert batch.targets["label"][row][real].tolist() == features.label[i].tolist()
        assert (batch.targets["label"][row][~real] == IGNORED).all()


def output_for(labels: torch.Tensor) -> Any:
    """Logits by which each token has its label, the surer the farther it is in the row."""
    logits = torch.zeros(*labels.shape, len(LABELS))
    sureness = 1.0 + torch.arange(labels.shape[1]) / 10
    return type(
        "Output",
        (),
        {"logits": logits.scatter(2, labels.clamp(min=0)[..., None], sureness.expand(labels.shape)[..., None])},
    )


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_outputs_count_from_the_first_token(name: str):
    features = features_of(CORPUS, name)
    indices = np.array([3, 0, len(features) - 1])
    batch = features.collate(indices)
    wanted = torch.randint(0, len(LABELS), batch.targets["label"].shape)
    outputs = TASK.outputs(output_for(wanted), batch)
    for row, i in enumerate(indices):
        real = batch.inputs["attention_mask"][row].bool()
        assert outputs["label"][row][: features.lengths[i]].tolist() == wanted[row][real].tolist()
        assert (outputs["label"][row][features.lengths[i] :] == IGNORED).all()
        assert (
            outputs["score"][row][: features.lengths[i]].min() > 0 == outputs["score"][row][features.lengths[i] :].sum()
        )


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_the_loss_of_a_window_is_the_mean_over_its_words_whatever_it_is_batched_with(name: str):
    features = features_of(CORPUS, name)
    shortest, longest = int(features.lengths.argmin()), int(features.lengths.argmax())
    generator = torch.Generator().manual_seed(0)
    logits = {i: torch.randn(int(features.lengths[i]), len(LABELS), generator=generator) for i in (shortest, longest)}

    def loss(*indices: int) -> list[float]:
        batch = features.collate(np.array(indices))
        output = torch.full((*batch.targets["label"].shape, len(LABELS)), 7.0)
        for row, i in enumerate(indices):
            output[row][batch.inputs["attention_mask"][row].bool()] = logits[i]
        return TASK.loss(type("Output", (), {"logits": output}), batch).tolist()

    alone, together = [*loss(shortest), *loss(longest)], loss(shortest, longest)
    assert together == pytest.approx(alone, rel=1e-6)
    by_hand = [
        -logits[longest].log_softmax(1)[j, label].item()
        for j, label in enumerate(features.label[longest].tolist())
        if label != IGNORED
    ]
    assert alone[1] == pytest.approx(np.mean(by_hand), rel=1e-6)


def test_the_loss_without_labels_is_zero_and_not_nan():
    features = features_of(CORPUS[:3], labelled=False)
    batch = features.collate(np.arange(2))
    assert TASK.loss(output_for(batch.targets["label"]), batch).tolist() == [0.0, 0.0]


def test_packed_windows_give_what_padded_ones_give():
    features = features_of(CORPUS)
    batch = features.collate(np.arange(6))
    config = AutoConfig.for_model("bert", **SIZES, vocab_size=500, num_labels=len(LABELS))
    model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        padded = run_model(model, batch)
        first = switch_on(model)
        laid_end_to_end = run_model(model, packed(batch, first))
    for function in (TASK.loss, lambda *both: TASK.outputs(*both)["score"]):
        torch.testing.assert_close(function(padded, batch), function(laid_end_to_end, batch), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- decoding


def outputs_of(features: TokenClassificationFeatures, labels: np.ndarray) -> dict[str, np.ndarray]:
    return {"label": labels.astype(np.int32), "score": np.full(len(labels), 0.5, dtype=np.float32)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_true_labels_decode_to_themselves(name: str):
    examples = CORPUS[: -len(SCRIPTS)]
    features = features_of(examples, name, max_length=24, stride=7)
    tagged = decode(outputs_of(features, features.label.values), features, LABELS)
    assert [labels for labels, _ in tagged] == [list(example.labels) for example in examples]


@given(st.integers(1, 120), st.integers(8, 30), st.data())
@settings(max_examples=80, deadline=None)
def test_of_two_windows_that_one_decides_that_shows_more(words: int, max_length: int, data: st.DataObject):
    stride = data.draw(st.integers(0, max_length - 3))
    example = Example("x", ("in",) * words, ("O",) * words, "x")  # a token each
    features = features_of([example], max_length=max_length, stride=stride)
    room = max_length - 2
    begins = [0]
    while begins[-1] + room < words:
        begins.append(begins[-1] + room - stride)
    assert len(features) == len(begins)
    for word, token in enumerate(features.word_tokens.tolist()):
        window = int(np.searchsorted(features.word.offsets, token, side="right")) - 1
        nearer = {
            i: min(word - b, min(b + room, words) - 1 - word) for i, b in enumerate(begins) if b <= word < b + room
        }
        assert window == min(nearer, key=lambda i: (-nearer[i], i))
        assert features.word.values[token] == word


def test_words_without_tokens_are_in_no_entity():
    example = Example("x", ("Ada", "\u200b", "lives"), ("B-person", "I-person", "O"), "x")
    features = features_of([example])
    ((labels, scores),) = decode(outputs_of(features, features.label.values), features, LABELS)
    assert labels == ["B-person", "O", "O"]
    (found,) = found_entities(example, (labels, scores))
    assert found == {"type": "person", "start": 0, "end": 1, "text": "Ada", "score": 0.5}


def test_the_score_of_an_entity_is_the_mean_of_its_words():
    example = Example("x", ("in", "New", "York", "."), (), "x")
    tagged = (["O", "B-place", "I-place", "O"], np.array([1.0, 0.9, 0.5, 1.0]))
    (found,) = found_entities(example, tagged)
    assert found == {"type": "place", "start": 1, "end": 3, "text": "New York", "score": pytest.approx(0.7)}
    assert json.dumps(found)


def test_the_summary_counts_entities():
    features = features_of(CORPUS[:10])
    summary = features.summary()
    assert summary["examples"] == "10"
    assert summary["entities"] == f"{sum(label[0] == 'B' for e in CORPUS[:10] for label in e.labels):,}"
    assert "entities" not in features_of(CORPUS[:10], labelled=False).summary()
