"""The command line as a user types it, from data to a model that transformers loads."""

import json
import os
import re
import shlex
import signal
import string
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering import synthetic
from tests.helpers import FORK_SERVER, ROOT, SHARED, Launcher, environment, jsonl, squad, tiny_flags


def write_corpus(path: Path, count: int, split: str, seed: int = 0) -> Path:
    """A file in SQuAD's form."""
    config = SyntheticConfig(train_examples=count, validation_examples=count, seed=seed)
    examples = [
        {
            "id": e.id,
            "question": e.question,
            "context": e.context,
            "answers": [{"text": t, "answer_start": s} for t, s in zip(e.answers, e.answer_starts, strict=True)],
        }
        for e in synthetic.generate(config, split)
    ]
    path.write_text(json.dumps(squad(examples)))
    return path


def official(dataset: Path, predictions: Path) -> dict[str, float]:
    """SQuAD 1.1's figures, computed from the two files alone."""

    def words(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def overlap(a: list[str], b: list[str]) -> float:
        same = sum((Counter(a) & Counter(b)).values())
        return 0.0 if not same else 2 * same / (len(a) + len(b))

    guesses = json.loads(predictions.read_text())
    exact = f1 = total = 0
    for article in json.loads(dataset.read_text())["data"]:
        for question in (q for p in article["paragraphs"] for q in p["qas"]):
            guess = words(guesses[question["id"]])
            golds = [words(answer["text"]) for answer in question["answers"]]
            exact += any(guess == gold for gold in golds)
            f1 += max(overlap(guess, gold) for gold in golds)
            total += 1
    return {"exact_match": 100 * exact / total, "f1": 100 * f1 / total}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two processes, from files."""
    directory = tmp_path_factory.mktemp("run")
    train = write_corpus(directory / "train.json", 60, "train")
    validation = write_corpus(directory / "validation.json", 21, "validation")
    flags = tiny_flags(
        **{
            "data.synthetic.train_examples": "",
            "data.synthetic.validation_examples": "",
            "data.synthetic.long_share": "",
            "data.train_file": str(train),
            "data.validation_file": str(validation),
            "evaluation.at_start": "true",
        }
    )
    launch = Launcher(directory).train("zero2", 2, directory / "run", *flags)
    assert launch.code == 0, launch.output
    (directory / "output.txt").write_text(launch.output)
    return directory / "run"


def test_files_of_a_run(run: Path):
    assert {path.name for path in run.iterdir()} == {
        *(
            "checkpoints",
            "config.yaml",
            "environment.json",
            "predictions_summary.json",
            "metrics.json",
            "metrics.jsonl",
            "model",
            "nbest_predictions.json",
            "predictions.json",
        ),
        *("status.json", "tensorboard", ".lock"),
    }
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["reason"]) == ("completed", 0, "")
    lines = jsonl(run / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, status["step"] + 1))
    assert {"loss", "learning_rate", "grad_norm", "samples_per_second", "epoch"} <= lines[-2].keys()
    metrics = json.loads((run / "metrics.json").read_text())
    assert [row["epoch"] for row in metrics["history"]] == [0, 1, 2]
    assert metrics["epoch"] == 2
    assert metrics["train_seconds"] > 0
    last = metrics["history"][-1]
    assert {name: metrics[name] for name in ("exact_match", "f1", "loss")} == {
        name: last[name] for name in ("exact_match", "f1", "loss")
    }


def test_figures_equal_the_official_ones(run: Path):
    metrics = json.loads((run / "metrics.json").read_text())
    expected = official(run.parent / "validation.json", run / "predictions.json")
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_n_best_agrees_with_the_predictions(run: Path):
    predictions = json.loads((run / "predictions.json").read_text())
    n_best = json.loads((run / "nbest_predictions.json").read_text())
    assert list(n_best) == list(predictions)
    for example_id, entries in n_best.items():
        assert entries[0]["text"] == predictions[example_id]
        assert sum(entry["probability"] for entry in entries) == pytest.approx(1)
        assert [e["score"] for e in entries] == sorted((e["score"] for e in entries), reverse=True)


def test_tensorboard_holds_the_curves(run: Path):
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "evaluation/exact_match", "evaluation/f1", "evaluation/loss"} <= tags
    assert events.Scalars("evaluation/f1")[0].step == 0


def test_what_a_person_sees(run: Path):
    output = (run.parent / "output.txt").read_text()
    assert "DeepSpeed ZeRO-2, float32, 2 processes on cpu" in output
    assert output.count("DeepSpeed ZeRO-2") == 1  # the main process alone speaks
    assert "samples/s" in output
    assert "train loss" in output
    assert output.count("WARNING") <= 1  # the launcher's own, before any of our code runs
    for noise in ("Traceback", "FutureWarning", "built successfully"):
        assert noise not in output


def test_transformers_loads_the_model(run: Path):
    model, info = AutoModelForQuestionAnswering.from_pretrained(run / "model", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    output = model(**tokenizer("Who?", "Ada lives in Paris.", return_tensors="pt"))
    assert output.start_logits.isfinite().all()


def test_evaluation_gives_the_last_epochs_figures(run: Path, launcher: Launcher, tmp_path: Path):
    flags = ["--model", str(run / "model"), "--data.validation_file", str(run.parent / "validation.json")]
    launch = launcher.run("ddp", 1, "-m", "qa_dist", "evaluate", *flags, "--run.output_dir", str(tmp_path / "e"))
    assert launch.code == 0, launch.output
    assert (tmp_path / "e/predictions.json").read_bytes() == (run / "predictions.json").read_bytes()
    figures = json.loads((tmp_path / "e/metrics.json").read_text())
    trained = json.loads((run / "metrics.json").read_text())
    assert figures == {name: trained[name] for name in ("exact_match", "f1", "loss")}


def test_scoring_a_file_of_predictions(run: Path):
    def score(*flags: object) -> subprocess.CompletedProcess[str]:
        command = [FORK_SERVER.python, "-m", "qa_dist", "score", *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)

    data = ("--data.validation_file", run.parent / "validation.json")
    whole = score("--predictions", run / "predictions.json", *data)
    assert whole.returncode == 0, whole.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    assert json.loads(whole.stdout) == {name: metrics[name] for name in ("exact_match", "f1")}

    predictions = json.loads((run / "predictions.json").read_text())
    missing, *_ = predictions
    part = run.parent / "part.json"
    part.write_text(json.dumps({k: v for k, v in predictions.items() if k != missing} | {"stranger": "x"}))
    told = score("--predictions", part, *data)
    assert f"1 questions have no prediction and score 0 ({missing})" in told.stderr
    assert "1 predictions are for no question of these data (stranger)" in told.stderr
    assert json.loads(told.stdout)["f1"] <= metrics["f1"]


def test_a_finished_run_is_not_overwritten(run: Path, launcher: Launcher):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    launch = launcher.train("zero2", 2, run, *tiny_flags())
    assert launch.code == 1  # what launchers make of 2
    assert "holds another run (completed at step" in launch.output
    assert "qa_dist/cli.py" not in launch.output  # no traceback of ours
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_questions_without_an_answer(launcher: Launcher, tmp_path: Path):
    flags = tiny_flags(**{"data.synthetic.unanswerable_share": "0.5", "data.unanswerable": "allow"})
    launch = launcher.train("ddp", 2, tmp_path / "run", *flags)
    assert launch.code == 0, launch.output
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["HasAns_total"] + metrics["NoAns_total"] == metrics["total"] == 13
    assert metrics["exact"] == metrics["exact_match"]
    assert metrics["best_f1"] >= metrics["f1"]
    predictions, odds = (
        json.loads((tmp_path / "run" / name).read_text()) for name in ("predictions.json", "null_odds.json")
    )
    assert list(odds) == list(predictions)
    assert all((predictions[i] == "") == (odds[i] > 0) for i in odds)
    carried = json.loads((tmp_path / "run/model/qa_dist.json").read_text())
    assert carried["settings"]["data.unanswerable"] == "allow"
    assert isinstance(carried["findings"]["no_answer_threshold"], float)


def start_training(launcher: Launcher, engine: str, output_dir: Path) -> subprocess.Popen[str]:
    """A run on two processes that would go on for long, some steps after its start."""
    program = ["-m", "qa_dist", "train", "--run.output_dir", str(output_dir), *tiny_flags(**{"train.epochs": "2000"})]
    process = launcher.start(launcher.command(engine, 2, *program))
    metrics = output_dir / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and len(jsonl(metrics)) > 12) and time.monotonic() < deadline:
        time.sleep(0.2)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_on_all_ranks_and_keeps_the_weights(number: int, launcher: Launcher, tmp_path: Path):
    process = start_training(launcher, "zero2", tmp_path / "run")
    os.killpg(process.pid, number)  # as a terminal or a batch system does
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 128 + number), output
    assert status["step"] > 5
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run/model")
    assert f"stopped by signal {number}" in output
    again = next(line for line in output.splitlines() if "to resume: " in line).partition("to resume: ")[2]
    assert shlex.split(again) == [*map(str, process.args), "--resume", "auto"]  # pyright: ignore[reportArgumentType]
    assert f"checkpoint of step {status['step']}: {tmp_path}/run/checkpoints/step_" in output


@pytest.mark.parametrize("flags", [{"distributed_type": "MULTI_CPU"}, {"distributed_type": "NO"}])
def test_processes_that_would_train_apart_are_refused(flags: dict[str, str], launcher: Launcher, tmp_path: Path):
    launch = launcher.train("ddp", 2, tmp_path / "run", *tiny_flags(), **flags, main_process_port=29511)
    assert launch.code != 0
    assert "more processes were asked for, but this one was started alone" in launch.output
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_settings_is_told_whichever_process_ends_first(launcher: Launcher, tmp_path: Path):
    flags = tiny_flags(**{"train.global_batch_size": "0"})
    for _ in range(3):
        launch = launcher.train("ddp", 2, tmp_path / "run", *flags)
        assert launch.code == 1
        assert launch.output.count("train.global_batch_size: '0' is not valid") == 1


def test_a_killed_process_ends_the_run_with_a_reason(launcher: Launcher, tmp_path: Path):
    process = start_training(launcher, "ddp", tmp_path / "run")
    main = json.loads((tmp_path / "run/status.json").read_text())["pid"]
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    (other,) = (int(rank) for rank in ranks if int(rank) != main)
    os.kill(other, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1), output
    assert "another process of this run is gone" in status["reason"]
    assert status["step"] > 0


def test_an_error_on_the_main_process_ends_all_of_them(launcher: Launcher, tmp_path: Path):
    (tmp_path / "file").write_text("")
    launch = launcher.train("ddp", 2, tmp_path / "file" / "run", *tiny_flags(), timeout=60)
    assert launch.code == 1
    assert "cannot be written" in launch.output
    assert "qa_dist/cli.py" not in launch.output  # no rank died of another's end


def test_a_small_demo_answers_half_of_its_questions(launcher: Launcher, tmp_path: Path):
    """The demo's model, on fewer and shorter contexts. Without reading the question a model can choose one of the
    cities or years of a context, and is right about a quarter of the time."""
    fewer = {
        "data.synthetic.train_examples": "2000",
        "data.synthetic.validation_examples": "150",
        "data.synthetic.long_share": "0",
        "data.max_length": "96",
        "data.stride": "32",
        "train.global_batch_size": "8",
        "train.learning_rate": "2e-3",
        "train.epochs": "7",
    }
    flags = [part for key, value in fewer.items() for part in (f"--{key}", value)]
    launch = launcher.train("zero2", 2, tmp_path / "demo", "--config", "configs/demo.yaml", *flags, timeout=290)
    assert launch.code == 0, launch.output
    metrics = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert metrics["history"][0]["exact_match"] < 5
    assert metrics["exact_match"] >= 50


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_reaches_90_percent(launcher: Launcher, tmp_path: Path):
    """launch/demo.sh without the installation."""
    configs = ["--config_file", str(ROOT / "configs/accelerate/cpu_zero2.yaml"), "--main_process_port", "0"]
    command = [*launcher.command("zero2", 2)[:3], "launch", *configs, "-m", "qa_dist", "train"]
    process = launcher.start([*command, "--config", "configs/demo.yaml", "--run.output_dir", str(tmp_path / "demo")])
    output, _ = process.communicate(timeout=590)
    assert process.returncode == 0, output
    metrics = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert metrics["history"][0]["exact_match"] < 5
    assert metrics["exact_match"] >= 90


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models/minilm-l6").is_dir(), reason="the real model and data are not here")
def test_a_real_model_on_real_data(launcher: Launcher, tmp_path: Path):
    for name in ("train", "dev"):
        dataset = json.loads((SHARED / f"data/squad_v1/{name}.json").read_text())
        article = dataset["data"][0] | {"paragraphs": dataset["data"][0]["paragraphs"][:3]}
        (tmp_path / f"{name}.json").write_text(json.dumps(dataset | {"data": [article]}))
    flags = [
        *("--data.train_file", str(tmp_path / "train.json"), "--data.validation_file", str(tmp_path / "dev.json")),
        *("--model.name", str(SHARED / "models/minilm-l6"), "--train.global_batch_size", "4"),
    ]
    launch = launcher.train("zero2", 2, tmp_path / "run", *flags, "--run.log_every", "1")
    assert launch.code == 0, launch.output
    assert "new weights: qa_outputs.bias, qa_outputs.weight" in launch.output
    losses = [line["loss"] for line in jsonl(tmp_path / "run/metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert {k: metrics[k] for k in ("exact_match", "f1")} == pytest.approx(
        official(tmp_path / "dev.json", tmp_path / "run/predictions.json")
    )
