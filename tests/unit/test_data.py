import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist.config import DataConfig
from qa_dist.errors import UserError
from qa_dist.tasks.question_answering.data import Examples, check_records, read_records
from tests.helpers import squad

CONTEXT = "Ada was born in Paris. She studied in London, near Paris."


def example(**changes: Any) -> dict[str, Any]:
    return {
        "id": "q1",
        "question": "Where was Ada born?",
        "context": CONTEXT,
        "answers": [{"text": "Paris", "answer_start": 16}],
    } | changes


def load(path: Path, content: Any, training: bool = True, **settings: Any) -> Examples:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return check_records(read_records(path), DataConfig(**settings), str(path), training)


@pytest.mark.parametrize(
    "content",
    [
        squad([example()]),
        [example()],
        {"data": [example()]},
        [example(answers={"text": ["Paris"], "answer_start": [16]})],
        json.dumps(example()),
        json.dumps(example()) + "\n\n" + json.dumps(example(id="q2")) + "\n",
        "\ufeff" + json.dumps([example()]),
    ],
    ids=["nested", "flat", "flat under data", "columns", "one line", "lines", "byte order mark"],
)
def test_forms(tmp_path: Path, content: Any):
    first = load(tmp_path / "d.json", content).items[0]
    assert (first.id, first.context, first.answers, first.answer_starts) == ("q1", CONTEXT, ("Paris",), (16,))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the file is empty"),
        (" \n", "the file is empty"),
        ('{"data": [', "is not valid JSON"),
        (json.dumps(example()) + "\n{broken\n", ":2: is not valid JSON"),
        (json.dumps(example()) + "\n[1]\n", ":2: is not an example"),
        ("[]", "holds no examples"),
        ("3", "neither SQuAD's form"),
        ({"data": [{"paragraphs": [{"context": "c"}]}]}, "data[0].paragraphs[0]: has no list 'qas'"),
        ([example(context=None)], "the context is missing, empty or not a text: 1 ('q1' in"),
        ([example(context=" \n")], "the context is missing, empty or not a text"),
        ([{k: v for k, v in example().items() if k != "context"}], "the context is missing"),
        ([example(question="")], "the question is missing"),
        ([example(), example()], "the id is given to more than one example: 1 ('q1' (2 times))"),
        ([example(), example(id=None)], "there is no id (a text or a whole number): 1 ("),
        ([example(answers=[{"text": "Rome", "answer_start": 16}])], "--data.on_misaligned repair"),
        ([example(answers=[{"text": "Paris", "answer_start": 13}])], "does not point at its text"),
        ([example(answers=[{"text": "Paris", "answer_start": -5}])], "does not point at its text"),
        ([example(answers=[{"text": "Paris"}])], "an answer has no answer_start"),
        ([example(answers={"text": ["Paris"], "answer_start": []})], "not lists of the same length"),
        ([example(answers=[{"text": " ", "answer_start": 3}])], "an answer has no text"),
        ([example(answers=[])], "--data.unanswerable allow"),
        ([example(answers=5)], "answers is neither a list nor an object"),
        ([example(answers=[3])], "an answer has no text"),
        ([example(is_impossible="false")], "is_impossible is neither true nor false"),
        ([example(is_impossible=True)], "is_impossible is true, but there are answers"),
        ([example(question="\ud800?")], "holds half of a surrogate pair"),
        ("[" * 9000, "is not valid JSON"),
        ('[{"id": ' + "9" * 5000 + "}]", "is not valid JSON"),
        ([{k: v for k, v in example().items() if k != "answers"}], "there is no field answers"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, content: Any, expected: str):
    with pytest.raises(UserError) as error:
        load(tmp_path / "bad.json", content)
    assert expected in str(error.value)
    assert "bad.json" in str(error.value)


def test_all_kinds_of_problems_are_told_in_one_go(tmp_path: Path):
    broken = [example(id=i, answers=[{"text": "Rome", "answer_start": 1}]) for i in range(9)]
    with pytest.raises(UserError) as error:
        load(tmp_path / "d.json", [*broken, example(context=""), example(id="u", answers=[])])
    text = str(error.value)
    assert "'0', '1', '2', '3', '4' and 4 more" in text
    assert "the context is missing" in text
    assert "has no answer" in text


def test_not_utf8(tmp_path: Path):
    (tmp_path / "d.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(UserError, match="is not UTF-8 text \\(byte 9\\)"):
        read_records(tmp_path / "d.json")


def test_misaligned_dropped(tmp_path: Path):
    bad = example(id="q2", answers=[{"text": "Paris", "answer_start": 13}])
    loaded = load(tmp_path / "d.json", [example(), bad], on_misaligned="drop")
    assert [e.id for e in loaded.items] == ["q1"]
    assert "1 examples with misaligned answers ('q2'): 0 repaired, 1 left out" in loaded.notes[0]


def test_misaligned_repaired_to_the_nearest_place(tmp_path: Path):
    near_first = example(id="a", answers=[{"text": "Paris", "answer_start": 13}])
    near_second = example(id="b", answers=[{"text": "Paris", "answer_start": 55}])
    absent = example(id="c", answers=[{"text": "Rome", "answer_start": 16}])
    loaded = load(tmp_path / "d.json", [near_first, near_second, absent], on_misaligned="repair")
    assert [(e.id, e.answer_starts) for e in loaded.items] == [("a", (16,)), ("b", (CONTEXT.rindex("Paris"),))]
    assert "2 repaired, 1 left out" in loaded.notes[0]


def test_misaligned_validation_answers_still_count_for_the_score(tmp_path: Path):
    bad = example(answers=[{"text": "Rome", "answer_start": 16}])
    (only,) = load(tmp_path / "d.json", [bad], training=False, on_misaligned="drop").items
    assert (only.answers, only.answer_starts) == (("Rome",), (-1,))


def test_unanswerable(tmp_path: Path):
    items = [example(), example(id="q2", answers=[]), example(id="q3", is_impossible=True, answers=[])]
    assert [len(e.answers) for e in load(tmp_path / "d.json", items, unanswerable="allow").items] == [1, 0, 0]
    dropped = load(tmp_path / "d.json", items, unanswerable="drop")
    assert [e.id for e in dropped.items] == ["q1"]
    assert dropped.notes == ["2 questions without an answer left out"]
    with pytest.raises(UserError, match="no example is left"):
        load(tmp_path / "d.json", items[1:], unanswerable="drop")


def test_ids_are_made_texts_or_given(tmp_path: Path):
    numbered = [example(id=7), example(id=0)]
    assert [e.id for e in load(tmp_path / "d.json", numbered).items] == ["7", "0"]
    without = [{k: v for k, v in example().items() if k != "id"}] * 2
    loaded = load(tmp_path / "d.json", without)
    assert [e.id for e in loaded.items] == ["0", "1"]
    assert loaded.notes == ["no example has an id: numbered 0 to 1"]
