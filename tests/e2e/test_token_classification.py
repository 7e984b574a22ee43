"""The second task as a user runs it: the same loop, engines, checkpoints, commands and report."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, AutoTokenizer

from qa_dist import TokenClassifier
from qa_dist.cli import main
from qa_dist.config import SyntheticConfig
from qa_dist.reporting.model_card import model_card
from qa_dist.reporting.report import write_report
from qa_dist.reporting.report.reading import read_run
from qa_dist.tasks.token_classification import synthetic
from qa_dist.tasks.token_classification.scheme import entities_of
from tests.browser import browser_page
from tests.e2e.hub_training import forget, steps_of
from tests.helpers import ROOT, SIZES, Launcher, jsonl, tiny_flags
from tests.hub_runs import REPO
from tests.hub_server import HubServer
from tests.tokenizers import wordpiece_tokenizer

LABELS = ["O", "B-organisation", "I-organisation", "B-person", "I-person", "B-place", "I-place"]


def flags_of(cache: Path, **changes: str) -> list[str]:
    """Those of a run of seconds, some of whose texts are longer than a window."""
    own = {
        "task": "token_classification",
        "data.synthetic.train_examples": "60",
        "data.synthetic.validation_examples": "21",
        "data.max_length": "48",
        "data.stride": "12",
        "data.cache_dir": str(cache),
        "train.learning_rate": "5e-3",
        "train.epochs": "3",
    }
    return tiny_flags(**own, **changes)


def write_columns(path: Path, split: str, count: int = 40, *, tagged: bool = True) -> Path:
    config = SyntheticConfig(train_examples=count, validation_examples=count, long_share=0.2)
    lines = []
    for example in synthetic.generate(config, split):
        pairs = zip(example.words, example.labels, strict=True)
        lines += [f"{word}\t{label}" if tagged else word for word, label in pairs] + [""]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on one process, with a checkpoint in its middle."""
    directory = tmp_path_factory.mktemp("alone")
    flags = flags_of(directory / "cache", **{"checkpoint.every": "20 steps", "checkpoint.keep_last": "9"})
    launch = Launcher(directory).train("ddp", 1, directory / "run", *flags)
    assert launch.code == 0, launch.output
    return directory / "run"


def test_what_a_run_leaves(alone: Path):
    metrics = json.loads((alone / "metrics.json").read_text())
    assert {"precision", "recall", "f1", "accuracy", "sentence_accuracy", "loss", "person_f1", "place_number"} <= set(
        metrics
    )
    model = AutoModelForTokenClassification.from_pretrained(alone / "model")
    assert list(model.config.id2label.values()) == LABELS
    stored = json.loads((alone / "model/config.json").read_text())
    assert stored["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    assert stored["label2id"] == {label: i for i, label in enumerate(LABELS)}
    assert json.loads((alone / "model/qa_dist.json").read_text())["settings"]["task"] == "token_classification"
    losses = [row["loss"] for row in jsonl(alone / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < losses[0] / 3

    examples = synthetic.generate(SyntheticConfig(validation_examples=21, long_share=0.3), "validation")
    predictions = json.loads((alone / "predictions.json").read_text())
    assert list(predictions) == [example.id for example in examples]
    right = found = 0
    for example in examples:
        own = {(entity["type"], entity["start"], entity["end"]) for entity in predictions[example.id]}
        right, found = right + len(own & set(entities_of(example.labels))), found + len(own)
        for entity in predictions[example.id]:
            assert entity["text"] == " ".join(example.words[entity["start"] : entity["end"]])
            assert 0 < entity["score"] <= 1
    assert metrics["precision"] == pytest.approx(100 * right / found)


@pytest.mark.parametrize(("engine", "processes"), [("ddp", 2), ("zero2", 2)])
def test_two_processes_learn_what_one_does(
    alone: Path, tmp_path: Path, launcher: Launcher, engine: str, processes: int
):
    launch = launcher.train(engine, processes, tmp_path / "run", *flags_of(alone.parent / "cache"))
    assert launch.code == 0, launch.output
    figures = [json.loads((run / "metrics.json").read_text())["history"] for run in (alone, tmp_path / "run")]
    for one, two in zip(*figures, strict=True):
        for name in ("loss", "train_loss", "accuracy"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
    losses = [
        [row["loss"] for row in jsonl(run / "metrics.jsonl") if row["kind"] == "train"]
        for run in (alone, tmp_path / "run")
    ]
    assert losses[1][:10] == pytest.approx(losses[0][:10], rel=1e-4)


@pytest.mark.parametrize(("engine", "processes"), [("ddp", 2), ("zero2", 2), ("zero3", 2)])
def test_figures_do_not_depend_on_the_number_of_processes(
    alone: Path, tmp_path: Path, launcher: Launcher, engine: str, processes: int
):
    """Batches of other lengths on each rank, more ranks in the last round than batches."""
    data = flags_of(alone.parent / "cache")[:6]
    sizes = ["--evaluation.batch_size", "4", "--run.output_dir", str(tmp_path / "run")]
    flags = ["--model", str(alone / "model"), "--task", "token_classification", *data, *sizes]
    launch = launcher.run(engine, processes, "-m", "qa_dist", "evaluate", *flags)
    assert launch.code == 0, launch.output
    expected = json.loads((alone / "metrics.json").read_text())
    figures = json.loads((tmp_path / "run/metrics.json").read_text())
    assert figures == {name: expected[name] for name in figures}
    assert (tmp_path / "run/predictions.json").read_bytes() == (alone / "predictions.json").read_bytes()


def test_a_run_goes_on_bit_for_bit(alone: Path, tmp_path: Path, launcher: Launcher):
    resume = ("--resume", str(alone / "checkpoints/step_00000020"))
    launch = launcher.train("ddp", 1, tmp_path / "rest", *flags_of(alone.parent / "cache"), *resume)
    assert launch.code == 0, launch.output
    weights = [load_file(run / "model/model.safetensors") for run in (alone, tmp_path / "rest")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (tmp_path / "rest/predictions.json").read_bytes() == (alone / "predictions.json").read_bytes()


def test_a_run_goes_on_on_another_engine(alone: Path, tmp_path: Path, launcher: Launcher):
    resume = ("--resume", str(alone / "checkpoints/step_00000020"))
    launch = launcher.train("zero2", 2, tmp_path / "rest", *flags_of(alone.parent / "cache"), *resume)
    assert launch.code == 0, launch.output
    losses = [json.loads((run / "metrics.json").read_text())["loss"] for run in (alone, tmp_path / "rest")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return int(exit_.value.code or 0), output.out + output.err


def test_what_was_pushed_goes_on_elsewhere_and_finds_entities(
    alone: Path, tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
):
    flags = [*flags_of(alone.parent / "cache", **{"checkpoint.every": "20 steps"}), "--hub.repo_id", REPO]
    code, text = command(capsys, "train", *flags, "--run.output_dir", tmp_path / "first")
    assert code == 0, text
    newest, *others = steps_of(hub)
    assert others
    forget(hub, newest)
    shutil.rmtree(tmp_path / "first")  # that machine is gone
    code, text = command(capsys, "train", *flags, "--run.output_dir", tmp_path / "other", "--resume", "hub")
    assert code == 0, text
    assert f"(step {others[0]})" in text
    weights = [load_file(run / "model/model.safetensors") for run in (alone, tmp_path / "other")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    text = write_columns(tmp_path / "words.conll", "validation", 1, tagged=False).read_text().replace("\n", " ")
    found, expected = (TokenClassifier.from_pretrained(str(name))(text) for name in (REPO, alone))
    assert found == expected != []
    card = hub.repo(REPO).read("README.md").decode()
    assert "pipeline_tag: token-classification" in card and "type: f1" in card


def test_predicting_needs_no_labels(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = {
        tagged: write_columns(tmp_path / f"{tagged}.conll", "validation", 9, tagged=tagged) for tagged in (True, False)
    }
    for name, path in (("predict", files[False]), ("predict", files[True]), ("evaluate", files[True])):
        model = alone if name == "predict" else alone / "model"  # either names it
        run = tmp_path / f"{name}-{path.stem}"
        code, text = command(capsys, name, "--model", model, "--data.validation_file", path, "--run.output_dir", run)
        assert code == 0, text
        assert (run / "metrics.json").exists() == (name == "evaluate")
    contents = {path.read_bytes() for path in tmp_path.glob("*/predictions.json")}
    assert len(contents) == 1
    predictions = json.loads(contents.pop())
    assert list(predictions) == [str(i) for i in range(9)]
    assert any(predictions.values())
    notes: list[str] = []
    story = read_run(tmp_path / f"predict-{files[True].stem}", notes.append)
    assert story.review is None and story.notes[0].startswith("Here are predictions alone")
    own = tmp_path / f"evaluate-{files[True].stem}"
    flags = ("--task", "token_classification", "--data.validation_file", files[True])
    code, text = command(capsys, "score", *flags, "--predictions", own / "predictions.json")
    assert code == 0, text
    figures, metrics = json.loads(text), json.loads((own / "metrics.json").read_text())
    assert figures == {name: metrics[name] for name in figures} and figures["recall"] > 0


def test_preparing_shows_the_entities(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = flags_of(tmp_path / "cache")
    code, text = command(capsys, "prepare", *flags)
    assert code == 0, text
    words = sum(len(e.words) for e in synthetic.generate(SyntheticConfig(train_examples=60, long_share=0.3), "train"))
    assert f"{words:,}" in text
    assert "organisation" in text
    assert list((tmp_path / "cache").glob("*.arrow"))


def test_the_report_of_a_run(alone: Path, tmp_path: Path):
    notes: list[str] = []
    page = Path(write_report(alone, tmp_path / "report.html", None, notes.append)).read_text()
    assert "Figures by type" in page and "organisation" in page
    assert ">Tables</h2>" in page and ">Confidence<" not in page  # there is none in whole sentences
    story = read_run(alone, notes.append)
    assert story.review is not None
    assert not [note for note in story.notes if "not of the same" in note or "cannot be" in note]
    assert len(story.review.examples) == 21
    metrics = json.loads((alone / "metrics.json").read_text())
    (all_types,) = [row for row in story.review.tables[1].rows if row[0] == "all"]
    assert all_types[3:] == pytest.approx([metrics[name] for name in ("precision", "recall", "f1")])
    marks = [mark for example in story.review.examples for mark in example.marks]
    assert {mark.label for mark in marks if mark.kind == "gold"} == {"person", "place", "organisation"}


def test_the_page_of_the_report(alone: Path, tmp_path: Path):
    path = write_report(alone, tmp_path / "report.html", None, print)
    with browser_page() as (page, problems):
        page.goto(Path(path).resolve().as_uri())
        header = page.locator("#table thead th")
        page.locator("#table tbody tr").first.wait_for()
        assert [text.strip() for text in header.all_inner_texts()][-2:] == ["F1 of the sentence", "words"]
        assert "probability" not in page.locator("#sort").inner_text()  # sentences have none
        styles = page.locator("figure[data-chart=scores] .plot path.line").evaluate_all(
            "lines => lines.map(line => getComputedStyle(line).stroke)"
        )
        assert len(styles) == len(set(styles)) == 4  # precision, recall, F1 and accuracy are told apart
        page.fill("#query", "synthetic-validation-000000")
        page.locator("#table tbody button.open").click()
        (example, *_) = synthetic.generate(SyntheticConfig(validation_examples=21, long_share=0.3), "validation")
        text = page.locator("#table tbody .detail").inner_text()
        assert "organisation" in text and " ".join(example.words[:3]) in text
        assert problems == []


def test_the_model_card_says_how_to_use_the_model(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    text = model_card(alone, "user/toy")
    assert "pipeline_tag: token-classification" in text
    assert "- precision" in text and "type: f1" in text
    blocks = [code.replace("user/toy", str(alone / "model")) for code in re.findall(r"```python\n(.*?)```", text, re.S)]
    ours, theirs = ({}, {})
    exec(blocks[0], ours)
    exec(blocks[1], theirs)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) % 2 == 0 and lines[: len(lines) // 2] == lines[len(lines) // 2 :] != []
    words = [word for example in synthetic.generate(SyntheticConfig(), "validation")[:60] for word in example.words]
    long = " ".join(words)  # more than the model has positions for
    same = {(one["start"], one["end"], one["entity_group"]) for one in theirs["tag"](long)}
    found = {(one["start"], one["end"], one["entity_group"]) for one in ours["classifier"](long)}
    assert len(words) > 512 and len(same & found) > 0.8 * len(found)  # of two windows transformers keeps another word
    tokenizer = AutoTokenizer.from_pretrained(alone / "model")
    assert tokenizer.model_max_length == 128  # the model's positions, though the tokenizer was made for no model
    (alone / "config.yaml").rename(tmp_path / "config.yaml")
    try:
        assert "pipeline_tag: token-classification" in model_card(alone, "user/toy")  # what is stored with the model
    finally:
        (tmp_path / "config.yaml").rename(alone / "config.yaml")


@pytest.mark.parametrize("recipe", ["bert_base_conll2003", "minilm_wnut17"])
def test_recipes_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str):
    """On a small model and few sentences: that their numbers are right is not seen here."""
    data = write_columns(tmp_path / "data.conll", "train")
    tokenizer = wordpiece_tokenizer([data.read_text().replace("\t", " ")])
    sizes = SIZES | {"max_position_embeddings": 512}
    config = AutoConfig.for_model("bert", **sizes, vocab_size=len(tokenizer))
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = {
        "config": ROOT / f"configs/{recipe}.yaml",
        "data.dataset": "none",
        "data.train_file": data,
        "data.validation_file": data,
        "data.cache_dir": tmp_path / "cache",
        "model.name": tmp_path / "model",
        "train.epochs": 1,
        "run.output_dir": tmp_path / "run",
    }
    code, text = command(capsys, "train", *(f"--{name}={value}" for name, value in flags.items()))
    assert code == 0, text
    assert json.loads((tmp_path / "run/metrics.json").read_text())["loss"] > 0


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        ("Ada B-PER\nlives\n", [], "train.conll:2 has 1"),
        ("Ada B-PER\nlives E-PER\n", [], "'E-PER' at "),
        (
            "Ada B-PER\n",
            ["--data.unanswerable", "allow"],
            "data.unanswerable: is for question_answering, and the task is",
        ),
        ("Ada B-PER\n", ["--data.labels", "O"], "labels that are not among those to be told apart: 'B-PER' ("),
        ("Ada B-PER\n" * 60, ["--data.stride", "47"], "data.stride: 47 tokens"),
        (
            "Ada B-PER\n",
            ["--task", "question_answering", "--data.labels", "O"],
            "data.labels: is for token_classification",
        ),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, flags: list[str], expected: str
):
    path = tmp_path / "train.conll"
    path.write_text(content)
    own = flags_of(tmp_path / "cache")
    kept = [pair for pair in zip(own[::2], own[1::2], strict=True) if not pair[0].startswith("--data.synthetic")]
    arguments = [part for pair in kept for part in pair]
    run = tmp_path / "run"
    code, text = command(capsys, "train", *arguments, "--data.train_file", path, "--run.output_dir", run, *flags)
    assert code == 2
    assert expected in text
