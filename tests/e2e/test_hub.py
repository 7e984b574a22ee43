"""Runs that push to a Hub and go on from it, on other machines, under faults, kills and mistakes."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from qa_dist.checkpoint.store import directory_name
from qa_dist.cli import main
from qa_dist.config import RunConfig
from qa_dist.tasks.question_answering.task import QuestionAnswering
from tests.e2e.test_checkpoints import DROPOUT, qa_dist, ranks_of, wait_for
from tests.helpers import TINY_BERT, Launcher, jsonl, tiny_flags
from tests.hub_server import FLIP_BYTE, Fault, HubServer, User, hang, status
from tests.unit.test_publication import require_whole

REPO = "alice/model"
STATES = "training-state"
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a Hub, from its first step to its last."""
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = [flag for flag in FLAGS if flag not in ("--hub.repo_id", REPO)]
    with pytest.raises(SystemExit) as exit_:
        main(["train", *flags, "--run.output_dir", str(output_dir)])
    assert exit_.value.code == 0
    return output_dir


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the tries of a push, in this process."""
    monkeypatch.setattr("qa_dist.checkpoint.push_queue.FIRST_WAIT", 0.2)


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run whose states of steps 24 and 26 and whose model are on the Hub."""
    run = tmp_path / "pushed"
    code, _, message = train(capsys, run)
    assert code == 0, message
    return run


# ------------------------------------------------------------------------------------------------ pushing


def test_two_processes_push_and_another_machine_goes_on(hub: HubServer, launcher: Launcher, tmp_path: Path, capsys):
    """ZeRO-2 on two processes is killed in the middle of a push; one process goes on from what is on the Hub."""
    first = tmp_path / "first"
    hold = hub.faults.add(Fault("POST", f"/commit/{STATES}", hang(), times=None, after=2))
    plain = [json.dumps(TINY_BERT) if flag == DROPOUT else flag for flag in FLAGS]  # without dropout
    flags = [*plain, "--run.output_dir", str(first), "--resume", "auto"]
    process = launcher.start(launcher.command("zero2", 2, "-m", "qa_dist", "train", *flags))
    wait_for(process, lambda: hold.used > 0)
    wait_for(process, lambda: first.is_dir() and len(list((first / "checkpoints").glob("step_*"))) > 1)
    for pid in (*ranks_of(process.pid), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)
    hub.faults.clear()
    steps = steps_of(hub)
    shutil.rmtree(first)  # that machine is gone
    other = tmp_path / "other"
    code, shown, message = qa_dist(capsys, "train", *plain, "--run.output_dir", other, "--resume", "auto")
    assert code == 0, message
    assert f"fetching step_{steps[0]:08d} from alice/model" in shown
    assert f"(step {steps[0]})" in shown
    whole = tmp_path / "whole"
    assert qa_dist(capsys, "train", *plain[:-2], "--run.output_dir", whole)[0] == 0
    expected, found = losses(whole), losses(other)
    assert max(found) == LAST
    after = [step for step in found if step > steps[0]]
    assert after == list(range(steps[0] + 1, LAST + 1))
    assert steps_of(hub)[0] == LAST
    assert [found[step] for step in after] == pytest.approx([expected[step] for step in after], abs=1e-4)


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


def test_what_people_find(hub: HubServer, pushed: Path, tmp_path: Path):
    """`from_pretrained` with the repository's name, and beside the model all that tells of it."""
    model = AutoModelForQuestionAnswering.from_pretrained(REPO)
    local = AutoModelForQuestionAnswering.from_pretrained(pushed / "model")
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in local.state_dict().items())
    assert AutoTokenizer.from_pretrained(REPO)("Where?").input_ids
    files = hub.repo(REPO).files("main")
    assert {"README.md", "curves.png", "metrics.json", "predictions_summary.json", "qa_dist.json"} <= set(files)
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in files)
    assert not [name for name in files if name.startswith("step_")]
    metrics = json.loads((pushed / "metrics.json").read_text())
    card: Any = ModelCard.load(REPO)
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == pytest.approx(
        {name: metrics[name] for name in ("exact_match", "f1")}
    )
    card.validate()
    assert "![" in card.text
    assert "curves.png" in card.text
    lines = [line for line in jsonl(pushed / "metrics.jsonl") if line["kind"] == "hub"]
    assert {(line["lane"], line["what"]) for line in lines} >= {("model", "pushed"), ("state", "pushed")}
    told = status_of(pushed)["hub"]
    assert {"state of step 26", "model of step 26"} <= set(told["pushed"])
    assert told["failed"] == told["missing"] == {}
    assert not (pushed / ".hub").exists()


def test_a_pushed_model_is_evaluated_by_its_name(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    data = [
        part for key, value in zip(FLAGS[::2], FLAGS[1::2], strict=True) if "synthetic" in key for part in (key, value)
    ]
    code, _, message = qa_dist(capsys, "evaluate", "--model", REPO, *data, "--run.output_dir", tmp_path / "evaluated")
    assert code == 0, message
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (tmp_path / "evaluated", pushed))
    assert {name: ours[name] for name in ("exact_match", "f1")} == {
        name: theirs[name] for name in ("exact_match", "f1")
    }


def test_at_most_so_often(hub: HubServer, tmp_path: Path, capsys):
    assert train(capsys, tmp_path / "run", "--hub.push_every", "none")[0] == 0
    titles = [commit.title for commit in hub.repo(REPO).commits("main")]
    assert titles == ["Model of step 26", "Model of step 13", "initial commit"]  # the first and the last
    posts = [request for request in hub.requests if f"/commit/{STATES}" in request.path]
    assert len(posts) == 2


def test_both_upload_protocols(hub: HubServer, tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch):
    hub.xet = True
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
    run = tmp_path / "run"
    done = launcher.run("ddp", 1, "-m", "qa_dist", "train", *FLAGS, "--run.output_dir", str(run))
    assert done.code == 0, done.output
    assert any("xet-write-token" in request.path for request in hub.requests)
    assert steps_of(hub)[0] == LAST
    again = tmp_path / "again"
    more = ["--train.epochs", "3", "--allow_changed", "train.epochs", "--resume", "hub"]
    done = launcher.run("ddp", 1, "-m", "qa_dist", "train", *FLAGS, *more, "--run.output_dir", str(again))
    assert done.code == 0, done.output
    assert "going on from" in done.output


# ----------------------------------------------------------------------------------------- when it fails


def test_training_survives_a_token_that_is_revoked_and_one_command_repairs_it(hub: HubServer, tmp_path: Path, capsys):
    run = tmp_path / "run"
    hub.faults.add(Fault("", "alice/model", status(401), times=None, after=30))
    code, shown, message = train(capsys, run, "--hub.drain_timeout", 20)
    assert code == 3
    assert "the Hub lacks" in message
    assert f"qa-dist hub push {run}" in message
    assert "state of step 26 failed: the token may not do that: 401" in shown
    assert "hf_alice" not in shown + message
    told = status_of(run)
    assert (told["state"], told["exit_code"]) == ("completed", 3)
    assert "state of step 26" in told["hub"]["missing"]
    assert (run / "model/model.safetensors").is_file()
    hub.faults.clear()
    code, shown, message = qa_dist(capsys, "hub", "push", run)
    assert code == 0, message
    assert "hub: state of step 26 pushed" in shown
    assert steps_of(hub)[0] == LAST
    assert hub.repo(REPO).read("model.safetensors") == (run / "model/model.safetensors").read_bytes()
    assert status_of(run)["exit_code"] == 0


def test_a_hung_hub_does_not_hold_up_the_end(hub: HubServer, tmp_path: Path, launcher: Launcher):
    """Nor training before it; and the same command, once the Hub is back, pushes what it lacks."""
    run = tmp_path / "run"
    hub.faults.add(Fault("POST", "", hang(), times=None, after=3))
    started = time.monotonic()
    flags = [*FLAGS, "--run.output_dir", str(run), "--hub.drain_timeout", "2", "--resume", "auto"]
    done = launcher.run("ddp", 1, "-m", "qa_dist", "train", *flags, timeout=60)
    assert time.monotonic() - started < 60
    assert status_of(run)["exit_code"] == 3, done.output
    assert "not done within 2 s" in done.output
    hub.faults.clear()
    done = launcher.run("ddp", 1, "-m", "qa_dist", "train", *FLAGS, "--run.output_dir", str(run), "--resume", "auto")
    assert done.code == 0, done.output
    assert status_of(run)["exit_code"] == 0
    assert steps_of(hub)[0] == LAST


def test_a_run_that_is_asked_to_stop_does_not_wait_long_for_a_silent_hub(
    hub: HubServer, tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    hold = hub.faults.add(Fault("POST", "/commit/", hang(), times=None))
    flags = [*FLAGS, "--run.output_dir", str(run), "--train.epochs", "200", "--checkpoint.every", "20 steps"]
    process = launcher.start([sys.executable, "-m", "qa_dist", "train", *flags])
    wait_for(process, lambda: hold.used > 0)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - asked < 25
    assert process.returncode == 143, output
    assert status_of(run)["state"] == "stopped"
    assert "not done within 10 s" in output


def test_a_hub_that_cannot_be_reached(hub: HubServer, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    monkeypatch.setattr("qa_dist.training.hub_view.TRIES", 1)
    run = tmp_path / "run"
    code, _, message = train(capsys, run)
    assert code == 2
    assert "nothing could be pushed to alice/model" in message
    assert "--hub.strict false" in message
    assert not run.exists()
    lax = ("--hub.strict", "false", "--hub.drain_timeout", 1)
    code, shown, message = train(capsys, run, *lax, "--resume", "auto")
    assert code == 3
    assert "the Hub could not be asked whether it holds states of this run" in shown
    assert losses(run)[LAST]
    code, _, message = train(capsys, tmp_path / "other", *lax, "--resume", "hub")
    assert code == 2
    assert "--resume hub" in message
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)  # the network is back
    code, shown, message = train(capsys, run, *lax[:2], "--resume", "auto")
    assert code == 0, message
    assert steps_of(hub)[0] == LAST


def test_a_token_that_cannot_write_is_noticed_before_training(hub: HubServer, tmp_path: Path, capsys, monkeypatch):
    for token, reason in (("hf_reader", "for reading only"), ("hf_bob", "cannot create one for 'alice'")):
        monkeypatch.setenv("HF_TOKEN", token)
        code, _, message = train(capsys, tmp_path / "run")
        assert code == 2
        assert reason in message
        code, shown, _ = qa_dist(capsys, "hub", "check", "--hub.repo_id", REPO)
        assert code == 2
        assert reason in shown
    assert not (tmp_path / "run").exists()
    monkeypatch.delenv("HF_TOKEN")
    code, _, message = train(capsys, tmp_path / "run")
    assert code == 2
    assert "there is no token" in message


def test_hub_check_changes_nothing(hub: HubServer, capsys):
    code, shown, _ = qa_dist(capsys, "hub", "check", "--hub.repo_id", REPO)
    assert code == 0
    assert "is not there; a run would make a private one" in shown
    assert {request.method for request in hub.requests} == {"GET"}
    code, _, message = qa_dist(capsys, "hub", "check")
    assert code == 2
    assert "hub.repo_id: is not set" in message


def test_a_second_run_does_not_overwrite_the_first(hub: HubServer, pushed: Path, tmp_path: Path, capsys):
    before = hub.repo(REPO).branches
    for more in ((), ("--resume", "auto", "--train.seed", 7)):
        code, _, message = train(capsys, tmp_path / "second", *more)
        assert code == 2
        assert "holds another run (at step 26)" in message or "train.seed: 42 then, 7 now" in message
    assert not (tmp_path / "second/model").exists()
    assert hub.repo(REPO).branches == before


def test_mistakes_in_the_settings(hub: HubServer, tmp_path: Path, capsys):
    for flags, expected in (
        (("--hub.repo_id", "model"), "hub.repo_id: 'model' is not the name of a repository; write user/name"),
        (("--hub.branch", "main"), "hub.branch: 'main' cannot be the branch"),
        (("--hub.push_every", "sometimes"), "hub.push_every"),
        (("--hub.drain_timeout", "1e9"), "hub.drain_timeout: 1e+09 s is not less than run.timeout_minutes"),
        (("--hub.token", "hf_secret"), "hub.token"),
        (("--resume", "hub:nonsense"), "--resume: 'nonsense' is not the name of a repository"),
        (("--resume", "hub:alice/nothing"), "--resume hub:alice/nothing: there is no state of training"),
    ):
        code, _, message = train(capsys, tmp_path / "run", *flags)
        assert code == 2
        assert expected in message
    code, _, message = qa_dist(capsys, "train", *FLAGS[:-2], "--resume", "hub", "--run.output_dir", tmp_path / "run")
    assert code == 2
    assert "hub.repo_id is not set" in message
    assert not (tmp_path / "run").exists()
    assert RunConfig().hub.private


# ------------------------------------------------------------------------------------------- going on


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
    code, _, _ = qa_dist(capsys, "train", *FLAGS[:-2], "--run.output_dir", other, "--train.epochs", 1)
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
    code, _, message = train(capsys, tmp_path / "fork", *change, "--resume", pushed, "--hub.repo_id", "alice/fork")
    assert code == 0, message
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
