"""What the last lines of a run tell its user to do."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from qa_dist.training.next_steps import after_completion, after_stop, command_of_this_process, resuming, shortened


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("qa-dist train --a 1", "qa-dist train --a 1 --resume auto"),
        ("qa-dist train --resume none --a 1", "qa-dist train --a 1 --resume auto"),
        ("qa-dist train --resume=hub:me/x --a 1", "qa-dist train --a 1 --resume auto"),
        ("qa-dist train --a 'x y' --resume", "qa-dist train --a 'x y' --resume auto"),
    ],
)
def test_the_command_that_resumes(command: str, expected: str):
    assert shlex.join(resuming(shlex.split(command))) == expected


def test_the_newest_complete_checkpoint_is_named(tmp_path: Path):
    run = tmp_path / "a run"
    assert after_stop(run, ["qa-dist", "train"]) == []
    for name in ("step_00000009", "step_100000000", "step_00000020", "step_00000030", ".step_00000040.tmp"):
        (run / "checkpoints" / name).mkdir(parents=True)
        if name != "step_00000030":
            (run / "checkpoints" / name / "manifest.json").touch()
    where, how = after_stop(run, None)
    assert where == f"checkpoint of step 100000000: {run}/checkpoints/step_100000000"
    assert how == "to resume: start the same command with --resume auto"


def test_commands_are_quoted_for_a_shell(tmp_path: Path):
    run = tmp_path / "it's a run"
    run.mkdir()
    assert [shlex.split(line, comments=True) for line in after_completion(run)] == [["qa-dist", "report", str(run)]]
    (run / "model").mkdir()
    assert shlex.split(after_completion(run)[1], comments=True) == ["qa-dist", "serve", "--model", str(run / "model")]


def test_commands_are_shown_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "bin" / "qa-dist"
    script.parent.mkdir()
    script.touch(mode=0o755)
    assert shortened([sys.executable, str(script), "train"]) == [str(script), "train"]
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    assert shortened([sys.executable, str(script), "train"]) == ["qa-dist", "train"]
    assert shortened(["python", "-m", "qa_dist", "train"]) == ["python", "-m", "qa_dist", "train"]


def test_a_command_that_is_not_the_users_own_is_not_shown(monkeypatch: pytest.MonkeyPatch):
    typed = ["python", "-m", "qa_dist", "train", "--a", "1"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert command_of_this_process({}) == typed
    assert command_of_this_process({"SLURM_JOB_ID": "7"}) is None
    assert command_of_this_process({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}) is None
    assert command_of_this_process({"LOCAL_RANK": "0"}) is None  # by a launcher that is not known
    monkeypatch.setattr(sys, "orig_argv", ["python", "program.py"])  # which calls main()
    assert command_of_this_process({}) is None
