"""Training runs of seconds that push to the tests' Hub."""

import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist.checkpoint.store import directory_name
from tests.e2e.test_checkpoints import DROPOUT, qa_dist
from tests.helpers import jsonl, tiny_flags
from tests.hub_runs import REPO, STATES, require_whole
from tests.hub_server import HubServer

FLAGS = [*tiny_flags(**{"model.config": DROPOUT, "checkpoint.every": "4 steps"}), "--hub.repo_id", REPO]
LAST = 26


def train(capsys: pytest.CaptureFixture[str], output_dir: Path, *args: object) -> tuple[int, str, str]:
    return qa_dist(capsys, "train", *FLAGS, "--run.output_dir", output_dir, *args)


def losses(output_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in jsonl(output_dir / "metrics.jsonl") if line["kind"] == "train"}


def status_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def steps_of(hub: HubServer) -> list[int]:
    """Of the states on the Hub, newest first; all of them whole. Which there are beside the last depends on how fast
    the machine is: the newest wins."""
    steps = [int(name[-8:]) for name in json.loads(hub.repo(REPO).read("pushed.json", STATES))["states"]]
    require_whole(hub, *steps)
    return steps


def forget(hub: HubServer, step: int) -> None:
    """Remove a state from the Hub, as a person may."""
    repo, folder = hub.repo(REPO), directory_name(step)
    gone = {path: None for path in repo.files(STATES) if path.startswith(folder)}
    repo.commit_as("alice", gone, branch=STATES)
