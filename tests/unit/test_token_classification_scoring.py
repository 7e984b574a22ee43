"""Files of predicted entities."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qa_dist.cli import main
from tests.helpers import FORK_SERVER

GOLD = "Ada B-PER\nLovelace I-PER\nsaw O\nNew B-LOC\nYork I-LOC\n\nNobody O\ncame O\n\nParis B-LOC\nHilton I-LOC\n"
FOUND = GOLD.replace("Paris B-LOC\nHilton I-LOC", "Paris B-PER\nHilton I-PER")
ENTITIES: dict[str, list[dict[str, Any]]] = {
    "0": [{"type": "PER", "start": 0, "end": 2}, {"type": "LOC", "start": 3, "end": 5}],
    "1": [],
    "2": [{"type": "PER", "start": 0, "end": 2, "text": "Paris Hilton", "score": 0.9}],
}


def score(
    capsys: pytest.CaptureFixture[str], directory: Path, name: str, content: str, *more: str
) -> tuple[int, str, str]:
    (directory / "gold.conll").write_text(GOLD)
    (directory / name).write_text(content)
    arguments = ["--data.validation_file", directory / "gold.conll", "--predictions", directory / name, *more]
    with pytest.raises(SystemExit) as ended:
        main(["score", "--task", "token_classification", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("predictions.json", json.dumps(ENTITIES)),
        ("found.conll", FOUND),
        ("found.tsv", FOUND.replace(" ", "\tx\ty\t")),
        ("found.conll", FOUND.replace("B-PER\nH", "I-PER\nH")),  # which is told
        ("found.jsonl", "".join(
            json.dumps({"tokens": [line.split()[0] for line in one.splitlines()],
                        "ner_tags": [line.split()[1] for line in one.splitlines()]}) + "\n"
            for one in FOUND.split("\n\n")
        )),
    ],
)  # fmt: skip
def test_figures_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: str):
    code, out, err = score(capsys, tmp_path, name, content)
    assert code == 0, err
    figures = json.loads(out)
    third = pytest.approx(200 / 3)
    assert {key: figures[key] for key in ("precision", "recall", "f1")} == {
        "precision": third,
        "recall": third,
        "f1": third,
    }
    if name == "predictions.json":
        assert "accuracy" not in figures  # it has no labels
    else:
        assert figures["accuracy"] == pytest.approx(100 * 7 / 9)
    assert (figures["LOC_recall"], figures["PER_precision"], figures["LOC_number"]) == (50.0, 50.0, 2)
    assert ("begin with I-" in err) == ("\nParis I-PER" in content)


def test_predictions_may_have_other_columns_than_the_data(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    wide = GOLD.replace(" ", " x ").replace("\n", " y\n").replace("\n y\n", "\n\n")
    (tmp_path / "wide.conll").write_text(wide)
    code, out, err = score(
        capsys, tmp_path, "found.conll", FOUND,
        "--data.columns", "{tokens: 1, ner_tags: 3}", "--data.validation_file", str(tmp_path / "wide.conll"),
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["f1"] == pytest.approx(200 / 3)


def test_sentences_without_a_prediction_have_no_entity(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    few = {"0": ENTITIES["0"], "stranger": []}
    code, out, err = score(capsys, tmp_path, "predictions.json", json.dumps(few))
    assert code == 0
    assert json.loads(out)["precision"] == 100 and json.loads(out)["recall"] == pytest.approx(200 / 3)
    assert "2 sentences have no prediction and score as if no entity were found (1, 2)" in err
    assert "1 predictions are for no sentence of these data (stranger)" in err


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("p.json", "{}", (), "has to be a JSON object that gives a list for every example's id"),
        ("p.json", '{"0": "Ada"}', (), "1 ids have something else than a list (0)"),
        ("p.json", '{"x": []}', (), "none of its 1 ids (x) is among the 3 examples (0, 1, 2); it was made for"),
        ("p.json", '{"0": [7]}', (), "'0' has an entity without type (a text), start and end (words)"),
        ("p.json", '{"0": [{"type": "PER", "start": 4, "end": 6}]}', (), "is not within its 5 words"),
        (
            "p.json",
            '{"0": [{"type": "A", "start": 0, "end": 2}, {"type": "B", "start": 1, "end": 3}]}',
            (),
            "overlaps with another one",
        ),
        ("p.conll", FOUND.replace("saw", "met"), (), "p.conll:3: has other words than "),
        ("p.conll", FOUND.replace("Nobody O\n", ""), (), "p.conll:7: has other words than "),
        ("p.conll", FOUND.replace("came O\n", ""), (), "p.conll:7: has other words than "),
        ("p.conll", FOUND.replace("B-PER", "S-PER"), (), "neither O nor B- or I- and a type (IOB2)"),
        ("p.conll", "", (), "p.conll: the file is empty"),
        (
            "p.json",
            json.dumps(dict.fromkeys("012", "text")),
            ("--task", "question_answering"),
            "gold.conll: words and their tags in columns are for --task",
        ),
        ("p.json", "{}", ("--null_odds", "x"), "--null_odds: is for question answering"),
    ],
)
def test_what_cannot_be_scored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: str, more: tuple[str, ...], message: str
):
    code, out, err = score(capsys, tmp_path, name, content, *more)
    assert (code, out) == (2, "")
    assert message in err


def test_a_file_that_is_not_there(tmp_path: Path):
    (tmp_path / "gold.conll").write_text(GOLD)
    flags = ["--task", "token_classification", "--data.validation_file", "gold.conll", "--predictions", "none.json"]
    done = subprocess.run(
        [FORK_SERVER.python, "-m", "qa_dist", "score", *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "qa-dist: none.json: cannot be read: No such file or directory\n"
