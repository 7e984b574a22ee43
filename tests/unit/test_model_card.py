"""The model card is what the run directory says: all of it that is public, nothing that is private."""

import io
import json
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_dist import QuestionAnswerer
from qa_dist.config import RunConfig, SyntheticConfig
from qa_dist.config_sources import to_yaml
from qa_dist.reporting.model_card import CURVES, base_model, curves, model_card
from qa_dist.tasks.question_answering import synthetic
from qa_dist.tasks.question_answering.decoding import decode
from qa_dist.tasks.question_answering.task import QuestionAnswering
from tests.helpers import SIZES, features_of
from tests.tokenizers import roberta_tokenizer, wordpiece_tokenizer, xlnet_tokenizer

FILES = ("config.yaml", "metrics.json", "metrics.jsonl", "status.json", "environment.json")
HISTORY = [
    {"epoch": 1, "step": 20, "train_loss": 2.5, "exact_match": 61.25, "f1": 70.5, "loss": 1.75},
    {"epoch": 2, "step": 40, "train_loss": 1.125, "exact_match": 73.0625, "f1": 81.4, "loss": 0.9375},
]
METRICS = {"epoch": 2, "exact_match": 73.0625, "f1": 81.4, "loss": 0.9375, "history": HISTORY, "train_seconds": 90.0}
ENVIRONMENT = {
    "launch": "DeepSpeed ZeRO-2, float32, 2 processes on cpu",
    "hardware": ["8 cores, 32 GiB of memory, Linux", "2 x NVIDIA H200"],
    "software": {"Python": "3.11.2", "torch": "2.13.0"},
}
CONFIG = {
    "data": {"train_file": ["train.json"], "validation_file": ["dev.json"]},
    "model": {"name": "google-bert/bert-base-cased"},
    "train": {"learning_rate": 3e-5, "seed": 17},
}


def write_run(run: Path, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run directory. `changes`: content of metrics, history (of metrics.jsonl), status or environment; None for no
    such file."""
    contents = {"metrics": METRICS, "history": HISTORY, "environment": ENVIRONMENT, "status": {"step": 40}} | changes
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(RunConfig.model_validate(config or CONFIG)), encoding="utf-8")
    for name in ("metrics", "status", "environment"):
        if contents[name] is not None:
            (run / f"{name}.json").write_text(json.dumps(contents[name]))
    if contents["history"] is not None:
        lines: list[dict[str, Any]] = [{"kind": "train", "step": step, "loss": 4 / step} for step in range(1, 41)]
        lines += [{"kind": "evaluation", **row} for row in contents["history"]] + [{"kind": "other", "step": 3}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@contextmanager
def temporary_run(config: dict[str, Any] | None = None, **changes: Any) -> Iterator[Path]:
    """For hypothesis, which asks for many in one test."""
    with tempfile.TemporaryDirectory() as directory:
        yield write_run(Path(directory), config, **changes)


def with_data(**data: Any) -> dict[str, Any]:
    return CONFIG | {"data": data}


def metadata(content: str) -> Any:
    return ModelCard(content).data


def results(content: str) -> list[EvalResult]:
    return metadata(content).eval_results or []


def rendered(content: str) -> list[Token]:
    """The body as Markdown's tokens, one after the other."""
    blocks = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(content).text)
    return [token for block in blocks for token in (block, *(block.children or ()))]


def tables(content: str) -> list[list[list[str]]]:
    """The texts of all tables: rows of cells, the header first."""
    found: list[list[list[str]]] = []
    tokens = rendered(content)
    for token, inside in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open") and inside:
            found[-1][-1].append("".join(child.content for child in inside.children or ()))
    return found


def table(content: str, *header: str) -> list[list[str]]:
    """The rows of the table with this header."""
    return next(rows[1:] for rows in tables(content) if rows[0] == list(header))


# ----------------------------------------------------------------------------------------------- what it says


def test_metadata_are_those_of_the_run(run: Path):
    data = metadata(model_card(run, "me/demo", license="apache-2.0"))
    what: Any = {"task_type": "question-answering", "dataset_type": "dev", "dataset_name": "dev.json"}
    what["dataset_split"] = "validation"
    assert data.eval_results == [
        EvalResult(**what, metric_type="exact_match", metric_name="EM", metric_value=73.0625),
        EvalResult(**what, metric_type="f1", metric_name="F1", metric_value=81.4),
    ]
    assert {name: value for name, value in data.to_dict().items() if name != "model-index"} == {
        "base_model": "google-bert/bert-base-cased",
        "library_name": "transformers",
        "license": "apache-2.0",
        "metrics": ["exact_match", "f1"],
        "pipeline_tag": "question-answering",
        "tags": ["qa_dist", "extractive-qa"],
    }
    assert data.model_name == "demo"
    for license, shown in ((None, "unknown"), (" ", "unknown"), ("mit\n", "mit")):
        assert metadata(model_card(run, "me/demo", license=license)).license == shown


def test_the_body_has_figures_epochs_settings_and_what_they_ran_on(run: Path):
    content = model_card(run, "me/demo")
    assert table(content, "EM", "F1", "validation loss") == [["73.062", "81.400", "0.938"]]
    epochs = table(content, "epoch", "step", "train loss", "EM", "F1", "validation loss")
    assert epochs[0] == ["1", "20", "2.500", "61.250", "70.500", "1.750"]
    assert epochs[1] == ["2", "40", "1.125", "73.062", "81.400", "0.938"]
    assert "| **2** | 40 |" in content
    assert "| 1 | 20 |" in content
    shown = dict(table(content, "setting", "value"))
    assert (shown["train.learning_rate"], shown["train.seed"], shown["data.max_length"]) == ("3e-05", "17", "384")
    for line in (
        "- Weights: epoch 2, step 40\n",
        "- Launch: DeepSpeed ZeRO-2, float32, 2 processes on cpu\n",
        "- Hardware: 8 cores, 32 GiB of memory, Linux; 2 x NVIDIA H200\n",
        "- Software: Python 3.11.2, torch 2.13.0\n",
        "- Time in training steps: 1.5 min\n",
        "- Training: train.json\n- Validation: dev.json\n",
        "Fine-tuned from [google-bert/bert-base-cased](https://huggingface.co/google-bert/bert-base-cased)",
        "qa-dist evaluate --model me/demo --data.validation_file FILE --run.output_dir OUT\n",
        "--resume hub:me/demo\n",
        f"]({CURVES})",
    ):
        assert line in content


def test_settings_are_told_if_they_matter_or_differ(tmp_path: Path):
    def shown(**changes: dict[str, Any]) -> dict[str, str]:
        return dict(table(model_card(write_run(tmp_path, CONFIG | changes), "me/demo"), "setting", "value"))

    plain = shown()
    assert "train.compile" not in plain
    assert "data.unanswerable" not in plain
    assert plain["train.global_batch_size"] == "32"
    changed = shown(train={"compile": True, "tokens_per_batch": 9000}, evaluation={"max_answer_length": 5})
    assert changed["train.compile"] == "true"
    assert changed["train.tokens_per_batch"] == "9000"
    assert changed["evaluation.max_answer_length"] == "5"
    assert "train.global_batch_size" not in changed  # tokens_per_batch has taken its place


def test_all_figures_of_squad_2_are_in_a_table_of_their_own(run: Path):
    more = {"exact": 73.0625, "total": 13, "HasAns_f1": 60.5, "NoAns_exact": 90.0, "best_f1_thresh": -1.5}
    write_run(run, metrics=METRICS | more)
    content = model_card(run, "me/demo")
    expected = [["exact", "73.062"], ["total", "13"], ["HasAns_f1", "60.500"], ["NoAns_exact", "90.000"]]
    assert table(content, "figure", "value") == [*expected, ["best_f1_thresh", "-1.500"]]
    assert [result.metric_type for result in results(content)] == ["exact_match", "f1"]


def test_a_run_without_validation_has_no_figures(tmp_path: Path):
    history = [{"epoch": 1, "step": 20, "train_loss": 2.5}]
    run = write_run(tmp_path, metrics={"epoch": 1, "history": history}, history=history)
    content = model_card(run, "me/demo")
    assert results(content) == []
    assert "model-index" not in content
    assert table(content, "epoch", "step", "train loss") == [["1", "20", "2.500"]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "81.4", True, [1.0], 10**400])
def test_what_is_no_figure_is_left_out_of_the_metadata(tmp_path: Path, value: Any):
    run = write_run(tmp_path, metrics=METRICS | {"f1": value})
    assert [(r.metric_type, r.metric_value) for r in results(model_card(run, "me/demo"))] == [("exact_match", 73.0625)]


def test_where_there_are_no_metrics_yet_the_epochs_come_from_the_lines(run: Path):
    (run / "metrics.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "evaluation", "step": 60, "epo')  # being written
    content = model_card(run, "me/demo")
    epochs = table(content, "epoch", "step", "train loss", "EM", "F1", "validation loss")
    assert [row[:2] for row in epochs] == [["1", "20"], ["2", "40"]]
    assert results(content) == []  # of which epoch the weights are is not known


def test_without_an_environment_the_launch_is_that_of_the_status(tmp_path: Path):
    content = model_card(write_run(tmp_path, environment=None, status={"launch": "DDP, bf16"}), "me/demo")
    assert "- Launch: DDP, bf16\n" in content
    assert "Hardware" not in content
    environment = {"hardware": [1, "y" * 1000], "software": {"torch": None, "Python": "3.11"}}
    content = model_card(write_run(tmp_path, environment=environment), "me/demo")
    assert f"- Hardware: {'y' * 200}\n- Software: Python 3.11\n" in content


def test_the_same_files_give_the_same_card_anywhere(run: Path, tmp_path: Path, monkeypatch):
    card, image = model_card(run, "me/demo"), curves(run)
    shutil.copytree(run, tmp_path / "elsewhere" / "copy")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert model_card(Path("copy"), "me/demo") == card
    assert curves(Path("copy")) == image


def test_the_name_of_the_repository_has_to_be_one(run: Path):
    with pytest.raises(ValueError, match="Repo id"):
        model_card(run, 'me/demo"\nx: y')


# ------------------------------------------------------------------------------------- models and data sets


@pytest.mark.parametrize("name", ["bert-base-cased", "google-bert/bert-base-cased"])
def test_a_model_of_the_hub_is_named_as_the_base(tmp_path: Path, name: str):
    run = write_run(tmp_path / "run", CONFIG | {"model": {"name": name}})
    assert base_model(run) == name
    assert metadata(model_card(run, "me/demo")).base_model == name
    assert f"Fine-tuned from [{name}](https://huggingface.co/{name})" in model_card(run, "me/demo")
    assert metadata(model_card(run, name)).base_model is None  # a model is not its own base


NO_MODELS = ["./bert", "../bert", "/srv/bert", "~/bert", "a/b/c", "v1.2/bert", "models/mine", "a--b", "modèle", ""]


@pytest.mark.parametrize("name", [*NO_MODELS, None])
def test_no_other_model_is_named_as_the_base(tmp_path: Path, monkeypatch, name: str | None):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    model = {"config": {"model_type": "x"}} if name is None else {"name": name}
    run = write_run(tmp_path / "run", CONFIG | {"model": model})
    content = model_card(run, "me/demo")
    assert base_model(run) is None
    assert metadata(content).base_model is None
    assert "https://" not in content
    assert ("Trained from scratch (x)" in content) == (name is None)


SQUAD = "rajpurkar/squad"


@pytest.mark.parametrize(
    ("data", "dataset_type", "name", "split", "dataset_config"),
    [
        ({"dataset": SQUAD}, SQUAD, SQUAD, "validation", None),
        ({"dataset": "squad", "dataset_config": "de"}, "squad", "squad", "validation", "de"),
        ({"dataset": SQUAD, "validation_split": "test"}, SQUAD, SQUAD, "test", None),
        ({"dataset": SQUAD, "validation_share": 0.1}, SQUAD, SQUAD, "train", None),
        (
            {"dataset": "/srv/my data/", "dataset_config": "\x07", "validation_split": None},
            "my-data",
            "my data",
            "validation",
            None,
        ),
        ({"dataset": "C:\\data\\mine"}, "mine", "mine", "validation", None),
        ({"synthetic": {"seed": 3}}, "synthetic", "synthetic", "validation", None),
        ({"validation_file": ["d/(Dev)-v1.1.json.gz"]}, "dev-v1.1", "(Dev)-v1.1.json.gz", "validation", None),
        ({"validation_file": ["d/2e5.json"]}, "data-2e5", "2e5.json", "validation", None),
        ({"validation_file": ["東京.json"]}, "data", "東京.json", "validation", None),
        ({"validation_file": ["d/*.json", "e/b.csv"]}, "data", "*.json, b.csv", "validation", None),
        ({"train_file": ["a/t.json"], "validation_share": 0.1}, "t", "t.json", "validation", None),
        ({"validation_file": ["s3://key:secret@host/x.json?token=t"]}, "x", "x.json", "validation", None),
        ({"validation_file": ["/home/alice"]}, "unnamed", "unnamed", "validation", None),
        ({"validation_file": ["~alice/"]}, "unnamed", "unnamed", "validation", None),
        ({"validation_file": [".."]}, "unnamed", "unnamed", "validation", None),
    ],
)
def test_data_sets_have_a_name_and_a_type_as_the_hub_wants_it(
    tmp_path: Path, data: dict[str, Any], dataset_type: str, name: str, split: str, dataset_config: str | None
):
    content = model_card(write_run(tmp_path, with_data(**data)), "me/demo")
    for result in results(content):
        found = (result.dataset_type, result.dataset_name, result.dataset_split, result.dataset_config)
        assert found == (dataset_type, name, split, dataset_config)
        assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", dataset_type, re.ASCII)
    assert len(results(content)) == 2
    assert metadata(content).datasets == ([dataset_type] if data.get("dataset") in (SQUAD, "squad") else None)


def test_the_data_section_names_splits_and_shares(tmp_path: Path):
    def section(**data: Any) -> str:
        return model_card(write_run(tmp_path, with_data(**data)), "me/demo").split("## Data\n\n")[1].split("\n\n## ")[0]

    link = "[rajpurkar/squad](https://huggingface.co/datasets/rajpurkar/squad)"
    assert section(dataset=SQUAD) == f"- Training: {link}, split train\n- Validation: {link}, split validation"
    many = section(train_file=[f"x/{i}.json" for i in range(9)], validation_share=0.25)
    assert many.startswith(
        "- Training: 0.json, 1.json, 2.json, 3.json, 4.json and 4 more\n- Validation: a share of 0.25 "
    )
    assert "seed 3: 6000 examples" in section(synthetic={"seed": 3})


# ------------------------------------------------------------------------------- private and untrusted texts


def test_nothing_private_is_told(tmp_path: Path):
    home = "/home/alice/secret-project"
    config = {
        "data": {
            "train_file": [f"{home}/train.json", "C:\\Users\\alice\\more.json"],
            "validation_file": ["hf://alice:hf_secret@host-17/dev.json?token=hf_secret"],
            "cache_dir": f"{home}/cache",
            "columns": {"context": "alice_column"},
        },
        "model": {"name": f"{home}/models/mine", "tokenizer": f"{home}/tokenizer"},
        "run": {"name": "alice-run", "output_dir": f"{home}/runs/1"},
    }
    status = {"host": "host-17", "pid": 424242, "reason": f"{home}: hf_secret", "run": "id-of-alice", "launch": "DDP"}
    run = write_run(tmp_path / "alice", config, status=status, environment=None)
    content = model_card(run, "me/demo")
    for private in (
        "alice",
        "secret",
        "/home",
        "Users",
        "host-17",
        "424242",
        "hf_",
        str(tmp_path),
        "cache",
        "tokenizer/",
    ):
        assert private not in content
    for public in ("train.json, more.json", "dev.json", "Fine-tuned from mine", "- Launch: DDP\n"):
        assert public in content


NASTY = "ab1 |\\`*_[]()<>&~$@#!-+:'\"{}%?.,=^\t\n\r\u2028\u202e\x07é東"


def one_line(text: str) -> str:
    return " ".join(re.sub("[\\s\u202e\x07]", " ", text).split())


@given(st.text(NASTY, max_size=30), st.text(NASTY, max_size=30))
@example("~~a~~ **b** `c` [d](e) <i>", "|f \\| &amp; $g$ ~~h~~")
@settings(max_examples=150, deadline=None)
def test_names_are_shown_as_they_are_and_break_nothing(name: str, other: str):
    name, other = f"x{name}.json", f"y{other}"
    environment = {"launch": other, "hardware": [name, other], "software": {other: name}}
    config = with_data(train_file=[other], validation_file=[name], dataset_config=other)
    with temporary_run(config, environment=environment, metrics=METRICS | {other: 1.5}) as run:
        content = model_card(run, "me/demo")
    shown = one_line(name.split("\\")[-1])
    shown = "unnamed" if shown.startswith("~") else shown
    assert [(result.metric_value, result.dataset_name) for result in results(content)] == [
        (73.0625, shown),
        (81.4, shown),
    ]
    assert table(content, "figure", "value") == [[one_line(other), "1.500"]]
    tokens = rendered(content)
    texts = "".join(token.content for token in tokens if token.type in ("text", "text_special"))
    for text in (
        f"On {shown} (validation), ",
        f"Launch: {one_line(other)}Hardware: {one_line(name)}; {one_line(other)}",
    ):
        assert text in texts
    assert not any(token.type.startswith(("html", "em_", "s_", "blockquote", "code_block")) for token in tokens)
    assert sum(token.type == "link_open" for token in tokens) == 1  # the base model


TEXT = st.text().map("x{}".format)


@given(TEXT, TEXT, st.text())
@settings(max_examples=150, deadline=None)
def test_any_text_leaves_metadata_that_can_be_read(name: str, split: str, license: str):
    config = with_data(dataset=name, dataset_config=split, validation_split=split)
    config["model"] = {"config": {"model_type": name}}
    config["run"] = {"name": split}
    with temporary_run(config, status={"launch": name}, environment=None) as run:
        content = model_card(run, "me/demo", license=license)
    content.encode()
    assert metadata(content).license
    assert [result.metric_value for result in results(content)] == [73.0625, 81.4]
    assert all(re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", r.dataset_type, re.ASCII) for r in results(content))
    assert all(len({len(row) for row in rows}) == 1 for rows in tables(content))


# ------------------------------------------------------------------------------------------- damaged files

OTHER_TYPES = """{"launch": ["x"], "hardware": {"a": 1}, "software": ["x", 3], "f1": {"a": []}, "epoch": [],
"train_seconds": "long", "history": [1, null, {"epoch": "1", "step": []}, {"epoch": true, "step": 1}, {"epoch": -1}]}"""
HALVES = '{"launch": "\\ud800", "f1": 1, "history": [{"epoch": 1, "step": 1, "\\udfff": 2}]}'
WRONG_LINES = """{"kind": "train", "step": [1], "loss": 1}\n{"kind": "train", "step": 1, "loss": "x"}\n5\n{"kind": []}
{"kind": "train", "step": 2, "loss": NaN}\n{"kind": "train", "step": 3, "loss": 1e300}\n"""
DAMAGE = {
    "empty": b"",
    "cut off": b'{"epoch": 2, "f1": 81.4, "history": [{"epoch": 1, "step"',
    "a list": b"[1, 2]",
    "not text": bytes(range(256)),
    "too deep": b"[" * 100_000,
    "deep yaml": b"data: " + b"{a: " * 5_000,
    "too long a number": b'{"epoch": ' + b"9" * 5_000 + b"}",
    "halves of characters": HALVES.encode(),
    "other types": OTHER_TYPES.encode(),
    "wrong lines": WRONG_LINES.encode(),
    "half a config": b"task: question_answering\ndata:\n  train_file: [a.json]\ntrain:\n  epochs: 3\n",
    "an unknown setting": b"data: {}\nmodel: {}\ntrain: {epocs: 3}\nevaluation: {}\nrun: {}\n",
    "sections that are none": b"data: 1\nmodel: []\ntrain: x\nevaluation: null\nrun: 2\n",
}


@pytest.mark.parametrize("name", [*FILES, "all"])
@pytest.mark.parametrize("damage", [*DAMAGE, "missing", "a directory"])
def test_damaged_files_make_the_card_shorter(run: Path, name: str, damage: str):
    whole = model_card(run, "me/demo")
    for path in [run / one for one in (FILES if name == "all" else (name,))]:
        path.unlink()
        if damage == "a directory":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes(DAMAGE[damage])
    content = model_card(run, "me/demo")
    content.encode()
    assert metadata(content).pipeline_tag == "question-answering"
    assert "## Use" in content
    assert len(content) <= len(whole) + 50
    if name in ("config.yaml", "all"):
        assert "setting" not in content  # not the defaults
        assert results(content) == []
    elif name != "metrics.json":
        assert len(results(content)) == 2
    image = curves(run)
    assert (CURVES in content) == (image is not None)
    if name == "all" and damage in ("missing", "empty", "cut off", "wrong lines"):
        assert image is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([*METRICS, *ENVIRONMENT, "kind", "step", "loss", "train_loss"])


@given(st.dictionaries(KEYS, JSON), st.lists(st.dictionaries(KEYS, JSON)), st.dictionaries(KEYS, JSON))
@settings(max_examples=150, deadline=None)
def test_no_json_is_too_strange(metrics: dict[str, Any], history: list[dict[str, Any]], other: dict[str, Any]):
    with temporary_run(metrics=METRICS | metrics, history=history, environment=other, status=other) as run:
        content = model_card(run, "me/demo")
    content.encode()
    expected = METRICS | metrics
    assert all(result.metric_value == expected[result.metric_type] for result in results(content))


# ------------------------------------------------------------------------------------------------- the plot


def image_of(content: bytes | None) -> np.ndarray:
    """Pixels, [height, width, 3]."""
    assert content is not None
    assert len(content) < 100_000
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert image.info.keys() <= {"dpi"}  # neither version nor date
        return np.asarray(image.convert("RGB"))


def drawn(pixels: np.ndarray) -> list[bool]:
    """Whether there is a curve of training loss, validation loss, EM and F1."""
    colors = ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xAA, 0x44, 0x99))
    return [bool((pixels == color).all(axis=2).sum() > 20) for color in colors]


def test_the_plot_shows_losses_and_scores(run: Path):
    pixels = image_of(curves(run))
    height, width, _ = pixels.shape
    assert height > 300
    assert width > 2 * height
    assert drawn(pixels[:, : width // 2]) == [True, True, False, False]
    assert drawn(pixels[:, width // 2 :]) == [False, False, True, True]

    write_run(run, metrics=METRICS | {"history": []})
    losses = image_of(curves(run))
    assert (losses.shape[1], drawn(losses)) == (width // 2, [True, False, False, False])
    (run / "metrics.jsonl").unlink()
    write_run(run, metrics=METRICS | {"history": [row | {"loss": None} for row in HISTORY]}, history=None)
    scores = image_of(curves(run))
    assert (scores.shape[1], drawn(scores)) == (width // 2, [False, False, True, True])


def test_long_runs_have_small_plots_too(run: Path):
    losses = np.random.default_rng(0).uniform(0, 4, 30_000).tolist()
    lines = [json.dumps({"kind": "train", "step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert drawn(image_of(curves(run)))[0]


def test_the_plot_can_be_made_in_a_thread_whatever_the_settings_of_matplotlib(run: Path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # cannot be imported
    expected, images = curves(run), []
    with matplotlib.rc_context({"lines.linewidth": 9, "savefig.dpi": 20, "axes.facecolor": "red", "text.usetex": True}):
        thread = threading.Thread(target=lambda: images.append(curves(run)))
        thread.start()
        thread.join()
        assert matplotlib.rcParams["lines.linewidth"] == 9
    assert images == [expected]


# ------------------------------------------------------------------------------------------------ the usage

EXAMPLES = synthetic.generate(SyntheticConfig(train_examples=12, long_share=0.5, seed=3), "train")
MODELS: dict[str, Any] = {
    "bert": (wordpiece_tokenizer, SIZES),
    "roberta": (roberta_tokenizer, SIZES | {"pad_token_id": 1}),
    "xlnet": (xlnet_tokenizer, {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
}


@pytest.mark.parametrize("unanswerable", ["error", "allow"])
@pytest.mark.parametrize("family", MODELS)
def test_the_usage_gives_the_answers_that_the_evaluation_finds(tmp_path: Path, family: str, unanswerable: str):
    make, sizes = MODELS[family]
    tokenizer = make(synthetic.texts(EXAMPLES))
    model_config = AutoConfig.for_model(family, vocab_size=len(tokenizer), initializer_range=1.0, **sizes)
    torch.manual_seed(5)
    model = AutoModelForQuestionAnswering.from_config(model_config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    features = features_of(EXAMPLES, tokenizer, tokenizer.padding_side, max_length=72, stride=20)
    assert len(features) > len(EXAMPLES)  # several windows of some
    batch = features.collate(np.arange(len(features)))
    with torch.no_grad():
        output = model(**batch.inputs)
    task: Any = object.__new__(QuestionAnswering)
    task.config = RunConfig.model_validate({"evaluation": {"n_best": 72}})
    outputs = {name: tensor.numpy() for name, tensor in task.outputs(output, batch).items()}
    answers = decode(outputs, features, len(EXAMPLES), n_best=1, max_answer_length=6)
    odds = answers.null_score - answers.score
    threshold = float(np.sort(odds)[[5, 6]].mean())  # between the two in the middle
    spans = zip(EXAMPLES, answers.start_char, answers.end_char, odds > threshold, strict=True)
    none = unanswerable == "allow"
    expected = ["" if none and is_none else e.context[start:end].strip() for e, start, end, is_none in spans]

    config = CONFIG | {
        "data": {"max_length": 72, "stride": 20, "unanswerable": unanswerable},
        "evaluation": {"max_answer_length": 6, "null_score_diff_threshold": threshold},
    }
    content = model_card(write_run(tmp_path / "run", config), "me/demo")
    blocks = [
        code.replace('"me/demo"', repr(str(tmp_path / "model")))
        for code in re.findall(r"```python\n(.*?)```", content, re.DOTALL)
    ]
    assert [code.count(str(tmp_path / "model")) for code in blocks] == [1, 2]
    names: dict[str, Any] = {}
    exec(blocks[1], names)
    found = [names["answer"](example.question, example.context) for example in EXAMPLES]
    assert found == expected
    carried = {"data.max_length": 72, "data.stride": 20, "evaluation.max_answer_length": 6, "evaluation.n_best": 72}
    settings = {"task": "question_answering", "data.unanswerable": unanswerable, **carried}
    (tmp_path / "model/qa_dist.json").write_text(json.dumps({"schema_version": 1, "settings": settings}))
    exec(blocks[0], names)
    assert f"`no_answer_threshold={threshold}` is the evaluation's" in content or not none
    answerer = QuestionAnswerer.from_pretrained(
        str(tmp_path / "model"), device="cpu", no_answer_threshold=threshold if none else None
    )
    assert [own["answer"] for own in answerer([(one.question, one.context) for one in EXAMPLES])] == expected
    assert len(set(found)) > 3
    assert ("" in found) == none
