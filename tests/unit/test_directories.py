"""Directories and files that are there complete, or not at all; and whose run they hold."""

import contextlib
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qa_dist.checkpoint.store import publish_directory
from qa_dist.checkpoint.writer import CheckpointWriter, Retention
from qa_dist.errors import UserError
from qa_dist.reporting.run_directory import RunDirectory, StoppedError, require_free
from qa_dist.reporting.run_lock import LOCK, record_end
from qa_dist.reporting.status import read_status
from tests.helpers import make_manifest


def test_a_disk_that_takes_no_more_is_named(tmp_path: Path):
    """A limit on the size of files stands for a full disk: a file that the system refuses to make longer."""
    script = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from qa_dist.checkpoint.store import publish_directory, write_shard
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
target, large = Path(sys.argv[1]), {"weight": torch.zeros(1_000_000)}
for write in (
    lambda: publish_directory(target, lambda directory: save_file(large, directory / "model.safetensors")),
    lambda: write_shard(target.parent, "state.safetensors", large),
):
    try:
        write()
    except OSError as error:
        print(error.strerror, error.filename, sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    names = [tmp_path / "model", tmp_path / "state.safetensors"]
    assert done.stdout.splitlines() == [f"File too large|{name}" for name in names]
    assert not (tmp_path / "model").exists()


def test_a_failed_write_leaves_the_old_directory(tmp_path: Path):
    target = tmp_path / "model"

    def write(directory: Path) -> None:
        (directory / "a").write_text("old")

    def broken(directory: Path) -> None:
        (directory / "a").write_text("half")
        raise OSError("disk full")

    publish_directory(target, write)
    with pytest.raises(OSError, match="disk full"):
        publish_directory(target, broken)
    assert (target / "a").read_text() == "old"
    (target / "b").write_text("gone with the old one")
    publish_directory(target, write)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "a"]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_and_directories_follow_the_umask(umask: int, tmp_path: Path):
    """Whoever may read one file of a checkpoint or of a model may read all of them."""
    before = os.umask(umask)
    try:
        root = tmp_path / "run/checkpoints"
        weights = {"weight/w": torch.zeros(3)}
        writer = CheckpointWriter(
            root,
            0,
            1,
            is_local_main=True,
            exchange=lambda value: [value],
            retention=Retention(1, 0),
            companions=lambda directory: (directory / "config.json").write_text("{}"),
        )
        writer.submit(weights, make_manifest(1))
        writer.wait()
        assert writer.news() == []

        def write(directory: Path) -> None:
            (directory / "nested").mkdir()
            save_file(weights, directory / "nested/model.safetensors")

        publish_directory(tmp_path / "run/model", write)
    finally:
        os.umask(before)
    found = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*")}
    names = {path.name for path in found}
    assert {"state-00000-of-00001.safetensors", "manifest.json", "config.json", "model.safetensors"} <= names
    modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in found.items()}
    assert modes == {name: (0o777 if path.is_dir() else 0o666) & ~umask for name, path in found.items()}


def recorded(path: Path, error: BaseException | None = None, step: int = 0, is_main: bool = True) -> None:
    run = RunDirectory(path, is_main)
    run.open("a: 1\n", "DDP, 2 processes")
    with run.recorded():
        assert not is_main or read_status(path)["state"] == "running"
        run.step = step
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "state", "exit_code", "reason"),
    [
        (None, "completed", 0, ""),
        (UserError("mend it"), "failed", 2, "mend it"),
        (StoppedError("stopped by signal 15", 143), "stopped", 143, "stopped by signal 15"),
        (RuntimeError("boom"), "failed", 1, "RuntimeError: boom"),
        (KeyboardInterrupt(), "stopped", 130, "interrupted at once by a second signal"),
    ],
)
def test_status_tells_how_the_run_ended(tmp_path: Path, error, state: str, exit_code: int, reason: str):
    if error is None:
        recorded(tmp_path, step=7)
    else:
        with pytest.raises(type(error)):
            recorded(tmp_path, error, step=7)
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["reason"], status["step"]) == (state, exit_code, reason, 7)
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_the_status_of_a_run_that_ends_on_a_full_disk(tmp_path: Path):
    """It is written where the old one was, for which no new block is needed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        run = RunDirectory(disk / "run", is_main=True)
        run.open("a: 1\n", "DDP, 2 processes")
        with pytest.raises(UserError), run.recorded():
            with contextlib.suppress(OSError):
                (disk / "rest").write_bytes(bytes(100_000))
            raise UserError("the disk is full")
        status = read_status(disk / "run")
        assert (status["state"], status["reason"], status["exit_code"]) == ("failed", "the disk is full", 2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_other_ranks_write_nothing(tmp_path: Path):
    recorded(tmp_path / "run", is_main=False)
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(tmp_path: Path):
    recorded(tmp_path, step=3)
    with pytest.raises(UserError, match=r"holds another run \(completed at step 3\)"):
        recorded(tmp_path)
    for name in ("model", "predictions.json"):
        directory = tmp_path / name / "d"
        (directory / name).mkdir(parents=True)
        with pytest.raises(UserError, match="holds another run"):
            require_free(directory)


def test_a_run_that_failed_before_its_first_step_may_be_tried_again(tmp_path: Path):
    with pytest.raises(UserError):
        recorded(tmp_path, UserError("bad data"))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    recorded(tmp_path, step=1)
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(UserError):
        require_free(tmp_path)


def test_a_run_that_was_killed_before_its_first_step_may_be_tried_again(tmp_path: Path):
    status = {"state": "running", "step": 0, "host": socket.gethostname(), "pid": os.getpid()}
    (tmp_path / "status.json").write_text(json.dumps(status))
    with pytest.raises(UserError, match="holds another run"):
        require_free(tmp_path)  # that one is alive
    with subprocess.Popen(["true"]) as process:
        process.wait()
    (tmp_path / "status.json").write_text(json.dumps(status | {"pid": process.pid}))
    require_free(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps(status | {"pid": process.pid, "host": "elsewhere"}))
    with pytest.raises(UserError):
        require_free(tmp_path)


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path):
    run = RunDirectory(tmp_path, is_main=True)
    run.append_metrics({"grad_norm": float("inf"), "loss": 1.0})
    run.write_json("x.json", {"history": [{"loss": float("nan")}]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"grad_norm": None, "loss": 1.0}
    assert json.loads((tmp_path / "x.json").read_text()) == {"history": [{"loss": None}]}


def test_foreign_files_are_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    recorded(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_status_counts_as_in_use(tmp_path: Path):
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(UserError, match="holds another run, and nothing is overwritten"):
        require_free(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps([1]))
    with pytest.raises(UserError):
        require_free(tmp_path)


def test_a_directory_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        recorded(tmp_path / "file" / "run")


def test_the_end_of_a_run_whose_main_process_could_not_record_it(tmp_path: Path):
    """Only of that process, and only where it has not done so itself."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    running = {"state": "running", "reason": "", "step": 7, "exit_code": None, "updated": 100.0, "run": "abc"}
    running |= {"host": socket.gethostname(), "pid": process.pid}
    end = {"state": "failed", "reason": "rank 0 did not answer", "exit_code": 1}

    def recorded_end(of: int = process.pid, since: float = 90.0, **changes: object) -> dict[str, object]:
        (tmp_path / "status.json").write_text(json.dumps(running | changes))
        record_end(tmp_path, of, since, end)
        return read_status(tmp_path)

    record_end(tmp_path / "none", process.pid, 90.0, end)  # a run that has not begun
    (tmp_path / LOCK).touch()
    assert recorded_end() == {**running, **end, "updated": read_status(tmp_path)["updated"]}
    others = [{"pid": os.getpid()}, {"host": "elsewhere"}, {"state": "completed"}, {"state": "stopped"}]
    for other in others:  # another attempt, on this machine or another one; and one that has ended in order
        assert recorded_end(**other) == running | other
    assert recorded_end(of=os.getpid(), pid=os.getpid()) == running | {"pid": os.getpid()}  # which is alive
    assert recorded_end(since=110.0) == running  # an earlier one, whose process had the same number
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert recorded_end() == running  # the directory is another run's by now
