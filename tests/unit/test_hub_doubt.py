"""One answer of the Hub is no proof that something is not there, or is damaged."""

import hashlib
import json
from pathlib import Path

import pytest

from qa_dist.checkpoint import hub as hub_module
from qa_dist.checkpoint.hub import Repository
from qa_dist.checkpoint.hub_client import HubError, Remedy
from qa_dist.checkpoint.manifest import DamagedError, Manifest, damage
from qa_dist.checkpoint.pull import pull, states
from qa_dist.checkpoint.store import write_manifest
from qa_dist.config import HubConfig, RunConfig
from qa_dist.training import hub_view
from tests.helpers import make_manifest
from tests.hub_runs import REPO, STATES, Runner, require_whole
from tests.hub_server import DROP_IN_BODY, FLIP_BYTE, TRUNCATE, Action, Fault, HubServer, status

pytestmark = pytest.mark.filterwarnings("ignore:Warnings while validating metadata")

CONFIG = RunConfig(hub=HubConfig(repo_id=REPO))
EMPTY = status(200, {"Content-Type": "application/json"}, b"[]")


def absent(code: str) -> Action:
    return status(404, {"X-Error-Code": code})


@pytest.fixture
def runner(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """A repository with a model and states 1 and 2."""
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
    runner = Runner(tmp_path)
    runner.push("model", 2)
    for step in (1, 2):
        runner.push("state", step)
    return runner


DOUBTS = {
    "the repository": ("/revision/main", absent("RepoNotFound")),
    "main": ("/revision/main", absent("RevisionNotFound")),
    "main, without a word": ("/revision/main", status(404)),
    "the branch": (f"/revision/{STATES}", absent("RevisionNotFound")),
    "the repository, when asked for the branch": (f"/revision/{STATES}", absent("RepoNotFound")),
    "who pushed": ("/resolve/.*pushed.json", absent("EntryNotFound")),
    "the files": ("/tree/", EMPTY),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_run_does_not_begin_anew_because_of_one_answer(hub: HubServer, runner: Runner, doubt: str):
    expected = hub_view._look(CONFIG, None, None)
    assert expected.own is not None
    assert expected.own.names == ("step_00000002", "step_00000001")
    path, action = DOUBTS[doubt]
    fault = hub.faults.add(Fault("GET", path, action))
    assert hub_view._look(CONFIG, None, None) == expected
    assert fault.used == 1


def test_a_token_is_not_refused_because_of_one_answer(hub: HubServer, runner: Runner, monkeypatch: pytest.MonkeyPatch):
    """This token may read the repository, and could create none."""
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    expected = Repository(REPO).access()
    hub.faults.add(Fault("GET", "/revision/main", absent("RepoNotFound")))
    assert Repository(REPO).access() == expected


def test_a_repository_that_is_not_there_is_made_and_begun(hub: HubServer):
    view = hub_view._look(CONFIG, None, None)
    assert (view.problem, view.own, view.model) == (None, None, None)
    assert view.main == hub.repo(REPO).resolve("main").sha


# ---------------------------------------------------------------------------------------------- downloads


def shard(hub: HubServer) -> str:
    entry = hub.repo(REPO).files(STATES)["step_00000002/state-00000-of-00002.safetensors"]
    return f"/storage/{entry.sha256}"


def fetch(root: Path) -> Path:
    remote = states(Repository(REPO), STATES)
    assert remote is not None
    return pull(remote, remote.names[0], root, lambda text: None)


@pytest.mark.parametrize(
    "actions",
    [
        (DROP_IN_BODY, FLIP_BYTE),
        (TRUNCATE, FLIP_BYTE),
        (status(503), status(503), FLIP_BYTE),
        (FLIP_BYTE, DROP_IN_BODY, DROP_IN_BODY),
        (status(200, body=b"<html>maintenance</html>" * 1000),),
    ],
    ids=["reset, then wrong", "cut, then wrong", "busy, then wrong", "wrong, then reset", "a long page of a proxy"],
)
def test_a_download_is_damaged_when_it_is_wrong_twice(
    hub: HubServer, runner: Runner, tmp_path: Path, actions: tuple[Action, ...]
):
    path = shard(hub)
    faults = [hub.faults.add(Fault("GET", path, action, after=0)) for action in actions]
    target = fetch(tmp_path / "run")
    assert target.name == "step_00000002"
    assert damage(target, Manifest.read(target)) is None
    assert all(fault.used == 1 for fault in faults)


def test_wrong_bytes_between_broken_connections_are_damage(hub: HubServer, runner: Runner, tmp_path: Path):
    for action in (FLIP_BYTE, DROP_IN_BODY, FLIP_BYTE):
        hub.faults.add(Fault("GET", shard(hub), action))
    with pytest.raises(DamagedError, match="is not what its manifest says"):
        fetch(tmp_path / "run")


@pytest.mark.parametrize(
    ("path", "action"),
    [
        ("/tree/.*/step_00000002", EMPTY),
        ("/tree/.*/step_00000002", absent("EntryNotFound")),
        ("/resolve/.*manifest.json", absent("EntryNotFound")),
        ("/resolve/.*manifest.json", status(404)),
    ],
)
def test_a_state_is_not_passed_over_because_of_one_answer(
    hub: HubServer, runner: Runner, tmp_path: Path, path: str, action: Action
):
    hub.faults.add(Fault("GET", path, action))
    assert hub_view.patiently(lambda: fetch(tmp_path / "run")).name == "step_00000002"


# ---------------------------------------------------------------------------------------------- listings


def test_one_empty_listing_leaves_nothing_behind(hub: HubServer, runner: Runner):
    fault = hub.faults.add(Fault("GET", "/tree/[^/?]*[?]", EMPTY))
    runner.push("state", 3)
    assert fault.used == 1
    require_whole(hub, 3, 2)
    runner.push("state", 4)
    require_whole(hub, 4, 3)


@pytest.mark.parametrize("kept", [(), ("pushed.json", "step_00000002")], ids=["empty", "without a state"])
def test_a_listing_that_lacks_something(hub: HubServer, runner: Runner, kept: tuple[str, ...]):
    """Where it is wrong each time, nothing is pushed; where it was right the second time, all is as ever."""
    items = [
        {"type": "file" if "." in path else "directory", "path": path, "oid": "0" * 40, "size": 1} for path in kept
    ]
    action = status(200, {"Content-Type": "application/json"}, json.dumps(items).encode())
    fault = hub.faults.add(Fault("GET", "/tree/[^/?]*[?]", action, times=1 if kept else None))
    if kept:
        runner.push("state", 3)
        assert fault.used == 1
        require_whole(hub, 3, 2)
        return
    with pytest.raises(HubError, match=r"lists alice/model without pushed\.json") as error:
        runner.push("state", 3)
    assert error.value.remedy is Remedy.RETRY
    require_whole(hub, 2, 1)


def test_states_that_no_pointer_names_are_removed_when_they_are_old(hub: HubServer, runner: Runner, tmp_path: Path):
    """Those of this run; what others have put there stays."""
    repo = hub.repo(REPO)
    pointer = json.loads(repo.read("pushed.json", STATES))
    del pointer["states"]["step_00000001"]  # as an empty listing once had it
    write_manifest(tmp_path, make_manifest(0, run_id="another"))
    foreign = {
        "pushed.json": json.dumps(pointer).encode(),
        "step_00000000/manifest.json": (tmp_path / "manifest.json").read_bytes(),
        "step_00000001/notes.txt": b"beside a state of this run",
        "notes/step_00000001.txt": b"mine",
    }
    repo.commit_as("alice", foreign, branch=STATES)
    runner.push("state", 3)
    files = repo.files(STATES)
    assert not [path for path in files if path.startswith("step_00000001/")]
    assert {"step_00000000/manifest.json", "notes/step_00000001.txt"} <= files.keys()
    asked = [request for request in hub.requests if "step_00000000/manifest.json" in request.path]
    runner.push("state", 4)
    assert asked == [request for request in hub.requests if "step_00000000/manifest.json" in request.path]
    names = json.loads(repo.read("pushed.json", STATES))["states"]
    assert list(names) == ["step_00000004", "step_00000003"]
    assert hashlib.sha256(repo.read("step_00000004/manifest.json", STATES)).hexdigest() == names["step_00000004"]
