"""The windows equal the tokenizer's own, and the labels point at the answers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_dist.config import SyntheticConfig
from qa_dist.errors import UserError
from qa_dist.tasks.cache import cached_table
from qa_dist.tasks.question_answering import synthetic
from qa_dist.tasks.question_answering.data import Example
from qa_dist.tasks.question_answering.decoding import span_of_whole_characters
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures, build_features
from tests.helpers import roberta_tokenizer, wordpiece_tokenizer

CORPUS = synthetic.generate(SyntheticConfig(train_examples=60, long_share=0.4), "train")
TOKENIZERS = {
    "wordpiece": wordpiece_tokenizer(synthetic.texts(CORPUS)),
    "roberta": roberta_tokenizer(synthetic.texts(CORPUS)),
}
LEFT = wordpiece_tokenizer(synthetic.texts(CORPUS))
LEFT.padding_side = "left"
TOKENIZERS["context first"] = LEFT


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("max_length", "stride"), [(64, 16), (96, 40), (512, 0), (48, 0)])
def test_windows_equal_the_tokenizers_own(name: str, max_length: int, stride: int):
    tokenizer = TOKENIZERS[name]
    rows = build_features(CORPUS, tokenizer, max_length=max_length, stride=stride).to_pylist()
    question_first = tokenizer.padding_side == "right"
    questions, contexts = [e.question for e in CORPUS], [e.context for e in CORPUS]
    own = tokenizer(
        *((questions, contexts) if question_first else (contexts, questions)),
        truncation="only_second" if question_first else "only_first",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert len(rows) == len(own["input_ids"])
    context = 1 if question_first else 0
    for i, row in enumerate(rows):
        places = [j for j, sequence in enumerate(own.sequence_ids(i)) if sequence == context]
        assert row["input_ids"] == own["input_ids"][i]
        assert row["example"] == own["overflow_to_sample_mapping"][i]
        assert (row["context_begin"], row["context_end"]) == (places[0], places[-1] + 1)
        offsets = [own["offset_mapping"][i][j] for j in places]
        assert list(zip(row["char_starts"], row["char_ends"], strict=True)) == [tuple(pair) for pair in offsets]
        assert row["cls"] == row["input_ids"].index(tokenizer.cls_token_id)
        if "token_type_ids" in tokenizer.model_input_names:
            assert row["token_type_ids"] == own["token_type_ids"][i]


def labelled_text(row: dict, example: Example) -> str | None:
    """The text that a window's label stands for; None for no answer."""
    if row["start_position"] == row["cls"]:
        return None
    first, last = row["start_position"] - row["context_begin"], row["end_position"] - row["context_begin"]
    start, end = span_of_whole_characters(example.context, row["char_starts"][first], row["char_ends"][last])
    return example.context[start:end]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels_are_the_answer_where_a_window_holds_it_whole(name: str):
    rows = build_features(CORPUS, TOKENIZERS[name], max_length=64, stride=24).to_pylist()
    found = set()
    for row in rows:
        example = CORPUS[row["example"]]
        start, end = example.answer_starts[0], example.answer_starts[0] + len(example.answers[0])
        inside = row["char_starts"] and row["char_starts"][0] <= start and row["char_ends"][-1] >= end
        text = labelled_text(row, example)
        assert (text == example.answers[0]) if inside else (text is None)
        if text:
            found.add(row["example"])
    assert found == set(range(len(CORPUS)))  # a stride longer than the answers loses none


# Not only letters: marks that combine, surrogate-plane emoji, CJK, right-to-left, runs of spaces.
PIECES = st.sampled_from(
    [
        "a",
        "The",
        "naïve",
        "e\u0301",
        "\U0001f600",
        "\U0001f1eb\U0001f1f7",
        "東京",
        "שלום",
        "مرحبا",
        "1,234.5",
        "don't",
        "—",
        "x\u200by",
    ]
)
SPACES = st.sampled_from([" ", "  ", "\n", "\t ", "\u00a0", "\u3000"])


@st.composite
def answered_contexts(draw: st.DrawFn) -> Example:
    words = draw(st.lists(PIECES, min_size=1, max_size=40))
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, min(first + 3, len(words) - 1)))
    context, starts, ends = "", [], []
    for word in words:
        context += draw(SPACES)
        starts.append(len(context))
        context += word
        ends.append(len(context))
    answer = context[starts[first] : ends[last]]
    return Example("x", "What is it?", context, (answer,), (starts[first],))


@pytest.mark.parametrize("name", ["wordpiece", "roberta"])
@given(example=answered_contexts())
@settings(max_examples=60, deadline=None)
def test_labels_decode_to_the_answer_for_any_text(name: str, example: Example):
    row = build_features([example], TOKENIZERS[name], max_length=1000, stride=0).to_pylist()[0]
    assert labelled_text(row, example) == example.answers[0]


def test_a_question_without_room_is_named():
    long = Example("long-one", "why " * 60, CORPUS[0].context, (), ())
    with pytest.raises(UserError, match=r"1 questions leave no room for their context: 'long-one' \(\d+ tokens\)"):
        build_features([CORPUS[0], long], TOKENIZERS["wordpiece"], max_length=64, stride=16)


def test_a_long_question_is_fine_where_the_context_fits():
    short = Example("q", "why " * 20, "Ada.", ("Ada",), (0,))
    rows = build_features([short], TOKENIZERS["wordpiece"], max_length=64, stride=16).to_pylist()
    assert len(rows) == 1
    assert labelled_text(rows[0], short) == "Ada"


class Notes:
    notes: list[str] = []  # noqa: RUF012


def test_collate_pads_to_the_longest_and_the_cache_gives_the_same(tmp_path: Path):
    tokenizer = TOKENIZERS["wordpiece"]
    built = 0

    def build():
        nonlocal built
        built += 1
        return build_features(CORPUS, tokenizer, max_length=64, stride=16)

    table = build()
    features = [
        QuestionAnsweringFeatures(
            cached_table(tmp_path, "key", build), "key", {"input_ids": 9, "token_type_ids": 0}, Notes()
        )
        for _ in range(2)
    ]
    assert built == 2  # once above, once for the cache
    assert [path.name for path in tmp_path.iterdir()] == ["key.arrow"]
    rows = table.to_pylist()
    indices = np.array([5, 0, 17])
    for loaded in features:
        batch = loaded.collate(indices)
        longest = max(len(rows[i]["input_ids"]) for i in indices)
        assert batch.inputs["input_ids"].shape == (3, -(-longest // 8) * 8)
        for position, i in enumerate(indices):
            ids = batch.inputs["input_ids"][position].tolist()
            length = len(rows[i]["input_ids"])
            assert ids == rows[i]["input_ids"] + [9] * (len(ids) - length)
            assert batch.inputs["attention_mask"][position].tolist() == [1] * length + [0] * (len(ids) - length)
            assert batch.targets["start_position"][position] == rows[i]["start_position"]
        assert batch.index.tolist() == indices.tolist()
