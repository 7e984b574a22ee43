"""What the Hub refuses, and how long it asks to wait: the real client, and a Hub of the test's own."""

import json
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from qa_dist.checkpoint import hub_client, push_queue
from qa_dist.checkpoint.attempt import Attempt
from qa_dist.checkpoint.hub_client import HubError, Remedy
from tests.hub_runs import STATES, Runner
from tests.hub_server import Action, Fault, HubServer, status

pytestmark = [
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),
]


@pytest.fixture
def runner(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(push_queue, "FIRST_WAIT", 0.05)
    return Runner(tmp_path)


def refused_by_lfs(hub: HubServer, runner: Runner) -> Action:
    """One file of the batch is refused, as it is where a quota is used up."""
    error = {"code": 413, "message": "Your storage quota of 100 GB is used up"}
    objects = [{"oid": "0" * 64, "size": 1, "error": error}]
    content = json.dumps({"transfer": "basic", "objects": objects}).encode()
    return status(200, {"Content-Type": "application/json"}, content)


REFUSALS = {
    "a commit that is too large": ("POST", "/commit/", status(413), "413"),
    "a quota, at the commit": ("POST", "/commit/", status(507), "507"),
    "a bill": ("POST", "/preupload/", status(402), "402"),
    "a file that is too large": ("PUT", "/storage/", status(413), "413"),
    "a quota, at the storage": ("PUT", "/storage/", status(507), "507"),
    "a quota, of a file in LFS": ("POST", "/objects/batch", None, "storage quota of 100 GB is used up"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_is_refused_is_given_up_with_the_reason(hub: HubServer, runner: Runner, refusal: str):
    method, path, action, reason = REFUSALS[refusal]
    fault = hub.faults.add(Fault(method, path, action or refused_by_lfs(hub, runner), times=None))
    summary = runner.queued(runner.make("state", 1))
    assert reason in summary.missing["state of step 1"]
    assert "not done within" not in str(summary)
    assert push_queue.MOST_REFUSALS <= fault.used <= 2 * push_queue.MOST_REFUSALS  # it has two shards
    hub.faults.clear()
    assert runner.queued(runner.make("state", 2)).pushed == ["state of step 2"]


@pytest.mark.parametrize(("path", "code"), [("/v1/xorbs/", 413), ("/v1/xorbs/", 402), ("/v1/shards", 403)])
def test_what_xet_is_refused_is_given_up_with_the_reason(
    hub: HubServer, runner: Runner, monkeypatch: pytest.MonkeyPatch, path: str, code: int
):
    hub.xet = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
    fault = hub.faults.add(Fault("POST", path, status(code), times=None))
    summary = runner.queued(runner.make("state", 1))
    assert f"{code} " in summary.missing["state of step 1"]
    assert "of the Xet storage" in summary.missing["state of step 1"]
    assert fault.used >= push_queue.MOST_REFUSALS


def in_seconds(seconds: float) -> str:
    return formatdate(time.time() + seconds, usegmt=True)


WAITS = {
    "seconds": ({"Retry-After": "100"}, 100),
    "a date": ({"Retry-After": in_seconds(100_000)}, hub_client.MOST_PATIENCE),
    "a date, by a clock that is wrong": (
        {"Retry-After": "Wed, 21 Oct 2015 07:29:40 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"},
        100,
    ),
    "a date that has passed": ({"Retry-After": in_seconds(-100_000)}, 0),
    "nonsense": ({"Retry-After": "soon"}, 0),
    "a limit": ({"RateLimit": '"api";r=0;t=120', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 120),
    "a limit without a reset": ({"RateLimit": '"api";r=0', "RateLimit-Policy": '"api";q=500;w=300'}, 300),
    "one of several limits": ({"RateLimit": '"pages";r=7;t=90, "api"; r=0; t=60'}, 60),
    "a limit that is not reached": ({"RateLimit": '"api";r=12;t=120'}, 0),
    "both": ({"Retry-After": "30", "RateLimit": '"api";r=0;t=45'}, 45),
}


@pytest.mark.parametrize("path", ["/commit/", "/preupload/", "/objects/batch", "/storage/"])
def test_the_hub_says_how_long_to_wait(hub: HubServer, runner: Runner, path: str, subtests: pytest.Subtests):
    """Whoever asks; the client itself would sleep as long as it is told, and nobody could end that."""
    for name, (headers, seconds) in WAITS.items():
        if seconds == 0 and path != "/commit/":
            continue  # then the client tries again by itself
        with subtests.test(name):
            hub.faults.clear()
            hub.faults.add(Fault("", path, status(429, headers), times=None))
            with pytest.raises(HubError, match="429") as error, Attempt():
                runner.push("state", 1)
            assert error.value.remedy is Remedy.RETRY
            assert error.value.retry_after == pytest.approx(seconds, abs=1)


def test_a_wait_at_the_start_is_not_slept_through(hub: HubServer, runner: Runner):
    runner.push("state", 1)
    hub.faults.add(Fault("GET", "/tree/", status(503, {"Retry-After": "3600"}), times=None))
    with pytest.raises(HubError, match="503") as error:
        runner.repository.tree(STATES)
    assert error.value.retry_after == hub_client.MOST_PATIENCE
