"""States from the Hub: whole and unchanged or not at all, whoever wrote the repository."""

import hashlib
import json
import pickle  # noqa: TID251 -- what must never be opened
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qa_dist.checkpoint import hub as hub_module
from qa_dist.checkpoint import pull as pull_module
from qa_dist.checkpoint.hub import Repository
from qa_dist.checkpoint.hub_client import HubError
from qa_dist.checkpoint.manifest import DamagedError, Manifest, damage
from qa_dist.checkpoint.pull import pull, states
from qa_dist.errors import UserError
from tests.helpers import sealed
from tests.hub_runs import REPO, STATES, Runner, make_state
from tests.hub_server import DROP_IN_BODY, ENDLESS, FLIP_BYTE, TRUNCATE, Action, Fault, HubServer, status

SHARD = "state-00000-of-00002.safetensors"


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path) -> Runner:
    """A repository with states 1 and 2."""
    runner = Runner(tmp_path)
    runner.push("state", 1)
    runner.push("state", 2)
    return runner


def fetch(root: Path, name: str | None = None) -> Path:
    remote = states(Repository(REPO), STATES)
    assert remote is not None
    return pull(remote, name or remote.names[0], root, lambda text: None)


def require_good(directory: Path) -> None:
    assert damage(directory, Manifest.read(directory)) is None


def test_a_state_comes_whole(hub: HubServer, pushed: Runner, tmp_path: Path):
    root = tmp_path / "run/checkpoints"
    target = fetch(root)
    assert target == root / "step_00000002"
    require_good(target)
    assert [path.name for path in root.iterdir()] == ["step_00000002"]
    before = len(hub.requests)
    assert fetch(root) == target  # it is there: only looked at
    assert not [request for request in hub.requests[before:] if "safetensors" in request.path]


def test_states_are_told_newest_first(hub: HubServer, pushed: Runner):
    remote = states(Repository(REPO), STATES)
    assert remote is not None
    assert remote.names == ("step_00000002", "step_00000001")
    assert remote.newest_step == 2
    assert states(Repository(REPO), "no-such-branch") is None
    hub.repo(REPO).commit_as("alice", {"pushed.json": b"not JSON"}, branch=STATES)  # then by their names
    remote = states(Repository(REPO), STATES)
    assert remote is not None
    assert remote.names == ("step_00000002", "step_00000001")


@pytest.mark.parametrize(
    "action",
    [DROP_IN_BODY, TRUNCATE, FLIP_BYTE, status(503), status(429, {"Retry-After": "1"})],
    ids=["reset", "cut short", "a wrong byte", "503", "429"],
)
def test_faults_on_the_way_are_mended(
    hub: HubServer, pushed: Runner, tmp_path: Path, action: Action, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
    hub.faults.add(Fault("GET", "/storage/|/resolve/.*safetensors", action, times=1))
    require_good(fetch(tmp_path / "run"))


def test_a_broken_download_goes_on_where_it_was(hub: HubServer, pushed: Runner, tmp_path: Path):
    hub.faults.add(Fault("GET", "/storage/", TRUNCATE, times=1))
    require_good(fetch(tmp_path / "run"))
    assert [request for request in hub.requests if request.status == 206]


def test_a_byte_that_is_wrong_every_time(hub: HubServer, pushed: Runner, tmp_path: Path):
    hub.faults.add(Fault("GET", "/storage/", FLIP_BYTE, times=None))
    with pytest.raises(DamagedError, match="is not what its manifest says"):
        fetch(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_bytes_without_end_are_not_taken(hub: HubServer, pushed: Runner, tmp_path: Path):
    hub.faults.add(Fault("GET", "/storage/", ENDLESS, times=None))
    with pytest.raises(DamagedError, match="is longer than its manifest says"):
        fetch(tmp_path / "run")


def test_a_full_disk_is_said_before(hub: HubServer, pushed: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pull_module, "ROOM_TO_SPARE", 2**60)
    with pytest.raises(HubError, match=r"has room for .* GB; free some"):
        fetch(tmp_path / "run")


# ------------------------------------------------------------------------------------- a hostile repository


class Trap:
    """Would leave a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def hostile(hub: HubServer, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> None:
    """Put a changed state 3 beside the good ones, as someone may who can write to the repository."""
    directory = tmp_path / "evil"
    make_state(directory, 3)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    manifest = json.loads(files["manifest.json"])
    change(manifest, files)
    if isinstance(manifest.get("files"), dict):
        files["manifest.json"] = sealed(manifest)
    repo = hub.repo(REPO)
    pointer = json.loads(repo.read("pushed.json", STATES))
    digest = hashlib.sha256(files["manifest.json"]).hexdigest()
    pointer["states"] = {"step_00000003": digest} | pointer["states"]
    content = {f"step_00000003/{name}": data for name, data in files.items()}
    repo.commit_as("mallory", content | {"pushed.json": json.dumps(pointer).encode()}, branch=STATES)


def entry(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def with_pickle(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    files["optimizer.pt"] = pickle.dumps(Trap(Path("/tmp/qa_dist-was-fooled")))
    manifest["files"]["optimizer.pt"] = entry(files["optimizer.pt"])


def with_code(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    files["modeling.py"] = b"print('hello')"
    manifest["files"]["modeling.py"] = entry(files["modeling.py"])


def with_climbing_path(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["files"]["../../../climbed.json"] = entry(b"{}")


def with_absolute_path(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["files"]["/tmp/climbed.json"] = entry(b"{}")


def with_second_manifest(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["files"]["manifest.json"] = entry(b"{}")


def with_too_many_files(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["files"] |= {f"f{i}.json": entry(b"{}") for i in range(6000)}


def with_ten_million_entries(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    files["manifest.json"] = b'{"files": {' + b'"a.json": {},' * 3_000_000 + b"}}"
    manifest["files"] = None


def with_depth(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    files["manifest.json"] = b"[" * 100_000
    manifest["files"] = None


def with_size_too_small(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["files"][SHARD]["size"] = 10


def with_size_too_large(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["files"][SHARD] |= {"size": 10**15, "chunks": []}


def with_size_below_zero(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["files"][SHARD]["size"] = -1


def with_other_bytes(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    files[SHARD] = bytes(len(files[SHARD]))


def with_a_file_less(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    del files[SHARD]


def with_empty_lists(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    files["manifest.json"] = b'{"files": [' + b"[]," * 4_000_000 + b"[]]}"
    manifest["files"] = None


def with_an_endless_step(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["progress"]["step"] = 10**30


def with_steps_that_were_not_done(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["progress"]["batches_done"] = 2


def with_text_for_history(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["progress"]["history"] = "x"


def with_a_sum_that_is_no_number(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["progress"]["loss_sum"] = float("nan")


def with_deep_settings(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    inner: Any = {}
    for _ in range(500):
        inner = {"a": inner}
    manifest["config"] = inner


HOSTILE = {
    with_empty_lists: "more entries than a manifest can have",
    with_an_endless_step: "progress.step: Input should be less than",
    with_steps_that_were_not_done: "3 steps are not 0 before the epoch and 2 of its batches",
    with_text_for_history: "progress.history: Input should be a valid list",
    with_a_sum_that_is_no_number: "NaN is not JSON",
    with_deep_settings: "its manifest cannot be read",
    with_pickle: "a file of a kind that no state has: 'optimizer.pt'",
    with_code: "a file of a kind that no state has: 'modeling.py'",
    with_climbing_path: "names a file outside of its directory",
    with_absolute_path: "names a file outside of its directory",
    with_second_manifest: "names a file outside of its directory: 'manifest.json'",
    with_too_many_files: "names 6,004 files|names 6,003 files",
    with_ten_million_entries: "more than 16,777,216 bytes",
    with_depth: "its manifest cannot be read",
    with_size_too_small: "instead of 10",
    with_size_too_large: "instead of 1,000,000,000,000,000",
    with_size_below_zero: "files.state-00000-of-00002.safetensors.size: Input should be greater than or equal to 0",
    with_other_bytes: "is not what its manifest says",
    with_a_file_less: "is missing",
}


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_a_hostile_state_is_refused(hub: HubServer, pushed: Runner, tmp_path: Path, change: Any):
    hostile(hub, tmp_path, change)
    root = tmp_path / "deep/er/run"
    with pytest.raises((DamagedError, HubError), match=HOSTILE[change]):
        fetch(root)
    assert not root.exists() or not list(root.iterdir())
    assert not list(tmp_path.rglob("climbed.json"))
    assert not Path("/tmp/qa_dist-was-fooled").exists()
    fetch(root, "step_00000002")  # the one before is good


def test_a_manifest_of_another_state_is_noticed(hub: HubServer, pushed: Runner, tmp_path: Path):
    repo = hub.repo(REPO)
    other = repo.read("step_00000001/manifest.json", STATES)
    repo.commit_as("mallory", {"step_00000002/manifest.json": other}, branch=STATES)
    with pytest.raises(DamagedError, match="its manifest is not the one that was pushed"):
        fetch(tmp_path / "run")


def test_a_newer_schema_is_not_guessed_at(hub: HubServer, pushed: Runner, tmp_path: Path):
    def newer(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        manifest["schema_version"] = 99

    hostile(hub, tmp_path, newer)
    with pytest.raises(UserError, match="update qa_dist"):
        fetch(tmp_path / "run")


def test_an_old_cache_is_never_taken_for_the_hub(hub: HubServer, pushed: Runner, tmp_path: Path):
    """The client itself falls back to what it has fetched before."""
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, revision=STATES)
    for action in (status(503), status(404), status(401)):
        hub.faults.clear()
        hub.faults.add(Fault("GET", "/revision/", action, times=None))
        with pytest.raises(HubError):
            states(Repository(REPO), STATES)
