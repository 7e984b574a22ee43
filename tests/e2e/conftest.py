"""Runs that several end-to-end tests look at."""

from pathlib import Path

import pytest

from qa_dist.cli import main
from tests.e2e.hub_training import FLAGS, train
from tests.hub_runs import REPO
from tests.hub_server import HubServer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a Hub, from its first step to its last."""
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = [flag for flag in FLAGS if flag not in ("--hub.repo_id", REPO)]
    with pytest.raises(SystemExit) as exit_:
        main(["train", *flags, "--run.output_dir", str(output_dir)])
    assert exit_.value.code == 0
    return output_dir


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the tries of a push, in this process."""
    monkeypatch.setattr("qa_dist.checkpoint.push_queue.FIRST_WAIT", 0.2)


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run whose state of step 26, an earlier one, and whose model are on the Hub."""
    run = tmp_path / "pushed"
    code, _, message = train(capsys, run)
    assert code == 0, message
    return run
