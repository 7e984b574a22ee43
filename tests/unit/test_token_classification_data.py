"""Labelled words from every form of file, and every mistake in them by its file and line."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from qa_dist.config import DataConfig, RunConfig
from qa_dist.errors import UserError
from qa_dist.tasks.splits import Examples
from qa_dist.tasks.token_classification.labels import found_labels, given_labels
from qa_dist.tasks.token_classification.splits import Split

COLUMNS = "Ada B-PER\nlives O\nin O\nNew B-LOC\nYork I-LOC\n\nNo O\n"
ROWS: list[dict[str, Any]] = [
    {"id": "a", "tokens": ["Ada", "lives", "in", "New", "York"], "ner_tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]},
    {"id": "b", "tokens": ["No"], "ner_tags": ["O"]},
]
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def row(**changes: Any) -> dict[str, Any]:
    return ROWS[0] | changes


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


def split(path: Path, content: str | bytes, name: str = "train", **settings: Any) -> Split:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    key = "train_file" if name == "train" else "validation_file"
    return Split(DataConfig(**{key: (str(path),), **settings}), name)


def load(path: Path, content: str | bytes, name: str = "train", **settings: Any) -> Examples[Any]:
    return split(path, content, name, **settings).loaded


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.conll", COLUMNS),
        ("d.txt", COLUMNS.replace(" ", "\t")),
        ("d.bio", COLUMNS.replace(" ", "   ")),
        ("d.conll", COLUMNS.replace("\n", "\r\n")),
        ("d.conll", "-DOCSTART- -X-\n\n" + COLUMNS.replace("\n\n", "\n \t\n\n\n")),
        ("d.conll", "\ufeff" + COLUMNS.rstrip("\n")),
        ("d.conll", COLUMNS.replace(" ", " NNP I-NP ")),
        ("d.conll", COLUMNS.replace("\n", "\r")),
        ("d.conll", COLUMNS.replace("No O", "-DOCSTART- O\n\nNo O")),
        ("d.data", json.dumps(ROWS, indent=2)),
        ("d.conll.gz", gzip.compress(COLUMNS.encode(), mtime=0)),
        ("d.json", json.dumps(ROWS)),
        ("d.json", json.dumps({"data": ROWS})),
        ("d.jsonl", lines(ROWS)),
        ("d.txt", lines(ROWS)),
        ("d.jsonl.gz", gzip.compress(lines(ROWS).encode(), mtime=0)),
    ],
)
def test_forms(tmp_path: Path, name: str, content: str | bytes):
    found = load(tmp_path / name, content)
    assert [(e.words, e.labels) for e in found.items] == [(tuple(r["tokens"]), tuple(r["ner_tags"])) for r in ROWS]
    assert found.notes == []


def test_where_words_stand(tmp_path: Path):
    first, second = load(tmp_path / "d.conll", "\n" + COLUMNS).items
    assert (first.where(0), first.where(4)) == (f"{tmp_path}/d.conll:2", f"{tmp_path}/d.conll:6")
    assert second.where(0) == f"{tmp_path}/d.conll:8"
    assert [e.id for e in (first, second)] == ["0", "1"]
    assert load(tmp_path / "d.jsonl", lines(ROWS)).items[1].where(0) == f"{tmp_path}/d.jsonl, line 2, token 1"


@pytest.mark.parametrize("split", ["validation", "unlabelled"])
@pytest.mark.parametrize(
    "content",
    [
        "# id 1 domain=en\n# x\n\n" + COLUMNS.replace("\n\n", "\n\n# id 2\n"),
        "# id 1\n# newdoc\n\n" + COLUMNS.replace(" ", "\t").replace("\n\n", "\n\n# sent_id = 2\n"),
    ],
)
def test_comments_are_counted(tmp_path: Path, content: str, split: str):
    found = load(tmp_path / "d.conll", content, split)
    assert [e.words for e in found.items] == [tuple(r["tokens"]) for r in ROWS]
    path = f"{tmp_path}/d.conll"
    assert found.notes == [f"3 lines that begin with # are taken for comments ({path}:1, {path}:2, {path}:10)"]


def test_germeval(tmp_path: Path):
    content = "#\tn-tv.de vom 26.02.2005\n1\tAda\tB-PER\tO\n2\truns\tO\tO\n"
    (found,) = load(tmp_path / "d.tsv", content, columns={"tokens": "2", "ner_tags": "3"}).items
    assert (found.words, found.labels) == (("Ada", "runs"), ("B-PER", "O"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Angela Merkel met\nTom Jones there\n", "no tags .* in the last one.*running text is for qa-dist tag"),
        ("Ada was born in O\nand she lived and lived\nand then there was peace\n", "running text is for qa-dist tag"),
        ("1\tAda\n2\truns\n", "the first of 2 columns holds nothing but numbers"),
    ],
)
def test_running_text_is_not_taken_for_columns(tmp_path: Path, content: str, message: str):
    with pytest.raises(UserError, match=message):
        load(tmp_path / "d.txt", content, "unlabelled")


def test_a_file_of_a_single_sentence_is_remarked_on(tmp_path: Path):
    (note,) = load(tmp_path / "d.conll", "a O\n" * 400).notes
    assert note == "the training examples are one sentence of 400 words; blank lines divide sentences"
    assert load(tmp_path / "d.conll", "a O\n" * 100).notes == []


def test_numbers_in_columns_are_named_by_labels(tmp_path: Path):
    (found,) = load(tmp_path / "d.conll", "Ada 1\nruns 0\n", labels=NAMES).items
    assert found.labels == ("B-PER", "O")
    with pytest.raises(UserError, match=r"nothing names it \(data.labels does"):
        load(tmp_path / "d.conll", "Ada 1\nruns 0\n")


def test_the_column_of_tags_may_be_missing_where_they_are_not_looked_at(tmp_path: Path):
    columns = {"tokens": "1", "ner_tags": "4"}  # of the data that the model was trained on
    (found,) = load(tmp_path / "d.conll", "Ada\nruns\n", "unlabelled", columns=columns).items
    assert found.words == ("Ada", "runs")


def test_the_word_that_comments_begin_with(tmp_path: Path):
    (found,) = load(tmp_path / "d.conll", "# O\nAda B-PER\n# I-PER\n").items
    assert (found.words, found.labels) == (("#", "Ada", "#"), ("O", "B-PER", "I-PER"))
    with pytest.raises(UserError, match=r"d.conll:2 has 3"):  # no comment stands in the middle of a sentence
        load(tmp_path / "d.conll", "Ada B-PER\n# id 2\nruns O\n")


def test_columns_by_name_and_by_number(tmp_path: Path):
    content = "1\tAda\tB-PER\tO\n2\truns\tO\tO\n"
    (found,) = load(tmp_path / "d.tsv", content, columns={"tokens": 2, "ner_tags": "3"}).items
    assert (found.words, found.labels) == (("Ada", "runs"), ("B-PER", "O"))
    renamed = [{"words": r["tokens"], "labels": r["ner_tags"]} for r in ROWS]
    found = load(tmp_path / "d.jsonl", lines(renamed), columns={"tokens": "words", "ner_tags": "labels"})
    assert [e.id for e in found.items] == ["0", "1"]
    assert found.notes == ["no example has an id: numbered 0 to 1"]
    for name in ("d.tsv", "d.jsonl"):
        with pytest.raises(UserError, match=r"data.columns: word: there are no such fields \(.*id, tokens, ner_tags"):
            load(tmp_path / name, (tmp_path / name).read_bytes(), columns={"word": "2"})
    with pytest.raises(UserError, match=r"sentences in columns .* have no ids; leave it out"):
        load(tmp_path / "d.tsv", content, columns={"id": "1"})
    for columns, message in (
        ({"tokens": "5"}, "data.columns: tokens: '5' is no column of"),
        ({"ner_tags": "ner"}, "data.columns: ner_tags: 'ner' is no column of"),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "d.tsv", content, columns=columns)


def test_what_is_predicted_needs_no_tags(tmp_path: Path):
    for content in ("Ada\nlives\n\nNo\n", COLUMNS, COLUMNS.replace("B-PER", "nonsense")):
        found = load(tmp_path / "d.conll", content, "unlabelled")
        assert [e.words[0] for e in found.items] == ["Ada", "No"]
        assert all(e.labels == () for e in found.items)
    found = load(tmp_path / "d.jsonl", lines([{"id": "x", "tokens": ["Ada"]}, row(ner_tags=3)]), "unlabelled")
    assert len(found.items) == 2


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bad.conll", "", "bad.conll: the file is empty"),
        ("bad.conll", "-DOCSTART- O\n\n", "bad.conll: holds no words"),
        (
            "bad.conll",
            "a O\nb\nc O x\n",
            "another number of columns than line 1, which has 2 (divided by blanks), have 2 of its lines: ",
        ),
        ("bad.conll", "a O\n\nb\n", "bad.conll:3 has 1"),
        ("bad.conll", "a b\tO\nc O\n", "(divided by tabs), have 1 of its lines: "),
        ("bad.conll", "a\nb\n", "bad.conll:1: has one column only"),
        ("bad.jsonl", lines([row(ner_tags=["B-\ud800", *row()["ner_tags"][1:]])]), "neither O nor B- or I- and a type"),
        ("bad.jsonl", lines([row(ner_tags=["B-PER ", *row()["ner_tags"][1:]])]), "neither O nor B- or I- and a type"),
        ("bad.jsonl", lines([row(ner_tags=["B- ", *row()["ner_tags"][1:]])]), "neither O nor B- or I- and a type"),
        (
            "bad.conll",
            "a O\nb X-PER\n",
            "neither O nor B- or I- and a type (IOB2), or not in the column that data.columns says: 1 ('X-PER' at ",
        ),
        ("bad.conll", "a O\n\nb O\nc B-\n", "bad.conll:4"),
        ("bad.conll", "a O\nb S-PER\n", "bad.conll:2"),
        ("bad.tsv", "1\tAda\tB-PER\n2\truns\tO\n", "the first of 3 columns holds nothing but numbers; say where"),
        ("bad.conll", "\tO\n", "a token is empty or not a text: 1 ("),
        ("bad.csv", "a,O\n", "bad.csv: CSV cannot hold a sentence"),
        ("bad.conll", b"a O\n\xff O\n", "bad.conll: is not UTF-8 text (byte 4)"),
        ("bad.conll", b"\x1f\x8bnothing", "the gzip file is damaged or cut off"),
        ("bad.conll", b"PAR1nothing", "the Parquet file cannot be read"),
        ("bad.json", "[1, 2]", "is JSON, but not a list of examples with tokens and ner_tags"),
        ("bad.json", "[]", "bad.json: holds no examples"),
        ("bad.jsonl", lines(ROWS) + "{broken\n", "bad.jsonl:3: is not valid JSON"),
        ("bad.jsonl", lines([{"words": ["a"]}]), "has no column 'tokens', 'ner_tags'; it has 'words'"),
        ("bad.jsonl", lines([row(tokens=[], ner_tags=[])]), "tokens is missing, empty or not a list: 1 ("),
        ("bad.jsonl", lines([row(tokens="Ada")]), "tokens is missing, empty or not a list"),
        ("bad.jsonl", lines([row(), row(id="c", ner_tags=["O"])]), "bad.jsonl, line 2: 1 of 5"),
        ("bad.jsonl", lines([row(), {"tokens": ["a"], "id": "c"}]), "bad.jsonl, line 2: none"),
        ("bad.jsonl", lines([row(tokens=["a", "b", 3, "d", "e"])]), "bad.jsonl, example 1, token 3"),
        ("bad.jsonl", lines([row(tokens=["a", "b", "c", " ", "e"])]), "example 1, token 4"),
        ("bad.jsonl", lines([row(tokens=["\ud800", "b", "c", "d", "e"])]), "half of a surrogate pair"),
        ("bad.jsonl", lines([row(ner_tags=[0, 1, 2, 3, 4])]), "nothing names it (data.labels does"),
        ("bad.jsonl", lines([row(ner_tags=["O", "O", None, "O", "O"])]), "neither O nor B- or I-"),
        ("bad.jsonl", lines([row(), row()]), "the id is given to more than one example: 1 ('a' by "),
        ("bad.jsonl", lines([row(), row(id=None)]), "there is no id (a text or a whole number): 1 ("),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, content: str | bytes, expected: str):
    with pytest.raises(UserError) as error:
        load(tmp_path / name, content)
    assert expected in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_entities_that_begin_with_i_are_counted(tmp_path: Path):
    found = load(tmp_path / "d.conll", "a I-PER\nb I-PER\nc I-LOC\n\nd B-LOC\ne I-LOC\n")
    (note,) = found.notes
    assert note.startswith(f"2 entities begin with I- and not with B- ({tmp_path}/d.conll:1, {tmp_path}/d.conll:3)")


# ------------------------------------------------------------------------------------------------ labels


def test_labels_are_found_in_the_training_examples(tmp_path: Path):
    source = split(tmp_path / "d.conll", COLUMNS + "\nx I-PER\n")
    expected = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert found_labels(source, tmp_path / "cache") == expected
    again = split(tmp_path / "d.conll", COLUMNS + "\nx I-PER\n")
    assert found_labels(again, tmp_path / "cache") == expected
    assert "loaded" not in vars(again)  # they came from the cache


def test_numbers_are_named_by_data_labels(tmp_path: Path):
    content = lines([row(ner_tags=[1, 0, 0, 3, 4])])
    found = load(tmp_path / "d.jsonl", content, labels=NAMES)
    assert found.items[0].labels == tuple(ROWS[0]["ner_tags"])
    with pytest.raises(UserError, match=r"a number that none of the 3 labels has: 2 \(3 at .*token 4, 4 at .*token 5"):
        load(tmp_path / "d.jsonl", content, labels=NAMES[:3])


def test_numbers_are_named_by_the_data_set(tmp_path: Path):
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=NAMES)),
        }
    )
    data = datasets.Dataset.from_list(
        [{"tokens": r["tokens"], "ner_tags": [NAMES.index(t) for t in r["ner_tags"]]} for r in ROWS], features=features
    )
    datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(tmp_path / "set")
    source = Split(DataConfig(dataset=str(tmp_path / "set")), "validation")
    assert [e.labels for e in source.loaded.items] == [tuple(r["ner_tags"]) for r in ROWS]
    assert found_labels(source, tmp_path / "cache") == tuple(NAMES)
    data.to_parquet(tmp_path / "d.parquet")  # a file that has the names in it
    assert load(tmp_path / "d.parquet", (tmp_path / "d.parquet").read_bytes()).items == [
        replace(e, place=f"{tmp_path}/d.parquet, row {i + 1}") for i, e in enumerate(source.loaded.items)
    ]


def test_names_of_a_data_set_that_are_no_labels_are_none_of_the_heads(tmp_path: Path):
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.Value("int64"))}
    )
    data = datasets.Dataset.from_list([{"tokens": ["Ada", "x"], "ner_tags": [1, 2]}], features=features)
    data = data.cast_column("ner_tags", datasets.List(datasets.ClassLabel(names=["[PAD]", "B-PER", "O"])))
    data.save_to_disk(tmp_path / "set")
    source = Split(DataConfig(dataset=str(tmp_path / "set")), "train")
    assert found_labels(source, None) == ("B-PER", "O")
    assert source.loaded.items[0].labels == ("B-PER", "O")
    wrong = data.cast_column("ner_tags", datasets.List(datasets.ClassLabel(names=["O", "[PAD]", "B-PER"])))
    wrong.save_to_disk(tmp_path / "wrong")
    with pytest.raises(UserError, match=r"neither O nor B- or I- and a type .*'\[PAD\]' at "):
        Split(DataConfig(dataset=str(tmp_path / "wrong")), "train").loaded  # noqa: B018


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["O", "PER"], "data.labels: PER: a label is O"),
        (["O", "B-PER", "B-PER"], "data.labels: B-PER: a label is named twice"),
        (["B-PER"], "data.labels: O is not among them"),
    ],
)
def test_names_that_cannot_be_labels(labels: list[str], message: str):
    with pytest.raises(UserError, match=message):
        given_labels(DataConfig(labels=tuple(labels)))


def test_one_label_on_the_command_line_is_a_tuple():
    assert RunConfig.model_validate({"data": {"labels": "O"}}).data.labels == ("O",)


def test_a_share_is_held_out_by_sentence(tmp_path: Path):
    content = "".join(f"word{i % 20} O\nends O\n\n" for i in range(100))
    path = tmp_path / "d.conll"
    path.write_text(content)
    config = DataConfig(train_file=(str(path),), validation_share=0.2)
    train, validation = (Split(config, name).loaded.items for name in ("train", "validation"))
    assert len(train) + len(validation) == 100 and len(validation) == 20
    assert {e.words for e in train}.isdisjoint(e.words for e in validation)
