"""Runs that are killed, checkpoints that are damaged, and settings that have changed in between."""

import dataclasses
import fcntl
import hashlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qa_dist.checkpoint.manifest import Manifest
from qa_dist.checkpoint.store import checkpoints, thin_out
from qa_dist.cli import main
from qa_dist.config import TrainConfig
from qa_dist.tasks.question_answering.task import QuestionAnswering
from qa_dist.training.changes import launch_notes
from qa_dist.training.schedule import learning_rate
from tests.helpers import FORK_SERVER, ROOT, TINY_BERT, Launcher, environment, jsonl, sealed, tiny_flags

DROPOUT = json.dumps(TINY_BERT | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
FLAGS = tiny_flags(**{"model.config": DROPOUT, "checkpoint.every": "4 steps", "checkpoint.keep_last": "3"})


def qa_dist(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, what was shown, and what was said to be wrong."""
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return int(exit_.value.code or 0), shown.out, shown.err


def train(capsys: pytest.CaptureFixture[str], output_dir: Path, *args: object) -> tuple[int, str, str]:
    return qa_dist(capsys, "train", *FLAGS, "--run.output_dir", output_dir, *args)


def losses(output_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in jsonl(output_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process, with checkpoints of steps 20, 24 and 26."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit) as exit_:
        main(["train", *FLAGS, "--run.output_dir", str(output_dir)])
    assert exit_.value.code == 0
    return output_dir


@pytest.fixture
def cut_off(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that looks as if it had been killed after step 24."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints/step_00000026")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running", "pid": 2**22 + 1, "step": 25}))
    return run


# ------------------------------------------------------------------------------------------------- going on


def test_the_same_command_starts_and_goes_on(cut_off: Path, finished: Path, capsys):
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == [
        *("step_00000020", "step_00000024", "step_00000026")
    ]
    (cut_off / "checkpoints/.step_00000028.tmp").mkdir()  # as a run that was killed leaves it
    code, shown, _ = train(capsys, cut_off, "--resume", "auto")
    assert code == 0
    assert "(step 24)" in shown
    assert losses(cut_off) == losses(finished)  # what came after step 24 was done again
    assert not [path for path in (cut_off / "checkpoints").iterdir() if path.name.startswith(".")]
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (cut_off, finished))
    assert ours["history"] == theirs["history"]
    for name in ("predictions.json", "model/model.safetensors"):
        assert (cut_off / name).read_bytes() == (finished / name).read_bytes()
    before = losses(cut_off)
    assert train(capsys, cut_off, "--resume", "auto")[0] == 0  # nothing is left to do
    assert losses(cut_off) == before


def test_auto_starts_where_there_is_nothing(tmp_path: Path, finished: Path, capsys):
    code, shown, _ = train(capsys, tmp_path / "new", "--resume", "auto")
    assert code == 0
    assert "going on" not in shown
    assert losses(tmp_path / "new") == losses(finished)


def test_a_run_that_is_still_going_on_is_left_alone(cut_off: Path, capsys):
    """Whoever has the directory's lock is alive, whatever numbers its status names."""
    with (cut_off / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, message = train(capsys, cut_off, "--resume", "auto")
        assert code == 2
        assert "is still running (process 4194305 on" in message
    code, shown, message = train(capsys, cut_off, "--resume", "auto")
    assert code == 0, message
    assert "going on from" in shown


def test_a_stopped_run_goes_on_where_it_stopped(launcher: Launcher, finished: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    flags = ["-m", "qa_dist", "train", *FLAGS, "--run.output_dir", str(run), "--checkpoint.every", "1 epoch"]
    process = launcher.start([sys.executable, *flags])
    wait_for(process, lambda: (run / "metrics.jsonl").is_file())
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert f"to resume: {shlex.join([sys.executable, *flags])} --resume auto\n" in output
    code, shown, message = train(capsys, run, "--checkpoint.every", "1 epoch", "--resume", "auto")
    assert code == 0, message
    assert "going on from" in shown
    assert losses(run) == losses(finished)


def test_nothing_of_a_killed_run_is_overwritten_without_asking(cut_off: Path, capsys):
    """Whatever its status says: that of a run that was killed is old."""
    status = json.loads((cut_off / "status.json").read_text())
    (cut_off / "status.json").write_text(json.dumps(status | {"step": 0}))
    shutil.rmtree(cut_off / "model")
    before = {path: path.read_bytes() for path in cut_off.rglob("*") if path.is_file()}
    code, _, message = train(capsys, cut_off)
    assert code == 2
    assert "resume it (--resume auto)" in message
    refused = train(capsys, cut_off, "--resume", "auto", "--train.seed", 7)[0]
    assert refused == 2
    after = {path: path.read_bytes() for path in cut_off.rglob("*") if path.is_file()}
    assert after == before


def test_auto_does_not_start_again_in_the_directory_of_another_run(tmp_path: Path, capsys):
    code, _, message = train(capsys, tmp_path / "other", "--train.seed", 1, "--train.epochs", 1)
    assert code == 0, message
    shutil.rmtree(tmp_path / "other/checkpoints")
    code, _, message = train(capsys, tmp_path / "other", "--resume", "auto")
    assert code == 2
    assert "holds another run" in message


def test_a_kill_between_two_renames_loses_nothing(cut_off: Path, finished: Path, capsys):
    newest = cut_off / "checkpoints/step_00000024"
    newest.rename(newest.with_name(".step_00000024.old"))
    code, shown, _ = train(capsys, cut_off, "--resume", "auto")
    assert code == 0
    assert "(step 24)" in shown
    assert losses(cut_off) == losses(finished)


def test_a_signal_before_the_first_step(launcher: Launcher, tmp_path: Path):
    """There is no state to keep yet, and no error but the signal."""
    run = tmp_path / "run"
    flags = [*FLAGS, "--run.output_dir", str(run), "--evaluation.at_start", "true"]
    process = launcher.start([FORK_SERVER.python, "-m", "qa_dist", "train", *flags])
    wait_for(process, lambda: (run / "status.json").is_file())
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "Traceback" not in output


def test_minutes_are_those_of_the_main_process(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 10_000, 20))  # 20 seconds each time that anyone looks
    fake = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("qa_dist.training.checkpointer.time", fake)
    flags = ("--checkpoint.every", "1 minute", "--checkpoint.keep_last", 50)
    assert train(capsys, tmp_path / "run", *flags)[0] == 0
    steps = [int(path.name[-8:]) for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert len(steps) > 4
    assert steps[-1] == 26  # at the end, whatever the clock says
    assert set(np.diff(steps[:-1])) == {3}


def test_a_loss_that_is_no_number_leaves_the_state_before_it(tmp_path: Path, capsys):
    code, _, message = train(capsys, tmp_path / "run", "--train.learning_rate", "1e30", "--train.warmup_ratio", 0)
    assert code == 1
    found = re.search(r"the (?:loss is \w+|gradient holds .*?) at step (\d+)", message)
    assert found, message
    step = int(found[1])
    assert "on rank 0 for " in message or "though all losses are finite" in message
    assert step > 1
    tensors = load_file(shard_of(tmp_path / "run", step - 1))
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(cut_off: Path, capsys):
    """The update of step 25 overflows although its loss is finite; the loss of step 26 shows it."""
    before = (cut_off / "model/model.safetensors").read_bytes()
    # a tenth of the rate is left at this step; without a long memory the quotient of AdamW's moments is large
    flags = ["--train.learning_rate", "2e39", "--train.adam_beta2", "0.01"]
    flags += ["--allow_changed", "train.learning_rate,train.adam_beta2"]
    flags += ["--checkpoint.every", "1 steps", "--checkpoint.keep_last", "1", "--checkpoint.keep_best", "0"]
    code, shown, message = train(capsys, cut_off, "--resume", "auto", *flags)
    assert code == 1
    assert "at step 26" in message
    assert "The weights were not finite before this step either, so they are not kept" in message
    assert re.search(r"the checkpoint of step 25 could not be written: .* on rank 0: not finite", shown)
    names = [path.name for path in (cut_off / "checkpoints").iterdir()]
    assert "step_00000024" in names
    assert not [name for name in names if int(name.removeprefix("step_")) > 24]
    assert qa_dist(capsys, "checkpoint", "verify", cut_off)[0] == 0
    assert (cut_off / "model/model.safetensors").read_bytes() == before


# ------------------------------------------------------------------------------------------ changed settings


def test_changes_that_matter_are_refused_unless_named(cut_off: Path, tmp_path: Path, capsys):
    change = ("--train.seed", 7, "--train.learning_rate", "2e-3", "--run.log_every", 2)
    code, _, message = train(capsys, cut_off, "--resume", "auto", *change)
    assert code == 2
    assert "train.seed: 42 then, 7 now" in message
    assert "--allow_changed train.learning_rate,train.seed" in message
    assert "log_every" not in message
    code, _, message = train(capsys, cut_off, "--resume", "auto", *change, "--allow_changed", "train.sed")
    assert code == 2
    assert "--allow_changed: there is no setting 'train.sed'" in message
    other = tmp_path / "other"
    named = ("--allow_changed", "train.learning_rate,train.seed")
    code, shown, _ = train(capsys, other, "--resume", cut_off, *change, *named)
    assert code == 0
    assert "changed: train.seed: 42 before, 7 now" in shown


def test_another_shape_of_the_model_is_refused(cut_off: Path, tmp_path: Path, capsys):
    """A pretrained model may lie elsewhere, but its own config has to be the same."""
    step = cut_off / "checkpoints/step_00000024"
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model").mkdir(exist_ok=True)
        shutil.copy(step / file, tmp_path / "model" / file)
    save_file(
        {
            key.removeprefix("weight/"): tensor
            for key, tensor in load_file(shard_of(cut_off)).items()
            if "weight/" in key
        },
        tmp_path / "model/model.safetensors",
        metadata={"format": "pt"},
    )
    flags = [flag for flag in FLAGS if flag not in ("--model.config", DROPOUT, "--model.vocab_size", "600")]
    allowed = ("--allow_changed", "model.config,model.vocab_size")
    command = ["train", *flags, "--model", tmp_path / "model", "--resume", cut_off, *allowed]
    assert qa_dist(capsys, *command, "--run.output_dir", tmp_path / "same")[0] == 0
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.3}))
    code, _, message = qa_dist(capsys, *command, "--run.output_dir", tmp_path / "other")
    assert code == 2
    assert "hidden_dropout_prob: 0.1 then, 0.3 now" in message


def test_other_data_are_refused(cut_off: Path, capsys):
    code, _, message = train(capsys, cut_off, "--resume", "auto", "--data.synthetic.seed", 5)
    assert code == 2
    assert "data.synthetic.seed: 0 then, 5 now" in message
    allowed = ("--allow_changed", "data.synthetic.seed")
    code, _, message = train(capsys, cut_off, "--resume", "auto", "--data.synthetic.seed", 5, *allowed)
    assert code == 2
    assert "was trained on other data" in message


def test_a_path_without_a_checkpoint(tmp_path: Path, capsys):
    code, _, message = train(capsys, tmp_path / "new", "--resume", tmp_path)
    assert code == 2
    assert "holds no complete checkpoint" in message
    assert not (tmp_path / "new").exists()


def rates(output_dir: Path) -> dict[int, float]:
    rows = [line for line in jsonl(output_dir / "metrics.jsonl") if line["kind"] == "train"]
    return {row["step"]: row["learning_rate"] for row in rows}


@pytest.fixture(scope="module")
def whole_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after the last step of either epoch, written before the evaluation."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.raises(SystemExit) as exit_:
        main(["train", *FLAGS, "--checkpoint.every", "13 steps", "--run.output_dir", str(output_dir)])
    assert exit_.value.code == 0
    return output_dir


def test_batches_change_at_the_end_of_an_epoch_only(whole_epochs: Path, tmp_path: Path, capsys):
    start, run = whole_epochs / "checkpoints/step_00000013", tmp_path / "run"
    larger = ("--train.global_batch_size", 16, "--allow_changed", "train.global_batch_size")
    code, shown, message = train(capsys, run, "--resume", start, *larger)
    assert code == 0, message
    # 7 batches of 16 for the 13 of 8: half of the run is done, and half of 14
    expected = {14 + i: learning_rate(7 + i, 14, TrainConfig(learning_rate=1e-3)) for i in range(7)}
    assert rates(run) == expected
    assert "step 14/20 " in shown
    assert "step 20/20 " in shown
    assert [row["epoch"] for row in json.loads((run / "metrics.json").read_text())["history"]] == [1, 2]

    shutil.rmtree(run / "checkpoints/step_00000020")  # 16 is left, after 3 of 7 batches
    smaller = ("--train.global_batch_size", 8, "--allow_changed", "train.global_batch_size")
    before = (run / "metrics.jsonl").read_bytes()
    code, _, message = train(capsys, run, "--resume", "auto", *smaller)
    assert code == 2
    assert "train.global_batch_size: changed, but batches can only change at the end of an epoch" in message
    assert "after 3 of the 7 batches of epoch 2" in message
    assert "train to the end of the epoch first" in message
    assert (run / "metrics.jsonl").read_bytes() == before
    shutil.copytree(start, run / "checkpoints" / start.name)
    code, _, message = train(capsys, run, "--resume", "auto", *smaller)
    assert code == 2
    assert f"--resume {run / 'checkpoints' / start.name}" in message
    for key, value in (("train.group_by_length", "false"), ("train.epochs", 1)):
        change = (f"--{key}", value, *larger[:2], "--allow_changed", key)
        code, _, message = train(capsys, run, "--resume", "auto", *change)
        assert code == 2
        assert message.startswith(f"qa-dist: {key}: ")


def test_more_epochs_of_fewer_examples(whole_epochs: Path, tmp_path: Path, capsys):
    """The rate is that of four epochs, of which two are done, and every step is counted once."""
    change = ("--train.epochs", 4, "--data.max_train_samples", 20, "--train.schedule", "cosine")
    allowed = ("--allow_changed", "train.epochs,train.schedule,data")
    code, shown, message = train(capsys, tmp_path / "run", "--resume", whole_epochs, *change, *allowed)
    assert code == 0, message
    found = rates(tmp_path / "run")
    size = len(found) // 2
    settings = TrainConfig(learning_rate=1e-3, schedule="cosine")
    assert found == {27 + i: learning_rate(2 * size + i, 4 * size, settings) for i in range(2 * size)}
    assert f"step {26 + 2 * size}/{26 + 2 * size} " in shown
    in_epoch = tmp_path / "in_epoch"  # the second half of the batches could not be known
    code, _, message = train(capsys, in_epoch, "--checkpoint.every", "5 steps", "--train.epochs", 1)
    assert code == 0, message
    shutil.rmtree(in_epoch / "checkpoints/step_00000013")
    fewer = ("--data.max_train_samples", 20, "--allow_changed", "data,train.epochs")
    code, _, message = train(capsys, in_epoch, "--resume", "auto", *fewer)
    assert code == 2
    assert "the training data: changed, but batches can only change at the end of an epoch" in message


# --------------------------------------------------------------------------------------------------- damage


def shard_of(run: Path, step: int = 24) -> Path:
    return next((run / f"checkpoints/step_{step:08d}").glob("*.safetensors"))


def truncate(run: Path) -> None:
    os.truncate(shard_of(run), 1000)


def flip(run: Path) -> None:
    content = bytearray(shard_of(run).read_bytes())
    content[-5] ^= 1
    shard_of(run).write_bytes(content)


def lose(run: Path) -> None:
    shard_of(run).unlink()


def manifest_of(run: Path) -> Path:
    return run / "checkpoints/step_00000024/manifest.json"


def empty(run: Path) -> None:
    manifest_of(run).write_text("")


def no_score(run: Path) -> None:
    change_manifest(run, score="high")


def change_manifest(run: Path, **values: Any) -> None:
    manifest_of(run).write_bytes(sealed(json.loads(manifest_of(run).read_text()) | values))


def escape(run: Path) -> None:
    files = json.loads(manifest_of(run).read_text())["files"]
    change_manifest(run, files={f"../step_00000020/{name}": file for name, file in files.items()})


def twice(run: Path) -> None:
    shutil.copy(run / "checkpoints/step_00000020/manifest.json", manifest_of(run))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (truncate, "has 1,000 bytes instead of"),
        (flip, "has changed since it was written"),
        (lose, "is missing"),
        (empty, "its manifest cannot be read"),
        (escape, "its manifest names a file outside of its directory: '../step_00000020"),
        (twice, "its manifest is that of step 20"),
        (no_score, "its manifest is not valid: 'score: Input should be a valid number'"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    spoil: Callable[[Path], None], expected: str, cut_off: Path, finished: Path, capsys
):
    spoil(cut_off)
    code, shown, message = train(capsys, cut_off, "--resume", "auto")
    assert code == 0, message
    assert expected in shown
    assert "(step 20)" in shown
    assert losses(cut_off) == losses(finished)
    code, shown, _ = qa_dist(capsys, "checkpoint", "verify", cut_off)  # training wrote it anew
    assert code == 0, shown


def test_a_damaged_checkpoint_that_was_named_is_an_error(cut_off: Path, tmp_path: Path, capsys):
    flip(cut_off)
    code, _, message = train(capsys, tmp_path / "new", "--resume", cut_off / "checkpoints/step_00000024")
    assert code == 2
    assert "has changed since it was written" in message
    assert not (tmp_path / "new").exists()


def test_a_newer_version_is_refused(cut_off: Path, capsys):
    change_manifest(cut_off, schema_version=3)
    code, _, message = train(capsys, cut_off, "--resume", "auto")
    assert code == 2
    assert "was written by a newer version of qa_dist (schema 3" in message


@pytest.mark.parametrize(
    ("what", "expected"),
    [("names", "is of another model"), ("shapes", "is of another model"), ("values", "its shards do not make up")],
)
def test_tensors_of_another_model(what: str, expected: str, cut_off: Path, capsys):
    shard = shard_of(cut_off)
    tensors = load_file(shard)
    for name in [key for key in tensors if key.endswith("qa_outputs.weight")]:
        tensor = tensors.pop(name)
        tensors |= {f"{name}2": tensor} if what == "names" else {name: torch.zeros(3, 3)}
    save_file(tensors, shard)
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    content = json.loads(manifest_of(cut_off).read_text())
    files = content["files"] | {shard.name: {"size": shard.stat().st_size, "sha256": digest}}
    specs = {key: {"dtype": "F32", "shape": list(tensor.shape)} for key, tensor in tensors.items()}
    change_manifest(cut_off, files=files, tensors=specs if what != "values" else content["tensors"])
    code, _, message = train(capsys, cut_off, "--resume", "auto")
    assert code == 2
    assert expected in message
    assert "qa_outputs.weight" in message


def test_a_disk_that_has_no_room_is_told_and_training_goes_on(finished: Path, tmp_path: Path):
    """Files may not grow beyond the model's size: the model can be written, its checkpoints cannot."""
    room = 2 * (finished / "model/model.safetensors").stat().st_size
    command = [sys.executable, "-m", "qa_dist", "train", *FLAGS, "--run.output_dir", str(tmp_path / "run")]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert "the checkpoint of step 4 could not be written" in process.stdout
    assert "training is done, but the checkpoint of step 26 could not be written" in process.stderr
    assert "Traceback" not in process.stderr
    assert losses(tmp_path / "run") == losses(finished)
    assert (tmp_path / "run/model/model.safetensors").is_file()
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert not list((tmp_path / "run/checkpoints").iterdir())


# ------------------------------------------------------------------------------------------- looking at them


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(finished: Path, tmp_path: Path, capsys):
    """The new one is complete, so the run goes on, and ends as it would have."""
    run = tmp_path / "run"
    obstacle = run / "checkpoints/.step_00000004.gone"  # where that checkpoint is to be moved before it is removed
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()
    code, shown, message = train(capsys, run, "--checkpoint.keep_last", "1")
    assert code == 0, message
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    warning = f"the old checkpoint in {run}/checkpoints/step_00000004 could not be removed: Not a directory"
    assert shown.count(warning) == 1
    assert shown.count("could not be") == 1
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000004", "step_00000026"]
    assert losses(run) == losses(finished)


def test_what_is_left_of_an_old_checkpoint_is_named_and_tried_again(cut_off: Path):
    """A file system in it keeps it from being removed, or a directory without permission to write."""
    root = cut_off / "checkpoints"
    inner = root / "step_00000020/inner"
    (inner / "empty").mkdir(parents=True)
    is_mounted = not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(inner)], capture_output=True).returncode
    if not is_mounted and os.geteuid() == 0:
        pytest.skip("this user may remove everything, and not mount a file system")
    inner.chmod(0o500)
    left = root / ".step_00000020.gone"
    try:
        assert list(thin_out(root, 1, 0)) == [left]
        assert [one.step for one in checkpoints(root)] == [24]
        assert thin_out(root, 1, 0) == {}
        assert left.exists()
    finally:
        if is_mounted:
            subprocess.run(["umount", str(left / "inner")], check=True)
    (left / "inner").chmod(0o700)
    assert thin_out(root, 1, 0) == {}
    assert not left.exists()


def test_listing_and_verifying(cut_off: Path, capsys):
    code, shown, _ = qa_dist(capsys, "checkpoint", "list", cut_off)
    assert code == 0
    assert "step_00000024" in shown
    assert "no sharding, float32, 1 process on cpu" in shown
    flip(cut_off)
    (cut_off / "checkpoints/step_00000020/manifest.json").unlink()
    code, shown, _ = qa_dist(capsys, "checkpoint", "verify", cut_off)
    assert code == 1
    assert "has changed since it was written" in shown
    assert "it has no manifest: it was not finished" in shown
    code, _, message = qa_dist(capsys, "checkpoint", "list", cut_off.parent)
    assert code == 2
    assert "holds no checkpoints" in message


def test_exporting_a_checkpoint(cut_off: Path, tmp_path: Path, capsys):
    target = tmp_path / "model"
    step = cut_off / "checkpoints/step_00000024"
    code, shown, message = qa_dist(capsys, "checkpoint", "export", step, target)
    assert code == 0, message
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    assert shown == f"exported {step} to {target} (float32, {size:,.1f} MB)\n"
    exported = load_file(target / "model.safetensors")
    stored = load_file(shard_of(cut_off))
    assert all(torch.equal(tensor, stored[f"weight/{name}"]) for name, tensor in exported.items())
    output = cut_off.parent / "evaluated"
    flags = tiny_flags(**{"model.config": "", "model.vocab_size": ""})[:10]
    code, _, message = qa_dist(capsys, "evaluate", "--model", target, *flags, "--run.output_dir", output)
    assert code == 0, message
    code, _, message = qa_dist(capsys, "checkpoint", "export", step, target)
    assert code == 2
    assert "is there already" in message


# -------------------------------------------------------------------------------------------------- killing


def wait_for(process: "subprocess.Popen[str]", condition: Callable[[], bool], timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(launcher_pid: int) -> list[int]:
    """The processes that a launcher has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher_pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def killed_run(launcher: Launcher, engine: str, output_dir: Path, kills: int, seed: int) -> None:
    """Start the run until it is completed, with a SIGKILL for one rank or the launcher `kills` times on the way."""
    chance = random.Random(seed)
    flags = [*FLAGS, "--checkpoint.every", "2 steps", "--run.output_dir", str(output_dir), "--resume", "auto"]
    command = launcher.command(engine, 2, "-m", "qa_dist", "train", *flags)
    for attempt in range(kills + 1):
        process = launcher.start(command)
        if attempt < kills:
            seen = len(losses(output_dir)) if (output_dir / "metrics.jsonl").is_file() else 0
            target = seen + chance.randint(0, 4)

            def is_far_enough(target: int = target) -> bool:
                path = output_dir / "metrics.jsonl"
                return path.is_file() and path.read_bytes().count(b"\n") > target

            wait_for(process, is_far_enough)
            time.sleep(chance.random() * 0.15)
            victims = [process.pid, *ranks_of(process.pid)]
            with_children = chance.choice(victims)
            if process.poll() is None:
                os.kill(with_children, signal.SIGKILL)
            if with_children == process.pid:  # its processes are orphans now; a batch system would end them
                time.sleep(0.3)
                for pid in victims[1:]:
                    subprocess.run(["kill", "-9", str(pid)], capture_output=True)
        output, _ = process.communicate(timeout=120)
        assert "cannot be" not in output, output
        if attempt == kills:
            assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_killed_at_random_moments(engine: str, launcher: Launcher, tmp_path: Path):
    whole = launcher.train(engine, 2, tmp_path / "whole", *FLAGS)
    assert whole.code == 0, whole.output
    killed_run(launcher, engine, tmp_path / "killed", kills=3, seed=1)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("killed", "whole"))
    assert ours["history"] == theirs["history"]
    assert not [path for path in (tmp_path / "killed/checkpoints").iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------------------ validation data


def question(context: str, answer: str, number: int, *more: str) -> dict[str, Any]:
    answers = {"text": [answer, *more], "answer_start": [context.index(text) for text in (answer, *more)]}
    return {"id": str(number), "question": "Where is it?", "context": context, "answers": answers}


def test_scores_on_other_validation_data_are_not_compared(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Whether its text or only an accepted answer has changed; the same content may lie in any file."""
    rows = [question(f"The key number {i} is in the old box.", "the old box", i) for i in range(20)]
    data, moved = tmp_path / "dev.json", tmp_path / "moved.json"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data.write_text(json.dumps(rows[:8]))
    flags = [*FLAGS[FLAGS.index("--data.max_length") :], "--data.train_file", tmp_path / "train.json"]
    flags += ["--train.global_batch_size", 10, "--checkpoint.every", "1 epoch", "--checkpoint.keep_last", 1]
    flags += ["--run.export", "best", "--run.output_dir", tmp_path / "run", "--resume", "auto"]
    scores = iter([90.0, 30.0, 20.0, 40.0, 10.0])

    def score(self: Any, outputs: Any, features: Any, plain: Any = QuestionAnswering.score) -> Any:
        found = plain(self, outputs, features)
        return dataclasses.replace(found, metrics=found.metrics | {"f1": next(scores)})

    monkeypatch.setattr(QuestionAnswering, "score", score)

    def run(epochs: int, file: Path, *more: object) -> tuple[int, str, str]:
        allowed = ",".join(["train.epochs", *map(str, more)])
        command = ("train", *flags, "--data.validation_file", file, "--train.epochs", epochs)
        return qa_dist(capsys, *command, "--allow_changed", allowed)

    assert run(1, data)[0] == 0
    data.rename(moved)
    code, shown, message = run(2, moved)  # the same content
    assert code == 0, message
    assert "not compared" not in shown
    moved.write_text(
        json.dumps([question(row["context"], "the old box", i, "old box") for i, row in enumerate(rows[:8])])
    )
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    code, _, message = run(3, moved)
    assert code == 2
    assert "was evaluated on other validation data" in message
    assert "--allow_changed data.validation_file" in message
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    code, shown, message = run(5, moved, "data.validation_file")
    assert code == 0, message
    assert "Scores before are not compared" in shown
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [row.get("changed") for row in metrics["history"]] == [None, None, "validation", None, None]
    assert (metrics["epoch"], metrics["f1"]) == (4, 40.0)  # not the 90 on the other data
    logged = [line.get("changed") for line in jsonl(tmp_path / "run/metrics.jsonl") if line["kind"] == "evaluation"]
    assert logged == [None, None, "validation", None, None]
    kept = {int(path.name[-8:]) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {metrics["history"][i]["step"] for i in (3, 4)}  # the best since, and the last
    code, _, message = qa_dist(capsys, "report", tmp_path / "run")
    assert code == 0, message


def test_another_launch_is_noted_and_the_list_says_where_an_epoch_ends(
    finished: Path, whole_epochs: Path, tmp_path: Path, capsys
):
    manifest = Manifest.read(finished / "checkpoints/step_00000026")
    launch = manifest.launch.model_copy(update={"strategy": "FSDP2", "precision": "bf16", "world_size": 3})
    assert launch_notes(manifest, manifest.launch) == []
    assert launch_notes(manifest, launch) == [
        *("strategy: no sharding before, FSDP2 now", "precision: float32 before, bf16 now"),
        "world size: 1 before, 3 now",
    ]
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    step = run / "checkpoints/step_00000026"
    (step / "manifest.json").write_text(manifest.model_copy(update={"launch": launch}).to_json())
    code, shown, message = train(capsys, run, "--resume", "auto")
    assert code == 0, message
    assert "changed: world size: 3 before, 1 now" in shown
    found = {}
    for directory in (finished, whole_epochs):
        code, shown, _ = qa_dist(capsys, "checkpoint", "list", directory)
        assert code == 0
        found |= dict(re.findall(r"step_0*(\d+) +│ ([^│]+?) +│", shown))
    assert found == {"26": "2 (end)", "24": "2 (11/13)", "20": "2 (7/13)", "13": "1 (end)"}


def test_a_refused_model_names_the_word_that_is_accepted(cut_off: Path, tmp_path: Path, capsys):
    other = ("--model.config", json.dumps(json.loads(DROPOUT) | {"hidden_dropout_prob": 0.2}))
    code, _, message = train(capsys, cut_off, "--resume", "auto", *other)
    assert code == 2
    (words,) = re.findall(r"--allow_changed (\S+)", message)
    code, _, message = train(capsys, cut_off, "--resume", "auto", *other, "--allow_changed", words)
    assert code == 0, message
