"""What lies where on the Hub, whatever goes wrong on the way: the real client, and a Hub of the test's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qa_dist.checkpoint import hub as hub_module
from qa_dist.checkpoint import hub_client, hub_network
from qa_dist.checkpoint.hub import Repository
from qa_dist.checkpoint.hub_client import HubError, Remedy
from qa_dist.checkpoint.ownership import ConflictError
from qa_dist.checkpoint.publication import Found, Pointer, require_usable
from qa_dist.checkpoint.push_queue import Push, PushQueue
from tests.hub_runs import REPO, STATES, Runner, make_state, require_whole
from tests.hub_server import (
    DROP,
    DROP_IN_BODY,
    ENDLESS,
    LOST_ANSWER,
    Action,
    Fault,
    HubServer,
    User,
    hang,
    online,
    status,
)

pytestmark = pytest.mark.filterwarnings("ignore:Warnings while validating metadata")


@pytest.fixture
def runner(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr("qa_dist.checkpoint.push_queue.FIRST_WAIT", 0.1)
    return Runner(tmp_path)


def commits(hub: HubServer, branch: str) -> list[str]:
    """Their titles, the oldest first, without the repository's first one."""
    return [commit.title for commit in reversed(hub.repo(REPO).commits(branch))][1:]


def test_what_lies_where(hub: HubServer, runner: Runner):
    runner.push("model", 10)
    runner.push("state", 10)
    repo = hub.repo(REPO)
    assert set(repo.files("main")) == {
        *(".gitattributes", "README.md", "config.json", "model.safetensors", "pushed.json")
    }
    assert repo.read("model.safetensors", "main") == b"weights 10"
    assert set(repo.files(STATES)) == {
        *(".gitattributes", "pushed.json"),  # the branch began as a copy of main: its model is gone
        *(f"step_00000010/{name}" for name in ("config.json", "manifest.json")),
        *(f"step_00000010/state-0000{rank}-of-00002.safetensors" for rank in (0, 1)),
    }
    require_whole(hub, 10)
    assert commits(hub, "main") == ["Model of step 10"]
    assert commits(hub, STATES)[-1] == "State of step 10"


def test_only_the_last_states_stay_and_their_storage_is_bounded(hub: HubServer, runner: Runner):
    sizes = []
    for step in range(1, 31):
        runner.push("state", step)
        sizes.append(hub.repo(REPO).stored_bytes())
        assert len(hub.repo(REPO).commits(STATES)) <= 4
    require_whole(hub, 30, 29)
    assert max(sizes[4:]) <= max(sizes[:4])  # however long the run
    posts = [r for r in hub.requests if r.method == "POST" and f"/commit/{STATES}" in r.path]
    assert len(posts) == 30  # one a checkpoint


def test_a_state_of_the_same_step_is_replaced_as_a_whole(hub: HubServer, runner: Runner, tmp_path: Path):
    runner.push("state", 5)
    directory = tmp_path / "one-shard"
    make_state(directory, 5, shards=1)
    runner.publication.push(Push("state", 5, directory), lambda: None)
    require_whole(hub, 5)
    assert "step_00000005/state-00001-of-00002.safetensors" not in hub.repo(REPO).files(STATES)


def test_states_of_a_future_that_was_given_up_go(hub: HubServer, runner: Runner):
    for step in (10, 20, 30):
        runner.push("state", step)
    runner.push("state", 25)  # gone on from 20, as 30 was damaged
    require_whole(hub, 25, 20)


FAULTS: dict[str, tuple[str, str, Action]] = {
    "500 for the head": ("GET", "/api/models/alice/model/revision", status(500)),
    "502, a page of a proxy": ("POST", "/commit/", status(502, body=b"<html>bad gateway</html>")),
    "503 for the commit": ("POST", "/commit/", status(503)),
    "504 for the tree": ("GET", "/tree/", status(504)),
    "429": ("POST", "/commit/", status(429, {"Retry-After": "1"})),
    "an answer that is no answer": ("POST", "/commit/", status(200, body=b"<html>maintenance</html>")),
    "an answer about nothing": ("GET", "/revision/", status(200, body=b"{}")),
    "a connection closed at the commit": ("POST", "/commit/", DROP),
    "a connection reset in the commit": ("POST", "/commit/", DROP_IN_BODY),
    "a connection reset in an upload": ("PUT", "", DROP_IN_BODY),
    "a lost answer": ("POST", "/commit/", LOST_ANSWER),
    "a lost answer of the branch": ("POST", "/branch/", LOST_ANSWER),
    "a lost answer of the squash": ("POST", "/super-squash/", LOST_ANSWER),
    "no squash": ("POST", "/super-squash/", status(500)),
    "403 of the storage": ("PUT", "", status(403)),
    "a refusal that passes": ("POST", "/commit/", status(403)),
    "not found for a moment": ("POST", "/preupload/", status(404)),
    "a hub that takes its time": ("POST", "/commit/", hang(1.0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_waited_out(hub: HubServer, runner: Runner, fault: str):
    runner.push("state", 1)
    runner.push("model", 1)
    before = len(commits(hub, "main"))
    method, path, action = FAULTS[fault]
    hub.faults.add(Fault(method, path, action, times=1))
    summary = runner.queued(runner.make("state", 2), runner.make("model", 2))
    assert not summary.missing, summary
    hub.faults.clear()
    require_whole(hub, 2, 1)
    assert hub.repo(REPO).read("model.safetensors", "main") == b"weights 2"
    assert len(commits(hub, "main")) == before + 1  # not twice
    assert commits(hub, STATES).count("State of step 2") <= 1


@pytest.mark.parametrize("path", ["/commit/", "/revision/", "/tree/", "/preupload/"])
def test_a_hub_that_hangs_is_given_up_and_tried_again(
    hub: HubServer, tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch, path: str
):
    monkeypatch.setattr(hub_client, "TIMEOUT", hub_client.httpx2.Timeout(0.5))
    online(monkeypatch, hub.url)  # a new client
    runner = Runner(tmp_path)
    hub.faults.add(Fault("", path, hang(), times=1))
    summary = runner.queued(runner.make("state", 1))
    assert summary.pushed == ["state of step 1"]
    require_whole(hub, 1)


def test_a_foreign_commit_in_between(hub: HubServer, runner: Runner, monkeypatch: pytest.MonkeyPatch):
    """412: the head is read again, and both commits stay."""
    runner.push("state", 1)
    create_commit = runner.repository._api.create_commit
    foreign = []

    def with_a_foreign_one(*args: object, **options: object) -> object:
        if not foreign:
            foreign.append(hub.repo(REPO).commit_as("somebody", {"notes.txt": b"mine"}, branch=STATES))
        return create_commit(*args, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(runner.repository._api, "create_commit", with_a_foreign_one)
    assert not runner.queued(runner.make("state", 2)).missing
    assert any(request.status == 412 for request in hub.requests)
    assert hub.repo(REPO).read("notes.txt", STATES) == b"mine"
    require_whole(hub, 2, 1)


def test_a_token_that_is_revoked(hub: HubServer, runner: Runner):
    runner.push("state", 1)
    del hub.tokens["hf_alice"]
    summary = runner.queued(runner.make("state", 2), runner.make("model", 2))
    assert set(summary.missing) == {"state of step 2", "model of step 2"}
    assert "401" in summary.missing["state of step 2"]
    assert "hf_alice" not in str(summary)
    hub.tokens["hf_alice"] = User("alice")
    assert not runner.queued(runner.make("state", 3)).missing
    require_whole(hub, 3, 1)


def test_a_repository_that_is_deleted_is_not_made_again(hub: HubServer, runner: Runner):
    runner.push("state", 1)
    hub.delete_repo(REPO)
    summary = runner.queued(runner.make("state", 2), runner.make("model", 2))
    assert "the repository is not there" in summary.missing["model of step 2"]
    assert "the repository is not there" in summary.missing["state of step 2"]
    with pytest.raises(KeyError):
        hub.repo(REPO)


def test_two_runs_do_not_mix(hub: HubServer, runner: Runner, tmp_path: Path):
    other = Runner(tmp_path, run="other")
    runner.push("state", 1)
    runner.push("model", 1)
    summary = other.queued(other.make("state", 7), other.make("model", 7))
    assert "another run pushes to alice/model too (it is at step 1)" in summary.missing["state of step 7"]
    assert "model of step 7" in summary.missing
    runner.push("state", 2)
    require_whole(hub, 2, 1)
    assert hub.repo(REPO).read("model.safetensors", "main") == b"weights 1"


def test_the_same_run_started_twice(hub: HubServer, runner: Runner, tmp_path: Path):
    """The later start goes on with what it found; the earlier one sees that, and stops pushing."""
    runner.push("state", 1)
    later = Runner(tmp_path)
    later.publication.identity.known.add(runner.publication.identity.attempt)
    later.push("state", 2)
    with pytest.raises(ConflictError, match="this run, started a second time, pushes to"):
        runner.push("state", 3)
    later.push("state", 4)
    require_whole(hub, 4, 2)


def test_a_run_that_could_not_ask_before_recognizes_its_own(hub: HubServer, runner: Runner, tmp_path: Path):
    runner.push("state", 1)
    runner.push("model", 1)
    for run, failures in (("r", 0), ("other", 2)):
        unsettled = Runner(tmp_path, run=run, settled=False)
        summary = unsettled.queued(unsettled.make("state", 2), unsettled.make("model", 2))
        assert len(summary.missing) == failures, summary


def test_an_older_copy_of_the_run_does_not_undo_the_newer(hub: HubServer, runner: Runner, tmp_path: Path):
    for step in (38, 39):
        runner.push("state", step)
    runner.push("model", 39)
    older = Runner(tmp_path, settled=False)
    summary = older.queued(older.make("state", 26), older.make("model", 26))
    assert len(summary.missing) == 2
    assert (
        "is at step 39 of this run already, and this is step 26: an older copy" in summary.missing["state of step 26"]
    )
    require_whole(hub, 39, 38)
    assert hub.repo(REPO).read("model.safetensors") == b"weights 39"


@pytest.mark.parametrize(
    "action", [status(404), status(404, {"X-Error-Code": "EntryNotFound"}), status(200, body=b"<html>"), status(503)]
)
def test_who_pushed_is_not_guessed_at(hub: HubServer, runner: Runner, tmp_path: Path, action: Action):
    """A pointer that cannot be read just now is not taken for none."""
    runner.push("state", 100)
    other = Runner(tmp_path, run="other")
    hub.faults.add(Fault("GET", "/resolve/.*/pushed.json", action, times=None))
    with pytest.raises(HubError):
        other.push("state", 8)
    hub.faults.clear()
    with pytest.raises(ConflictError):
        other.push("state", 8)
    require_whole(hub, 100)


def test_what_is_not_ours_is_not_overwritten(hub: HubServer, runner: Runner):
    repo = hub.repo(REPO)

    def look() -> None:
        repository = runner.repository
        states = repository.head_if_any(STATES)
        require_usable(repository, "r", Found(repository.head("main"), None), STATES, Found(states, None))

    look()
    repo.commit_as("alice", {"pytorch_model.bin": b"years of work"}, branch="main")
    with pytest.raises(ConflictError, match=r"holds a model already \(pytorch_model.bin\)"):
        look()
    with pytest.raises(ConflictError, match="holds a model already"):
        runner.push("model", 1)
    repo.commit_as("alice", {"pytorch_model.bin": None}, branch="main")
    repo.create_branch(STATES)
    repo.commit_as("alice", {"step_00000100/mine.txt": b"mine"}, branch=STATES)
    with pytest.raises(ConflictError, match=r"the branch training-state of alice/model holds step_00000100"):
        look()
    with pytest.raises(ConflictError, match="name another"):
        runner.push("state", 1)
    assert repo.read("step_00000100/mine.txt", STATES) == b"mine"


def test_a_folder_of_a_person_on_our_branch_stays(hub: HubServer, runner: Runner):
    runner.push("state", 1)
    hub.repo(REPO).commit_as("alice", {"step_00000007/mine.txt": b"mine"}, branch=STATES)
    for step in (2, 3, 4):
        runner.push("state", step)
    assert hub.repo(REPO).read("step_00000007/mine.txt", STATES) == b"mine"


def test_the_model_does_not_stay_on_the_branch_of_states(hub: HubServer, runner: Runner, tmp_path: Path):
    """The branch begins as a copy of main, also where the first commit to it fails, or another process makes it."""
    runner.push("model", 1)
    hub.faults.add(Fault("POST", f"/commit/{STATES}", status(503), times=1))
    with pytest.raises(HubError):
        runner.push("state", 1)
    later = Runner(tmp_path)
    later.publication.identity.known.add(runner.publication.identity.attempt)
    later.push("state", 2)
    assert {path.partition("/")[0] for path in hub.repo(REPO).files(STATES)} <= {
        *(".gitattributes", "README.md", "pushed.json", "step_00000002")
    }
    assert hub.repo(REPO).read("model.safetensors") == b"weights 1"


def test_storage_is_bounded_however_often_the_run_is_preempted(hub: HubServer, tmp_path: Path, runner: Runner):
    known: set[str] = set()
    for attempt in range(6):
        later = Runner(tmp_path, keep=3)
        later.publication.identity.known |= known
        known.add(later.publication.identity.attempt)
        for step in (1, 2):
            later.push("state", 10 * attempt + step)
        assert len(hub.repo(REPO).commits(STATES)) <= 4


def test_a_card_written_by_hand_stays(hub: HubServer, runner: Runner):
    repo = hub.repo(REPO)
    repo.commit_as("alice", {"README.md": b"---\nlicense: mit\n---\n"}, branch="main")
    runner.push("model", 1)
    assert repo.read("README.md", "main") == b"# Model of step 1\n"  # a stub is no text of a person
    repo.commit_as("alice", {"README.md": b"# What I found\n"}, branch="main")
    for step in (2, 3):
        runner.push("model", step)
        assert repo.read("README.md", "main") == b"# What I found\n"
        assert repo.read("model.safetensors", "main") == f"weights {step}".encode()
    assert runner.publication.notes == ["hub: the README.md of alice/model was written by hand and stays as it is"]


def test_files_that_the_model_has_no_more_go_and_logs_stay(hub: HubServer, runner: Runner, tmp_path: Path):
    runner.push("model", 1, **{"model-00002.safetensors": "part", "tensorboard__a": "log"})
    later = Runner(tmp_path)
    later.publication.identity.known.add(runner.publication.identity.attempt)
    later.push("model", 2, tensorboard__b="log")
    files = set(hub.repo(REPO).files("main"))
    assert "model-00002.safetensors" not in files
    assert {"tensorboard/a", "tensorboard/b"} <= files


def test_an_ignore_file_does_not_eat_a_state_in_silence(
    hub: HubServer, runner: Runner, monkeypatch: pytest.MonkeyPatch
):
    """What a commit leaves out is noticed, whyever it does."""
    prepare = hub_module.CommitOperationAdd.__post_init__

    def ignored(self: hub_module.CommitOperationAdd) -> None:
        prepare(self)
        self.__dict__["_ignored"] = self.path_in_repo.endswith("config.json")

    monkeypatch.setattr(hub_module.CommitOperationAdd, "__post_init__", ignored)
    monkeypatch.setattr(
        hub_module.CommitOperationAdd,
        "_should_ignore",
        property(lambda self: self.__dict__["_ignored"], lambda self, value: None),
        raising=False,
    )
    summary = runner.queued(runner.make("state", 1))
    assert "config.json was pushed, but is not there (does a .gitignore name it?)" in str(summary.missing)


def test_a_card_that_the_hub_refuses_does_not_hold_back_the_model(hub: HubServer, runner: Runner):
    runner.push("model", 1, **{"README.md": "---\nlicense: [a, b\n---\n# Model\n"})
    assert hub.repo(REPO).read("model.safetensors", "main") == b"weights 1"
    assert "README.md" not in hub.repo(REPO).files("main")
    assert "the model card is not pushed: Invalid metadata" in runner.publication.notes[0]


def test_each_node_uploads_its_shards_and_one_commits(hub: HubServer, runner: Runner, tmp_path: Path):
    """Nodes with disks of their own: the main process has no file of the others."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    from qa_dist.training.node_uploads import NodeUploads

    main_store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    node_store = TCPStore("127.0.0.1", main_store.port, is_master=False)
    main = NodeUploads(main_store, runner.repository)
    node = NodeUploads(node_store, Repository(REPO))
    runner.publication.wait_for_shards = main.wait_for
    on_main, on_node = runner.make("state", 3), runner.make("state", 3)
    (on_main.directory / "state-00001-of-00002.safetensors").unlink()
    for name in ("state-00000-of-00002.safetensors", "config.json"):
        (on_node.directory / name).unlink()
    queues = [PushQueue(runner.publication.push), PushQueue(node.upload)]
    queues[0].submit(on_main)
    hub.faults.add(Fault("PUT", "", status(503), times=1))
    queues[1].submit(on_node)
    assert not queues[0].drain(60).missing
    require_whole(hub, 3)
    assert len(commits(hub, STATES)) == 1
    for queue in queues:
        queue.close()


def test_a_node_whose_uploads_fail_is_heard(hub: HubServer, runner: Runner, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qa_dist.training.node_uploads.PATIENCE", 0.1)
    from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

    from qa_dist.training.node_uploads import NodeUploads

    uploads = NodeUploads(HashStore(), runner.repository)
    runner.publication.wait_for_shards = uploads.wait_for
    on_main, on_node = runner.make("state", 3), runner.make("state", 3)
    (on_main.directory / "state-00001-of-00002.safetensors").unlink()
    hub.faults.add(Fault("POST", "/preupload/", status(403), times=1))
    with pytest.raises(HubError):
        uploads.upload(replace(on_node), lambda: None)
    with pytest.raises(HubError, match=r"state-00001-of-00002.safetensors has not been .* 403") as error:
        runner.publication.push(on_main, lambda: None)
    assert error.value.remedy is Remedy.RETRY


def test_access_is_seen_without_a_change(hub: HubServer, runner: Runner, monkeypatch: pytest.MonkeyPatch):
    def problem(repo_id: str, token: str) -> str | None:
        monkeypatch.setenv("HF_TOKEN", token)
        return Repository(repo_id).access().problem

    assert problem(REPO, "hf_alice") is None
    assert problem("alice/new", "hf_alice") is None
    assert "for reading only" in (problem("alice/new", "hf_reader") or "")
    assert "may" in (problem(REPO, "hf_reader") or "")
    assert "cannot create one for 'alice'" in (problem("alice/new", "hf_bob") or "")
    with pytest.raises(HubError, match="the token may not do that: 401"):
        problem(REPO, "hf_nonsense")
    with pytest.raises(KeyError):
        hub.repo("alice/new")


def test_a_hub_that_asks_for_a_hundred_hours(hub: HubServer, runner: Runner):
    hub.faults.add(Fault("POST", "/commit/", status(429, {"Retry-After": "360000"}), times=1))
    with pytest.raises(HubError) as error:
        runner.push("state", 1)
    assert error.value.retry_after == hub_client.MOST_PATIENCE


def test_an_answer_that_drips(hub: HubServer, runner: Runner, monkeypatch: pytest.MonkeyPatch):
    """Each piece comes in time, but it would take for ever."""
    monkeypatch.setattr(hub_client, "TIMEOUT", hub_client.httpx2.Timeout(0.3))
    monkeypatch.setattr(hub_network, "SLOWEST", 1e12)
    online(monkeypatch, hub.url)  # a new client
    hub.faults.add(Fault("GET", "/resolve/", ENDLESS, times=1))
    with pytest.raises(HubError, match="no answer within"):
        runner.repository.read(".gitattributes", "main", 2**40)


def test_offline_is_said(hub: HubServer, runner: Runner, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert runner.queued(runner.make("state", 1)).missing == {
        "state of step 1": "HF_HUB_OFFLINE is set, so the Hub is not asked"
    }


def test_the_history_of_models_is_bounded(hub: HubServer, tmp_path: Path):
    """Whatever people have written stays: their files, a card, a tag, another branch; and an earlier process counts."""
    repo, known = None, set()
    for attempt in range(3):
        runner = Runner(tmp_path, keep_models=2)
        runner.publication.identity.known |= known
        known.add(runner.publication.identity.attempt)
        repo = hub.repo(REPO)
        if attempt == 0:
            repo.commit_as("alice", {"README.md": b"# Mine\n", "notes.txt": b"mine"})
            repo.create_tag("v0")
            repo.create_branch("mine")
        for step in (10 * attempt + 1, 10 * attempt + 2):
            runner.push("model", step)
            models = [commit for commit in repo.commits() if commit.title.startswith("Model of step")]
            assert 0 < len(models) <= 2
            assert repo.read("model.safetensors") == f"weights {step}".encode()
            assert repo.read("README.md") == b"# Mine\n"
            assert repo.read("notes.txt") == b"mine"
        runner.push("state", 10 * attempt + 2)
    assert repo is not None
    require_whole(hub, 22, 12)
    assert repo.stored_bytes() < 2 * sum(entry.size for entry in (*repo.files().values(), *repo.files(STATES).values()))
    for revision in ("v0", "mine"):
        assert repo.read("notes.txt", revision) == b"mine"
        assert [commit.title for commit in repo.commits(revision)] == ["A foreign commit", "initial commit"]


def test_the_history_of_models_is_whole_by_default(hub: HubServer, runner: Runner):
    for step in range(1, 6):
        runner.push("model", step)
    assert commits(hub, "main") == [f"Model of step {step}" for step in range(1, 6)]


def test_a_history_that_cannot_be_squashed_does_not_hold_back_the_model(hub: HubServer, tmp_path: Path):
    runner = Runner(tmp_path, keep_models=1)
    runner.push("model", 1)
    hub.faults.add(Fault("POST", "/super-squash/", status(500)))
    runner.push("model", 2)
    assert runner.publication.notes[0].startswith("hub: the history of main could not be squashed: 500")
    runner.push("model", 3)
    assert hub.repo(REPO).commits("main")[0].title == "Model of step 3"
    assert len(hub.repo(REPO).commits("main")) == 1


def test_what_is_there_already_is_not_committed_again(hub: HubServer, runner: Runner, tmp_path: Path):
    """By `hub push`, whose process has pushed none of it. A run in progress does commit it: see `skips_unchanged`."""
    runner.push("model", 3)
    runner.push("state", 3)
    before = hub.repo(REPO).branches
    again = Runner(tmp_path, settled=False)
    again.publication.skips_unchanged = True
    summary = again.queued(again.make("state", 3), again.make("model", 3))
    assert summary.pushed == ["state of step 3", "model of step 3"]
    assert hub.repo(REPO).branches == before
    hub.repo(REPO).commit_as("alice", {"README.md": b"# Mine\n"})  # a person's card is not pushed over either
    before = hub.repo(REPO).branches
    assert not again.queued(again.make("model", 3)).missing
    assert hub.repo(REPO).branches == before
    assert not again.queued(again.make("model", 3, **{"config.json": '{"changed": 1}'})).missing
    assert commits(hub, "main")[-1] == "Model of step 3"
    assert hub.repo(REPO).read("config.json") == b'{"changed": 1}'
    assert not again.queued(again.make("state", 4), again.make("model", 4)).missing
    require_whole(hub, 4, 3)
    running = Runner(tmp_path)
    running.publication.identity.known.add(again.publication.identity.attempt)
    running.push("state", 4)
    assert hub.repo(REPO).read("pushed.json", STATES).count(running.publication.identity.attempt.encode()) == 1


POINTER = {
    "run": "r",
    "attempt": "a",
    "step": 3,
    "states": {"step_00000003": "0" * 64},
    "files": {},
    "schema_version": 1,
}


@pytest.mark.parametrize("name", ["run", "attempt", "step", "states", "files", "schema_version"])
@pytest.mark.parametrize(
    "value", [None, True, -1, 10**30, 1.5, "x" * 1000, [], {"step_00000003": 1}, {"a": "b"}], ids=repr
)
def test_hostile_pointers_are_none(name: str, value: Any):
    assert Pointer.parse(POINTER) is not None
    assert Pointer.parse(POINTER | {"later": 1}) is not None
    newer = name == "schema_version" and value == 10**30
    assert (Pointer.parse(POINTER | {name: value}) is not None) == newer


@pytest.mark.parametrize("value", [None, [], "x", 3, {}, {"run": {}}, [{}] * 9], ids=repr)
def test_what_is_no_pointer_is_none(value: Any):
    assert Pointer.parse(value) is None
