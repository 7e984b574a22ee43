"""Runs that are to be resumed, and whose checkpoints are there but cannot be used."""

import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qa_dist.cli import main
from tests.broken_disk import broken_disk
from tests.e2e import hub_training
from tests.e2e.test_checkpoints import FLAGS, losses, train
from tests.helpers import FORK_SERVER, ROOT, Launcher, environment
from tests.hub_server import HubServer

CONTENT = dict[str, bytes]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 20, 24 and 26."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit) as exit_:
        main(["train", *FLAGS, "--run.output_dir", str(output_dir)])
    assert exit_.value.code == 0
    return output_dir


def copy_of(finished: Path, run: Path) -> Path:
    """Return a copy of the run that looks as if it had been killed after step 24."""
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints/step_00000026")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running", "pid": 2**22 + 1, "step": 25}))
    return run


def content_of(run: Path) -> CONTENT:
    """Return every file of the run directory, except for the lock, which has no content."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def shorten(step: Path) -> None:
    os.truncate(next(step.glob("*.safetensors")), 1000)


def flip(step: Path) -> None:
    shard = next(step.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))


def lose_shard(step: Path) -> None:
    next(step.glob("*.safetensors")).unlink()


def lose_manifest(step: Path) -> None:
    (step / "manifest.json").unlink()


def empty_manifest(step: Path) -> None:
    (step / "manifest.json").write_text("")


def manifest_is_a_directory(step: Path) -> None:
    lose_manifest(step)
    (step / "manifest.json").mkdir()


def other_disk(step: Path) -> None:
    """Leave a link to a disk that is not there."""
    shutil.rmtree(step)
    step.symlink_to(step.parent.parent / "unmounted" / step.name)


SPOILERS = (shorten, flip, lose_shard, lose_manifest, empty_manifest, manifest_is_a_directory, other_disk)


@pytest.mark.parametrize("spoil", SPOILERS)
def test_nothing_starts_over_where_all_checkpoints_are_damaged(
    spoil: Callable[[Path], None], finished: Path, tmp_path: Path, capsys
):
    run = copy_of(finished, tmp_path / "run")
    for step in list((run / "checkpoints").iterdir()):
        spoil(step)
    before = content_of(run)
    code, _, message = train(capsys, run, "--resume", "auto")
    assert code == 2
    assert f"{run / 'checkpoints'} holds checkpoints, but none of them can be used" in message
    for name in ("step_00000020", "step_00000024"):
        assert f"{run / 'checkpoints' / name} is not used: " in message
    assert "To start over, set --run.output_dir to another directory" in message
    assert content_of(run) == before
    code, _, message = train(capsys, tmp_path / "other", "--resume", run)
    assert code == 2
    assert "holds no complete checkpoint" in message


def test_only_what_was_never_a_checkpoint_is_none(finished: Path, tmp_path: Path, capsys):
    """A first checkpoint that was being written, or fetched, when the run was killed."""
    run = copy_of(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step_00000024")
    (run / "checkpoints/step_00000020").rename(run / "checkpoints/.step_00000020.tmp")
    code, shown, message = train(capsys, run, "--resume", "auto")
    assert code == 0, message
    assert "going on from" not in shown
    assert losses(run) == losses(finished)


def test_a_link_to_a_disk_that_is_not_there(finished: Path, tmp_path: Path, capsys):
    run = copy_of(finished, tmp_path / "run")
    (run / "checkpoints").rename(tmp_path / "mounted")
    (run / "checkpoints").symlink_to(tmp_path / "unmounted")
    before = content_of(run)
    code, _, message = train(capsys, run, "--resume", "auto")
    assert code == 2
    assert f"it links to {tmp_path / 'unmounted'}, which is not there" in message
    assert content_of(run) == before
    (tmp_path / "mounted").rename(tmp_path / "unmounted")
    code, shown, message = train(capsys, run, "--resume", "auto")
    assert code == 0, message
    assert "(step 24)" in shown


def resumed(run: Path, env: dict[str, str], *launch: str) -> tuple[int, str]:
    """Return exit code and output of a process of its own that resumes the run."""
    command = [FORK_SERVER.python, "-m", "qa_dist", *launch, "train", *FLAGS, "--run.output_dir", str(run)]
    done = subprocess.run(
        [*command, "--resume", "auto"],
        cwd=ROOT,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout


@pytest.mark.parametrize(("error", "expected"), [(errno.EIO, 1), (errno.EACCES, 2)])
def test_a_disk_that_answers_with_errors(error: int, expected: int, finished: Path, tmp_path: Path, capsys):
    """One that may answer again ends the run as a failure that may pass; a permission is for the user to give."""
    run = copy_of(finished, tmp_path / "run")
    before = content_of(run)
    code, output = resumed(run, broken_disk(tmp_path, "/checkpoints/step_", error))
    assert code == expected, output
    assert os.strerror(error) in output
    assert "none of them can be used" in output
    assert ("start the same command again later" in output) == (expected == 1)
    assert content_of(run) == before
    if error == errno.EIO:  # the one before it can be read
        code, output = resumed(run, broken_disk(tmp_path, "/checkpoints/step_00000024/state", error))
        assert code == 0, output
        assert "(step 20)" in output
        assert losses(run) == losses(finished)


def test_all_ranks_end_with_the_same_code(finished: Path, tmp_path: Path, capsys):
    run = copy_of(finished, tmp_path / "run")
    launch = ("launch", "--config_file", "cpu_ddp", "--num_processes", "3")
    code, output = resumed(run, broken_disk(tmp_path, "/checkpoints/step_", errno.EIO), *launch)
    assert code == 1, output
    assert "none of them can be used" in output
    for step in (run / "checkpoints").iterdir():
        lose_shard(step)
    code, output = resumed(run, {}, *launch)
    assert code == 2, output
    assert "none of them can be used" in output


@pytest.mark.slow
def test_nodes_with_disks_of_their_own_stop_together(launcher: Launcher, tmp_path: Path):
    """Each node has a shard of each checkpoint; on one of them all are damaged."""

    def train_on_both() -> list[tuple[int, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nodes = []
        for rank in (0, 1):
            directory = tmp_path / f"node{rank}"
            directory.mkdir(exist_ok=True)
            settings = {"num_machines": 2, "machine_rank": rank, "main_process_ip": "127.0.0.1"}
            settings |= {"main_process_port": port, "rdzv_backend": "static"}
            program = ("-m", "qa_dist", "train", *FLAGS, "--run.output_dir", "run", "--resume", "auto")
            command = Launcher(directory).command("ddp", 2, *program, **settings)
            nodes.append(launcher.start(command, directory))
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
        return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]

    assert [code for code, _ in train_on_both()] == [0, 0]
    for step in (tmp_path / "node1/run/checkpoints").iterdir():
        flip(step)
    before = content_of(tmp_path / "node0/run")
    for code, output in train_on_both():
        assert code != 0
        assert "none of them can be used" in output
        assert "has changed since it was written" in output
    assert content_of(tmp_path / "node0/run") == before


# ------------------------------------------------------------------------------------------------- with a Hub


@pytest.mark.usefixtures("short_waits")
def test_a_state_of_the_hub_stands_in_for_damaged_checkpoints(
    hub: HubServer, pushed: Path, uninterrupted: Path, tmp_path: Path, capsys
):
    """Whether it is as new or older; and the damaged ones are kept."""
    older = hub_training.steps_of(hub)[1]
    hub_training.forget(hub, hub_training.LAST)
    for step in (pushed / "checkpoints").iterdir():
        flip(step)
    damaged = {path.name: content_of(path) for path in (pushed / "checkpoints").iterdir()}
    code, shown, message = hub_training.train(capsys, pushed, "--resume", "auto")
    assert code == 0, message
    assert "step_00000026 is not used" in shown
    assert f"(step {older})" in shown
    assert hub_training.losses(pushed) == hub_training.losses(uninterrupted)
    kept = {path.name.removeprefix("damaged."): content_of(path) for path in (pushed / "checkpoints").glob("damaged.*")}
    assert kept == damaged


@pytest.mark.usefixtures("short_waits")
def test_damaged_checkpoints_and_no_state_of_this_run(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    """Where the states on the Hub are damaged too, or are of another run, nothing starts over."""
    for step in (pushed / "checkpoints").iterdir():
        flip(step)
    status = json.loads((pushed / "status.json").read_text())
    (pushed / "status.json").write_text(json.dumps(status | {"run": "another"}))
    before = content_of(pushed)
    code, _, message = hub_training.train(capsys, pushed, "--resume", "auto")
    assert code == 2
    assert "are another run's, and not used" in message
    assert content_of(pushed) == before
    (pushed / "status.json").write_text(json.dumps(status))
    repo = hub.repo(hub_training.REPO)
    spoilt = {path: b"{}" for path in repo.files(hub_training.STATES) if path.endswith("manifest.json")}
    repo.commit_as("nobody", spoilt, branch=hub_training.STATES)
    metrics = (pushed / "metrics.jsonl").read_bytes()
    for _ in range(2):  # the second time they are aside
        code, _, message = hub_training.train(capsys, pushed, "--resume", "auto")
        assert code == 2
        assert "none of them can be used" in message
        assert "its manifest is not the one that was pushed" in message
        assert (pushed / "metrics.jsonl").read_bytes() == metrics
