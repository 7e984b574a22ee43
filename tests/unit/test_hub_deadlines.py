"""Every request to the Hub ends, whatever the server does: the real client, and a server that trickles."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx2
import pytest

from qa_dist.checkpoint import hub_client
from qa_dist.checkpoint.hub import MAIN, Repository
from qa_dist.checkpoint.hub_client import HubError
from qa_dist.checkpoint.manifest import File
from qa_dist.checkpoint.pull import states
from tests.hub_runs import REPO, STATES, Runner
from tests.hub_server import TRICKLE, TRICKLE_BODY, Action, Fault, HubServer, online, slow_body, status

pytestmark = pytest.mark.filterwarnings("ignore:Warnings while validating metadata")


@pytest.fixture
def runner(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """A repository with a model and a state, and a client with little patience."""
    runner = Runner(tmp_path)
    runner.push("model", 1)
    runner.push("state", 1)
    monkeypatch.setattr(hub_client, "TIMEOUT", httpx2.Timeout(0.4))
    online(monkeypatch, hub.url)  # a new client
    return runner


def commit(runner: Runner) -> object:
    repository = runner.repository
    return repository.commit(MAIN, repository.head(MAIN), {"new.safetensors": os.urandom(100)}, [], "More")


def download(runner: Runner, name: str) -> None:
    content = runner.repository.read(name, MAIN)
    assert content is not None
    source, target = runner.tmp_path / "source", runner.tmp_path / "target"
    source.write_bytes(content)
    runner.repository.download(name, MAIN, target, File.of(source))
    assert target.read_bytes() == content


REQUESTS: dict[str, tuple[str, str, Callable[[Runner], object]]] = {
    "GET at the start: the user": ("GET", "/api/whoami", lambda runner: runner.repository.access()),
    "GET at the start: the repository": ("GET", "/revision/main", lambda runner: runner.repository.access()),
    "GET at the start: the rights": ("GET", "/auth-check", lambda runner: runner.repository.access()),
    "GET at the start: the states": ("GET", f"/revision/{STATES}", lambda runner: states(runner.repository, STATES)),
    "GET of a small file": ("GET", "/resolve/", lambda runner: states(runner.repository, STATES)),
    "GET of a listing": ("GET", "/tree/", lambda runner: runner.repository.tree(MAIN)),
    "GET of all branches": ("GET", "/refs", lambda runner: runner.repository.head_if_any("nowhere")),
    "GET of a file": ("GET", "/resolve/", lambda runner: download(runner, "config.json")),
    "GET of a file, the redirection": ("GET", "/resolve/", lambda runner: download(runner, "model.safetensors")),
    "GET of a file, after a redirection": ("GET", "/storage/", lambda runner: download(runner, "model.safetensors")),
    "POST that creates": ("POST", "/repos/create", lambda runner: Repository("alice/new").create(private=True)),
    "POST before the upload": ("POST", "/preupload/", commit),
    "POST of LFS": ("POST", "/objects/batch", commit),
    "PUT of LFS": ("PUT", "/storage/", commit),
    "POST of LFS after the upload": ("POST", "/lfs-verify", commit),
    "POST of the commit": ("POST", "/commit/", commit),
    "POST of the squash": ("POST", "/super-squash/", lambda runner: runner.repository.squash(MAIN, "One")),
}


def require_end(ask: Callable[[], object]) -> None:
    """Fail if this goes on and on; with an error or, where the client has repeated the request, without."""

    def run() -> None:
        with contextlib.suppress(HubError):
            ask()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


BODIES = ("GET at the start: the user", "GET of a small file", "GET of a listing", "POST of the commit")


@pytest.mark.parametrize(("names", "action"), [(REQUESTS, TRICKLE), (BODIES, TRICKLE_BODY)], ids=["headers", "body"])
def test_an_answer_that_trickles_is_given_up(
    hub: HubServer, runner: Runner, names: Iterable[str], action: Action, subtests: pytest.Subtests
):
    for name in names:
        with subtests.test(name):
            method, path, ask = REQUESTS[name]
            fault = hub.faults.add(Fault(method, path, action))
            require_end(lambda ask=ask: ask(runner))
            assert fault.used == 1
            ask(runner)


def test_one_time_out_covers_all_redirections(hub: HubServer, runner: Runner, monkeypatch: pytest.MonkeyPatch):
    """Each answer in time, but in a chain that is not."""
    monkeypatch.setattr(hub_client, "TIMEOUT", httpx2.Timeout(1.5))
    online(monkeypatch, hub.url)
    again = status(302, {"Location": f"{hub.url}/{REPO}/resolve/{MAIN}/config.json"}, seconds=0.6)
    asked = hub.faults.add(Fault("GET", "/resolve/", again, times=None))
    with pytest.raises(HubError, match="no answer within"):
        runner.repository.read("config.json", MAIN)
    assert asked.used <= 4


def test_what_is_slow_but_steady_may_take_longer_than_the_time_out(hub: HubServer, runner: Runner):
    content = os.urandom(8 * 64 * 1024)
    hub.repo(REPO).commit_as("alice", {"large.bin": content})
    hub.faults.add(Fault("GET", "/storage/", slow_body(0.15), times=None))
    assert runner.repository.read("large.bin", MAIN) == content
