"""Runs that go on from what is on the Hub, on other machines, after faults and mistakes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qa_dist.checkpoint.store import directory_name
from qa_dist.tasks.question_answering.task import QuestionAnswering
from tests.e2e.hub_training import FLAGS, LAST, forget, losses, status_of, steps_of, train
from tests.e2e.test_checkpoints import qa_dist
from tests.hub_runs import REPO, STATES
from tests.hub_server import FLIP_BYTE, Fault, HubServer, User, status

pytestmark = pytest.mark.usefixtures("short_waits")


def test_the_losses_after_a_resume_from_the_hub_are_those_of_the_uninterrupted_run(
    hub: HubServer, uninterrupted: Path, pushed: Path, tmp_path: Path, capsys
):
    forget(hub, 26)
    run = tmp_path / "run"
    code, _, message = train(capsys, run, "--resume", "hub")
    assert code == 0, message
    assert losses(run) == losses(uninterrupted)  # those before it have come with the metrics
    for name in ("model/model.safetensors", "predictions.json"):
        assert (run / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert status_of(run)["run"] == status_of(pushed)["run"]  # one run


def test_a_damaged_state_is_left_out_for_the_one_before(
    hub: HubServer, pushed: Path, uninterrupted: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    repo, before = hub.repo(REPO), steps_of(hub)[1]
    name = "step_00000026/state-00000-of-00001.safetensors"
    content = bytearray(repo.read(name, STATES))
    content[-1] ^= 1
    repo.commit_as("nobody", {name: bytes(content)}, branch=STATES)
    run = tmp_path / "run"
    code, shown, message = train(capsys, run, "--resume", "auto")
    assert code == 0, message
    assert (
        "step_00000026 is not used: step_00000026/state-00000-of-00001.safetensors is not what its manifest says"
        in shown
    )
    assert f"(step {before})" in shown
    assert losses(run)[LAST] == losses(uninterrupted)[LAST]
    assert steps_of(hub)[0] == LAST
    hub.faults.add(Fault("GET", "/storage/", FLIP_BYTE, times=None))
    code, _, message = train(capsys, tmp_path / "third", "--resume", "auto")
    assert code == 2
    assert "no state of training can be used" in message


def test_a_branch_that_is_squashed_while_it_is_read(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    gone = status(404, {"X-Error-Code": "RevisionNotFound"})
    hub.faults.add(Fault("GET", "/resolve/.*/manifest.json", gone, times=1))
    code, shown, message = train(capsys, tmp_path / "run", "--resume", "auto")
    assert code == 0, message
    assert "has squashed the branch in the meantime" in shown
    assert "(step 26)" in shown


def test_from_another_repository_at_a_commit(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    commit = hub.repo(REPO).branches[STATES]
    own = ("--hub.repo_id", "alice/fork", "--train.epochs", 3, "--allow_changed", "train.epochs")
    code, shown, message = train(capsys, tmp_path / "run", *own, "--resume", f"hub:{REPO}@{commit}")
    assert code == 0, message
    assert "(step 26)" in shown
    assert max(losses(tmp_path / "run")) == 39
    assert "model.safetensors" in hub.repo("alice/fork").files("main")
    assert hub.repo(REPO).branches[STATES] == commit
    # and without a repository of its own
    code, _, message = qa_dist(
        capsys, "train", *FLAGS[:-2], *own[2:], "--resume", f"hub:{REPO}", "--run.output_dir", tmp_path / "local"
    )
    assert code == 0, message


def test_the_newer_of_disk_and_hub(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    stale = tmp_path / "stale"
    shutil.copytree(pushed, stale)
    shutil.rmtree(stale / "checkpoints/step_00000026")
    (stale / "status.json").write_text(json.dumps(status_of(pushed) | {"state": "stopped"}))
    code, shown, message = train(capsys, stale, "--resume", "auto")
    assert code == 0, message
    assert "fetching step_00000026" in shown
    forget(hub, LAST)
    code, _, message = train(capsys, pushed, "--resume", "hub")
    assert code == 2
    assert "has a newer checkpoint (step 26) than alice/model (step" in message
    other = tmp_path / "other"
    # fewer steps than the older of the states on the Hub has, whichever that is
    few = ("--train.epochs", 1, "--train.global_batch_size", 64)
    code, _, _ = qa_dist(capsys, "train", *FLAGS[:-2], "--run.output_dir", other, *few)
    assert code == 0
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    code, _, message = train(capsys, other, "--resume", "hub")
    assert code == 2
    assert "holds another run than alice/model" in message
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_a_repository_nobody_may_see(hub: HubServer, pushed: Path, tmp_path: Path, capsys, monkeypatch):
    hub.tokens["hf_stranger"] = User("stranger")
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    code, _, message = qa_dist(
        capsys, "train", *FLAGS[:-2], "--resume", f"hub:{REPO}", "--run.output_dir", tmp_path / "run"
    )
    assert code == 2
    assert f"--resume hub:{REPO}" in message
    assert not (tmp_path / "run").exists()


def test_a_fork_is_another_run(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    """What goes on elsewhere, with other settings, does not overwrite what it came from."""
    before = hub.repo(REPO).branches
    change = ("--train.learning_rate", "5e-3", "--allow_changed", "train.learning_rate")
    code, _, message = train(capsys, tmp_path / "fork", *change, "--resume", pushed)
    assert code == 2
    assert "holds another run" in message
    assert hub.repo(REPO).branches == before
    own = ("--hub.repo_id", "alice/fork", "--run.export", "best", "--resume", pushed)
    code, _, message = train(capsys, tmp_path / "fork", *change, *own)
    assert code == 0, message
    assert "model.safetensors" in hub.repo("alice/fork").files()
    assert status_of(tmp_path / "fork")["run"] != status_of(pushed)["run"]


def test_the_best_model_stays_the_best_elsewhere(hub: HubServer, tmp_path: Path, capsys):
    """With run.export best: a worse epoch on another machine replaces neither the Hub's model nor is taken for it."""
    scores = iter([30.0, 10.0, 10.0])

    def score(self: Any, outputs: Any, features: Any, plain: Any = QuestionAnswering.score) -> Any:
        found = plain(self, outputs, features)
        return replace(found, metrics=found.metrics | {"f1": next(scores)})

    best = ("--run.export", "best")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuestionAnswering, "score", score)
        assert train(capsys, tmp_path / "first", *best)[0] == 0
        expected = hub.repo(REPO).read("model.safetensors")
        assert next(c.title for c in hub.repo(REPO).commits()) == "Model of step 13"
        forget(hub, LAST)
        code, shown, message = train(capsys, tmp_path / "other", *best, "--resume", "auto")
    assert code == 0, message
    assert "model/ is that of epoch 1, from the Hub" in shown
    assert hub.repo(REPO).read("model.safetensors") == expected
    assert (tmp_path / "other/model/model.safetensors").read_bytes() == expected
    assert json.loads((tmp_path / "other/metrics.json").read_text())["epoch"] == 1


def test_an_old_model_is_not_taken_for_a_newer_one(hub: HubServer, tmp_path: Path, capsys):
    """model/ here is of an earlier epoch than the state from the Hub says: it is neither pushed nor kept."""
    first, other = tmp_path / "first", tmp_path / "other"
    assert train(capsys, first)[0] == 0
    expected = (first / "model/model.safetensors").read_bytes()
    shutil.copytree(first, other)
    for directory in (other / "checkpoints").glob("step_*"):
        shutil.rmtree(directory)
    settings = json.loads((other / "model/qa_dist.json").read_text())
    (other / "model/qa_dist.json").write_text(json.dumps(settings | {"step": 13}))
    (other / "model/model.safetensors").write_bytes(b"of epoch 1")
    (other / "status.json").write_text(json.dumps(status_of(first) | {"state": "stopped"}))
    code, _, message = train(capsys, other, "--resume", "auto")
    assert code == 0, message
    assert (other / "model/model.safetensors").read_bytes() == expected
    assert hub.repo(REPO).read("model.safetensors") == expected


def test_a_token_for_reading_can_go_on_from_a_state(hub: HubServer, pushed: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    lax = ("--hub.strict", "false", "--hub.drain_timeout", 1)
    for source in ("auto", "hub"):
        code, shown, message = train(capsys, tmp_path / source, *lax, "--resume", source)
        assert code == 0, message  # nothing was left to push
        assert "(step 26)" in shown


def test_a_model_that_was_lost_on_its_way_is_pushed_from_elsewhere(hub: HubServer, tmp_path: Path, capsys):
    first = tmp_path / "first"
    hub.faults.add(Fault("POST", "/commit/main", status(403), times=None, after=1))
    assert train(capsys, first, "--hub.drain_timeout", 20)[0] == 3
    assert steps_of(hub)[0] == LAST
    assert hub.repo(REPO).read("pushed.json").count(b'"step": 13') == 1
    hub.faults.clear()
    expected = (first / "model/model.safetensors").read_bytes()
    shutil.rmtree(first)
    code, _, message = train(capsys, tmp_path / "other", "--resume", "auto")
    assert code == 0, message
    assert hub.repo(REPO).read("model.safetensors") == expected


def test_logged_steps_come_with_the_state(hub: HubServer, uninterrupted: Path, tmp_path: Path, capsys):
    """Also those after the last push of the model; and what a stale directory has of its own is not mixed with them."""
    hub.faults.add(Fault("POST", "/commit/main", status(403), times=None, after=1))
    first = tmp_path / "first"
    assert train(capsys, first, "--hub.drain_timeout", 20)[0] == 3
    forget(hub, LAST)
    hub.faults.clear()
    stale = tmp_path / "stale"
    shutil.copytree(first, stale)
    for directory in (stale / "checkpoints").glob("step_*"):
        shutil.rmtree(directory)
    (stale / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 99.0}\n' * 50)
    (stale / "status.json").write_text(json.dumps(status_of(first) | {"state": "stopped"}))
    for run in (tmp_path / "new", stale):
        code, _, message = train(capsys, run, "--resume", "auto")
        assert code == 0, message
        assert losses(run) == losses(uninterrupted)
        forget(hub, LAST)


def test_a_refused_resume_leaves_nothing(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    code, _, message = train(capsys, run, "--resume", "auto", "--train.seed", 7)
    assert code == 2
    assert "train.seed: 42 then, 7 now" in message
    assert not run.exists()


def test_a_stale_directory_goes_on_from_the_newest_good_state(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    """Though the newest is damaged, and the Hub has a bad moment."""
    before = steps_of(hub)[1]
    stale = tmp_path / "stale"
    shutil.copytree(pushed, stale)
    newest = stale / "checkpoints" / directory_name(LAST)
    old = stale / "checkpoints" / directory_name(4)
    for directory in (stale / "checkpoints").glob("step_*"):
        if directory != newest:
            shutil.rmtree(directory)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"step": 4}))
    newest.rename(old)
    (stale / "status.json").write_text(json.dumps(status_of(pushed) | {"state": "stopped"}))
    hub.repo(REPO).commit_as("nobody", {f"{directory_name(LAST)}/manifest.json": b"{}"}, branch=STATES)
    hub.faults.add(Fault("GET", "/resolve/.*/manifest.json", status(503), times=1))
    code, shown, message = train(capsys, stale, "--resume", "auto")
    assert code == 0, message
    assert f"(step {before})" in shown
    assert "its manifest is not the one that was pushed" in shown


def test_a_bad_moment_at_the_start(hub: HubServer, tmp_path: Path, capsys):
    """Whichever request it strikes: with hub.strict the run starts after another try, or says why not."""
    for after in (1, 6, 12):
        hub.faults.clear()
        fault = hub.faults.add(Fault("GET", "", status(503), times=1, after=after))
        flags = ("--hub.repo_id", f"alice/m{after}", "--hub.push_every", "none", "--train.epochs", 1)
        code, shown, message = train(capsys, tmp_path / f"run{after}", *flags)
        assert code == 0, (after, shown, message)
        assert fault.used == 1
    hub.faults.clear()
    hub.faults.add(Fault("GET", "", status(503), times=None, after=9))
    lax = ("--hub.strict", "false", "--hub.drain_timeout", 1, "--hub.repo_id", "alice/lax")
    code, _, message = train(capsys, tmp_path / "lax", *lax)
    assert code == 3, message


def test_hub_push_leaves_the_run_as_it_is(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    """It writes into no file of the run, and does not disturb a run that is at work elsewhere."""
    (pushed / "model/README.md").write_text("MY OWN NOTES")
    (pushed / "model/metrics.json").write_text("{}")
    (pushed / "model/notes").mkdir()
    (pushed / "tensorboard/plugins").mkdir()
    (pushed / "tensorboard/plugins/trace").write_text("a profile")
    before = {path: path.read_bytes() for path in pushed.rglob("*") if path.is_file()}
    code, _, message = qa_dist(capsys, "hub", "push", pushed, "--hub.repo_id", "alice/second")
    assert code == 0, message
    assert {path: path.read_bytes() for path in pushed.rglob("*") if path.is_file()} == before
    assert "tensorboard/plugins/trace" in hub.repo("alice/second").files()
    assert b"MY OWN" not in hub.repo("alice/second").read("README.md")
    (pushed / "status.json").write_text(json.dumps(status_of(pushed) | {"state": "running", "host": "elsewhere"}))
    code, _, message = qa_dist(capsys, "hub", "push", pushed)
    assert code == 2
    assert "its run was at work 0 minutes ago on elsewhere" in message


def test_hub_push_where_nodes_have_disks_of_their_own(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    (pushed / "checkpoints" / directory_name(LAST) / "state-00000-of-00001.safetensors").unlink()
    code, _, message = qa_dist(capsys, "hub", "push", pushed, "--hub.repo_id", "alice/second")
    assert code == 3
    assert "its shards lie on several nodes" in message
    assert "model.safetensors" in hub.repo("alice/second").files()


def test_hub_push_wants_a_run(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    for args, expected in (
        ((), "names no run directory"),
        ((tmp_path / "nothing",), "is not a run directory"),
        ((pushed, "--hub.repo_id", "bob/model"), "cannot create one for 'bob'"),
    ):
        code, _, message = qa_dist(capsys, "hub", "push", *args)
        assert code == 2
        assert expected in message
    code, _, message = qa_dist(capsys, "hub", "push", pushed, "--hub.repo_id", "alice/second")
    assert code == 0, message
    assert "model.safetensors" in hub.repo("alice/second").files("main")
