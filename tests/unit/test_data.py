import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qa_dist.config import DataConfig
from qa_dist.errors import UserError
from qa_dist.tasks.question_answering.data import Examples, check_records
from qa_dist.tasks.question_answering.reading import expand, read_file
from qa_dist.tasks.question_answering.splits import Split
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
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    config = DataConfig(**settings)
    return check_records(read_file(path, config.columns), config, str(path), training)


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
        ([{k: v for k, v in example().items() if k != "context"}], "has no column 'context'; it has 'id', 'question'"),
        ([{k: v for k, v in example().items() if k != "context"}, example()], "the context is missing"),
        ([example(question="")], "the question is missing"),
        ([example(), example()], "the id is given to more than one example: 1 ('q1' by "),
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
        ([example(is_impossible="perhaps")], "is_impossible is neither true nor false"),
        ([example(is_impossible=True)], "is_impossible is true, but there are answers"),
        ([example(question="\ud800?")], "holds half of a surrogate pair"),
        ("[" * 9000, "is not valid JSON"),
        ('[{"id": ' + "9" * 5000 + "}]", "is not valid JSON"),
        ([{k: v for k, v in example().items() if k != "answers"}], "has no column 'answers'"),
        ([{k: v for k, v in example().items() if k != "answers"}, example()], "there is no field answers"),
        (b"\x1f\x8bnothing", "the gzip file is damaged or cut off"),
        (gzip.compress(b"[" + b" " * 1000, mtime=0)[:-9], "the gzip file is damaged or cut off"),
        (b"PAR1nothing", "the Parquet file cannot be read"),
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
    assert "'0': at 1 stands 'da w', not 'Rome', '1': at 1" in text
    assert "and 4 more" in text
    assert "the context is missing" in text
    assert "has no answer" in text


def test_not_utf8(tmp_path: Path):
    (tmp_path / "d.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(UserError, match="is not UTF-8 text \\(byte 9\\)"):
        read_file(tmp_path / "d.json", {})


def test_misaligned_dropped(tmp_path: Path):
    bad = example(id="q2", answers=[{"text": "Paris", "answer_start": 13}])
    loaded = load(tmp_path / "d.json", [example(), bad], on_misaligned="drop")
    assert [e.id for e in loaded.items] == ["q1"]
    assert (
        "1 examples with misaligned answers ('q2': at 13 stands 'in Pa', not 'Paris'): 0 repaired, 1 left out"
        in loaded.notes[0]
    )


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


# ----------------------------------------------------------------------------------------------- tables


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


COLUMNS = {"text": ["Paris"], "answer_start": [16]}
TWO = {k: v for k, v in example().items() if k != "answers"} | {"answer_text": "Paris", "answer_start": 16}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", table([example(answers=json.dumps(COLUMNS))])),
        ("d.csv", table([example(answers=json.dumps(example()["answers"]))], ";")),
        ("d.tsv", table([TWO], "\t")),
        ("d.csv", table([TWO])),
        ("d.parquet", parquet([example(answers=COLUMNS)])),
        ("d.parquet", parquet([example()])),
        ("d.parquet", parquet([TWO])),
        ("d.parquet", parquet([TWO | {"answer_text": ["Paris"], "answer_start": [16]}])),
        ("d.parquet", parquet([example(answers=json.dumps(COLUMNS))])),
        ("d.json.gz", gzip.compress(json.dumps(squad([example()])).encode(), mtime=0)),
        ("d.csv.gz", gzip.compress(table([TWO]).encode(), mtime=0)),
        ("d.jsonl.gz", gzip.compress((json.dumps(example()) + "\n" + json.dumps(example(id="q2"))).encode(), mtime=0)),
        ("d.parquet.gz", gzip.compress(parquet([TWO]), mtime=0)),
    ],
)
def test_tables_and_compressed_files(tmp_path: Path, name: str, content: str | bytes):
    first = load(tmp_path / name, content).items[0]
    assert (first.id, first.context, first.answers, first.answer_starts) == ("q1", CONTEXT, ("Paris",), (16,))


def test_unanswerable_in_a_table(tmp_path: Path):
    rows = [TWO | {"id": "a"}, TWO | {"id": "b", "answer_text": "", "answer_start": ""}]
    loaded = load(tmp_path / "d.csv", table(rows), unanswerable="allow")
    assert [e.answers for e in loaded.items] == [("Paris",), ()]


def test_columns_under_other_names(tmp_path: Path):
    rows = [{"qid": 7, "q": "Where?", "passage": CONTEXT, "a": "Paris", "at": 16}]
    columns = {"id": "qid", "question": "q", "context": "passage", "answer_text": "a", "answer_start": "at"}
    for name, content in (("d.csv", table(rows)), ("d.json", json.dumps(rows)), ("d.parquet", parquet(rows))):
        (only,) = load(tmp_path / name, content, columns=columns).items
        assert (only.id, only.question, only.context, only.answer_starts) == ("7", "Where?", CONTEXT, (16,))
    with pytest.raises(UserError) as error:
        load(tmp_path / "d.csv", table(rows), columns={"context": "text"})
    assert "has no column 'question', 'text', 'answers'; it has 'qid', 'q', 'passage', 'a', 'at'" in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("id,question,context,answers\nq1,Where?,Paris\n", ":2: has 3 cells, but the header names 4 columns"),
        ("id,question,context,answers\nq1,Where, now?,Paris,x\n", ":2: has 5 cells"),
        (table([example(answers="{'text': ['Paris']}")]), "answers is neither a list nor an object"),
        (table([TWO | {"answer_start": "sixteen"}]), "an answer has no answer_start (a whole number)"),
        ("id,question,context,answer_text\nq1,Where?,Paris,Paris\n", "has no column 'answer_start'"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, content: str, expected: str):
    with pytest.raises(UserError) as error:
        load(tmp_path / "bad.csv", content)
    assert expected in str(error.value)
    assert "bad.csv" in str(error.value)


# ------------------------------------------------------------------------------------------------ splits


def many(count: int, contexts: int) -> list[dict[str, Any]]:
    return [example(id=str(i), context=f"{CONTEXT} {i % contexts}") for i in range(count)]


def test_several_files_and_patterns(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"part{i}.json").write_text(json.dumps([example(id=str(i))]))
    pattern, one = str(tmp_path / "part*.json"), str(tmp_path / "part1.json")
    assert [p.name for p in expand([one, pattern], "k")] == ["part1.json", "part0.json", "part2.json"]
    split = Split(DataConfig(train_file=(pattern,)), "train")
    assert [e.id for e in split.loaded.items] == ["0", "1", "2"]
    before = split.fingerprint
    (tmp_path / "part2.json").write_text(json.dumps([example(id="9")]))
    assert Split(DataConfig(train_file=(pattern,)), "train").fingerprint != before
    with pytest.raises(UserError, match=r"k: .*none.*: no file matches"):
        expand([str(tmp_path / "none*")], "k")
    with pytest.raises(UserError, match="is a directory"):
        expand([str(tmp_path)], "k")


def test_the_same_id_in_two_files_is_found(tmp_path: Path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([example()]))
    with pytest.raises(UserError, match=r"'q1' by .*a\.json, example 1, .*b\.json, example 1"):
        _ = Split(DataConfig(train_file=(str(tmp_path / "*.json"),)), "train").loaded


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_is_held_out_by_context(tmp_path: Path, share: float):
    (tmp_path / "d.json").write_text(json.dumps(many(200, 40)))
    config = DataConfig(train_file=(str(tmp_path / "d.json"),), validation_share=share)
    train, validation = (Split(config, name).loaded.items for name in ("train", "validation"))
    assert len(train) + len(validation) == 200
    assert {e.context for e in train}.isdisjoint(e.context for e in validation)
    assert share * 200 <= len(validation) <= share * 200 + 5
    again = Split(config, "validation").loaded.items
    assert again == validation
    keys = {Split(config, "train").fingerprint, Split(config, "validation").fingerprint}
    assert len(keys) == 2


def test_a_share_of_a_single_context_is_refused(tmp_path: Path):
    (tmp_path / "d.json").write_text(json.dumps(many(5, 1)))
    with pytest.raises(UserError, match="leaves none to train on"):
        _ = Split(DataConfig(train_file=(str(tmp_path / "d.json"),), validation_share=0.5), "train").loaded


def test_limits(tmp_path: Path):
    (tmp_path / "d.json").write_text(json.dumps(many(5, 5)))
    files = (str(tmp_path / "d.json"),)
    assert len(Split(DataConfig(train_file=files, max_train_samples=3), "train").loaded.items) == 3
    split = Split(DataConfig(train_file=files, max_train_samples=9), "train")
    assert len(split.loaded.items) == 5
    assert split.loaded.notes == ["9 examples were asked for, there are 5"]


def test_data_sets_on_disk(tmp_path: Path):
    rows = datasets.Dataset.from_list([example(answers=COLUMNS)])
    datasets.DatasetDict({"train": rows, "dev": rows}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    rows.to_parquet(tmp_path / "files" / "train.parquet")
    for name, split in (("both", "dev"), ("one", "train"), ("files", "train")):
        config = DataConfig(dataset=str(tmp_path / name), validation_split=split, dataset_config=None)
        loaded = Split(config, "validation")
        assert loaded.exists
        assert [(e.id, e.answer_starts) for e in loaded.loaded.items] == [("q1", (16,))]
        assert loaded.fingerprint
    with pytest.raises(UserError, match="has no split 'test'; it has train, dev"):
        _ = Split(DataConfig(dataset=str(tmp_path / "both"), validation_split="test"), "validation").loaded
    with pytest.raises(UserError, match=r'Unknown split "test"'):
        _ = Split(DataConfig(dataset=str(tmp_path / "files"), validation_split="test"), "validation").loaded


def test_a_data_set_that_cannot_be_reached():
    with pytest.raises(UserError) as error:
        _ = Split(DataConfig(dataset="nobody/nothing"), "train").loaded
    assert "data.dataset: 'nobody/nothing' (split 'train') cannot be loaded" in str(error.value)
    assert "point data.train_file and data.validation_file at files" in str(error.value)
