"""Runs that push to a Hub and go on from it, on other machines, under faults, kills and mistakes."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from qa_dist.config import RunConfig
from tests.e2e.hub_training import FLAGS, LAST, losses, status_of, steps_of, train
from tests.e2e.test_checkpoints import DROPOUT, qa_dist, ranks_of, wait_for
from tests.helpers import FORK_SERVER, TINY_BERT, Launcher, jsonl
from tests.hub_runs import REPO, STATES
from tests.hub_server import Fault, HubServer, hang, status

pytestmark = pytest.mark.usefixtures("short_waits")

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


@pytest.mark.slow
def test_nodes_with_disks_of_their_own(hub: HubServer, launcher: Launcher, tmp_path: Path):
    """Two nodes, each with a run directory that the other does not see: each uploads its shards, one commits them, and
    when both disks are lost each node fetches the state once."""
    plan = {"zero_stage": 2, "deepspeed_multinode_launcher": "standard", "zero3_init_flag": False}
    plan |= {"offload_optimizer_device": "none", "offload_param_device": "none"}

    def train_on_both(*more: str) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nodes = []
        for rank in (0, 1):
            directory = tmp_path / f"node{rank}"
            directory.mkdir(exist_ok=True)
            settings = {"num_machines": 2, "machine_rank": rank, "main_process_ip": "127.0.0.1"}
            settings |= {"main_process_port": port, "rdzv_backend": "static", "deepspeed_config": plan}
            program = ("-m", "qa_dist", "train", *FLAGS, "--run.output_dir", "run", *more)
            command = Launcher(directory).command("zero2", 2, *program, **settings)
            nodes.append(launcher.start(command, directory))
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
        return outputs

    train_on_both()
    shards = [sorted(path.name for path in (tmp_path / f"node{rank}").rglob("state-*")) for rank in (0, 1)]
    assert set(shards[0]).isdisjoint(shards[1])
    assert steps_of(hub)[0] == LAST
    for rank in (0, 1):
        shutil.rmtree(tmp_path / f"node{rank}")
    outputs = train_on_both("--resume", "auto", "--train.epochs", "3", "--allow_changed", "train.epochs")
    assert all(output.count("fetching step_00000026") == 1 for output in outputs)
    assert steps_of(hub)[0] == 39


def test_hub_push_of_what_is_there_makes_no_commit(hub: HubServer, pushed: Path, capsys):
    before = hub.repo(REPO).branches
    code, shown, message = qa_dist(capsys, "hub", "push", pushed)
    assert code == 0, message
    assert "2 pushed" in shown
    assert hub.repo(REPO).branches == before


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
    process = launcher.start([FORK_SERVER.python, "-m", "qa_dist", "train", *flags])
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
