"""A push that makes no progress is cancelled where another waits, and a cancelled one commits nothing: the real client,
with Xet and without, and a Hub of the test's own."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qa_dist.checkpoint import push_queue
from qa_dist.checkpoint.attempt import POOL
from qa_dist.checkpoint.hub_client import HubError
from qa_dist.checkpoint.push_queue import Event, Push, PushQueue
from tests.hub_runs import REPO, STATES, Runner, require_whole
from tests.hub_server import DROP, Action, Fault, HubServer, hang, status

pytestmark = [
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),
]


@pytest.fixture
def runner(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    monkeypatch.setattr(push_queue, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(push_queue, "STUCK", 1.0)
    monkeypatch.setattr(push_queue, "GRACE", 0.5)
    # the client's own waits between its tries of an upload
    short = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.3)))
    monkeypatch.setattr("huggingface_hub.utils._http.time", short)
    yield Runner(tmp_path)
    hub.close()
    while [thread for thread in threading.enumerate() if thread.name.startswith(("push-state", "push-model", POOL))]:
        time.sleep(0.02)


@pytest.fixture
def xet(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.xet = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")


def until(queue: PushQueue, happened: Callable[[Event], bool]) -> list[Event]:
    """What has happened up to an event."""
    events: list[Event] = []
    while not any(happened(event) for event in events):
        time.sleep(0.02)
        events += queue.events()
    return events


def small_model(runner: Runner, step: int) -> Push:
    """A model whose files are committed without an upload."""
    push = runner.make("model", step)
    (push.directory / "model.safetensors").unlink()
    return push


def titles(hub: HubServer, branch: str) -> list[str]:
    return [commit.title for commit in hub.repo(REPO).commits(branch)]


XET_FAULTS = {
    "xorbs, 503": ("POST", "/v1/xorbs/", status(503)),
    "xorbs, no answer": ("POST", "/v1/xorbs/", hang()),
    "shards, 503": ("POST", "/v1/shards", status(503)),
    "the token of the branch, 503": ("GET", f"/xet-write-token/{STATES}", status(503)),
    "the token of the branch, no answer": ("GET", f"/xet-write-token/{STATES}", hang()),
}
LFS_FAULTS = {
    "LFS, 503": ("PUT", "/storage/", status(503)),
    "LFS, dropped": ("PUT", "/storage/", DROP),
    "batch, 503": ("POST", "/objects/batch", status(503)),
}


def try_it(hub: HubServer, runner: Runner, fault: tuple[str, str, Action]) -> None:
    """The model and the newer state do not wait for a state that is tried again and again; no try is lost."""
    hub.faults.add(Fault(*fault, times=None))
    queue = PushQueue(runner.publication.push)
    queue.submit(runner.make("state", 1))
    model = small_model(runner, 1)
    queue.submit(model)
    events = until(queue, lambda event: event.push is model and event.what == "pushed")
    retried = next(event for event in events if event.what == "retrying")
    assert retried.push.name == "state of step 1"
    assert "no progress, so it was cancelled" in retried.reason
    queue.submit(runner.make("state", 2))
    hub.faults.clear()
    summary = queue.drain(60)
    assert not summary.missing
    assert set(summary.pushed) >= {"model of step 1", "state of step 2"}
    assert not summary.failed
    require_whole(hub, *([2] if "state of step 1" in summary.superseded else [2, 1]))
    assert titles(hub, "main") == ["Model of step 1", "initial commit"]
    assert titles(hub, STATES).count("State of step 2") <= 1


@pytest.mark.usefixtures("xet")
@pytest.mark.parametrize("fault", XET_FAULTS)
def test_what_xet_repeats_holds_nothing_up(hub: HubServer, runner: Runner, fault: str):
    try_it(hub, runner, XET_FAULTS[fault])


@pytest.mark.parametrize("fault", LFS_FAULTS)
def test_what_lfs_repeats_holds_nothing_up(hub: HubServer, runner: Runner, fault: str):
    try_it(hub, runner, LFS_FAULTS[fault])


@pytest.mark.usefixtures("xet")
def test_a_newer_state_takes_the_place_of_one_that_xet_repeats(hub: HubServer, runner: Runner):
    hub.faults.add(Fault("POST", "/v1/xorbs/", status(503), times=None))
    queue = PushQueue(runner.publication.push)
    first = runner.make("state", 1)
    queue.submit(first)
    while not any("/v1/xorbs/" in request.path for request in hub.requests):
        time.sleep(0.02)
    queue.submit(runner.make("state", 2))
    events = until(queue, lambda event: event.push is first and event.what != "retrying")
    assert [(event.push.step, event.what) for event in events] == [(1, "superseded")]
    assert "no progress, so it was cancelled" in events[-1].reason
    hub.faults.clear()
    assert queue.drain(60).pushed == ["state of step 2"]
    require_whole(hub, 2)


def test_what_was_left_behind_commits_nothing_later(hub: HubServer, runner: Runner):
    """A thread that does not end when its try is cancelled, and comes back when a newer state has landed."""
    go, came_back = threading.Event(), threading.Event()

    def push(push: Push, count_commit: Callable[[], None]) -> None:
        if push.step == 1:
            with pytest.raises(HubError):
                runner.repository.head("main")
            assert go.wait(60)
            came_back.set()
        runner.publication.push(push, count_commit)

    hub.faults.add(Fault("GET", "/revision/", status(503)))
    queue = PushQueue(push)
    first = runner.make("state", 1)
    queue.submit(first)
    while not hub.requests or hub.requests[-1].status != 503:
        time.sleep(0.02)
    queue.submit(runner.make("state", 2))
    until(queue, lambda event: event.push is first and event.what == "superseded")
    assert queue.drain(60).pushed == ["state of step 2"]
    before, asked = hub.repo(REPO).branches, len(hub.requests)
    go.set()
    assert came_back.wait(60)
    while [thread for thread in threading.enumerate() if thread.name == "push-state"]:
        time.sleep(0.02)
    assert hub.repo(REPO).branches == before
    assert len(hub.requests) == asked
    require_whole(hub, 2)


@pytest.mark.usefixtures("xet")
def test_what_drain_gives_up_commits_nothing_later(hub: HubServer, runner: Runner):
    hub.faults.add(Fault("GET", "/xet-write-token/", hang(2.0)))
    queue = PushQueue(runner.publication.push)
    queue.submit(runner.make("state", 1))
    before = hub.repo(REPO).branches
    while not hub.faults._faults[0].used:
        time.sleep(0.02)
    assert "not done within 0.1 s" in queue.drain(0.1).missing["state of step 1"]
    while not any("/xet-write-token/" in request.path for request in hub.requests):
        time.sleep(0.02)
    time.sleep(1.0)
    assert hub.repo(REPO).branches.get("main") == before["main"]
    assert not [title for title in titles(hub, "main") if "State" in title]
    assert STATES not in hub.repo(REPO).branches or "State of step 1" not in titles(hub, STATES)


def test_a_commit_that_takes_its_time_is_not_cancelled(hub: HubServer, runner: Runner):
    hub.faults.add(Fault("POST", f"/commit/{STATES}", hang(3.0)))
    queue = PushQueue(runner.publication.push)
    queue.submit(runner.make("state", 1))
    queue.submit(runner.make("model", 1))
    summary = queue.drain(60)
    assert summary.pushed == ["state of step 1", "model of step 1"]
    assert not [event for event in queue.events() if event.what == "retrying"]
