"""The queue of pushes: the newest wins, trouble is heard and waited out, and nothing holds up the end."""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qa_dist.checkpoint.hub_client import HubError, Remedy
from qa_dist.checkpoint.push_queue import MOST_PER_HOUR, MOST_REFUSALS, Clock, Lane, Push, PushQueue, Summary


class Simulated(Clock):
    """Time passes when it is waited for."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        if seconds is None:
            condition.wait(0.05)
        else:
            self.time += seconds
            condition.wait(0.0005)  # lets the others have the lock


class Hub:
    """What pushes reach: it does what the test says, one thing for each try."""

    def __init__(self, clock: Clock, *script: HubError | Callable[[], None] | None):
        self.clock = clock
        self.script = list(script)
        self.tries: list[tuple[str, float]] = []

    def push(self, push: Push, count_commit: Callable[[], None]) -> None:
        self.tries.append((push.name, self.clock.now()))
        step = self.script.pop(0) if self.script else None
        if isinstance(step, HubError):
            raise step
        if step is not None:
            step()
        count_commit()


def busy(reason: str = "503") -> HubError:
    return HubError(reason, Remedy.RETRY)


@pytest.fixture
def clock() -> Simulated:
    return Simulated()


def push(tmp_path: Path, step: int, lane: Lane = "state") -> Push:
    directory = tmp_path / f"{lane}-{step}"
    directory.mkdir()
    return Push(lane, step, directory)


def run(hub: Hub, *pushes: Push, seconds: float = 20) -> tuple[PushQueue, Summary]:
    queue = PushQueue(hub.push, hub.clock)
    for one in pushes:
        queue.submit(one)
    return queue, queue.drain(seconds)


def test_a_network_that_comes_back_after_ten_minutes(tmp_path: Path, clock: Simulated):
    def is_back() -> None:
        if clock.now() < 600:
            raise busy("no route to host")

    hub = Hub(clock, *[is_back] * 100)
    queue = PushQueue(hub.push, clock)
    queue.submit(push(tmp_path, 1))
    while not any(event.what == "pushed" for event in queue.events()):
        time.sleep(0.001)
    times = [at for _, at in hub.tries]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[-1] >= 600
    assert len(times) < 20  # not hammered
    assert all(0.4 * 2**i * 2 <= wait <= 2**i * 2 for i, wait in enumerate(waits[:5]))  # doubled, with jitter
    assert max(waits) <= 120
    assert not (tmp_path / "state-1").exists()
    queue.close()


def test_the_newest_wins(tmp_path: Path, clock: Simulated):
    started, go = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        assert go.wait(10)

    hub = Hub(clock, slow)
    queue = PushQueue(hub.push, clock)
    queue.submit(push(tmp_path, 1))
    assert started.wait(10)
    for step in (2, 3, 4):
        queue.submit(push(tmp_path, step))
    queue.submit(push(tmp_path, 4, "model"))  # of another lane: it is not in the way
    assert queue.status == "pushing state of step 1"
    go.set()
    summary = queue.drain(20)
    assert summary.pushed == ["state of step 1", "state of step 4", "model of step 4"]
    assert summary.superseded == ["state of step 2", "state of step 3"]
    assert not summary.failed
    assert not summary.missing
    assert not list(tmp_path.iterdir())


def test_what_is_tried_again_gives_way_to_what_is_newer(tmp_path: Path, clock: Simulated):
    queue: PushQueue | None = None

    def fails_while_a_newer_one_comes() -> None:
        assert queue is not None
        queue.submit(push(tmp_path, 2))
        raise busy()

    hub = Hub(clock, fails_while_a_newer_one_comes)
    queue = PushQueue(hub.push, clock)
    queue.submit(push(tmp_path, 1))
    while not any(event.what == "pushed" for event in queue.events()):
        time.sleep(0.001)
    assert [name for name, _ in hub.tries] == ["state of step 1", "state of step 2"]
    assert queue.drain(5).superseded == ["state of step 1"]


def test_a_lane_in_trouble_does_not_hold_up_the_other(tmp_path: Path, clock: Simulated):
    class Half(Hub):
        def push(self, push: Push, count_commit: Callable[[], None]) -> None:
            self.tries.append((push.name, self.clock.now()))
            if push.lane == "model":
                raise busy()

    hub = Half(clock)
    queue = PushQueue(hub.push, clock)
    queue.submit(push(tmp_path, 1, "model"))
    while not hub.tries:
        time.sleep(0.001)
    queue.submit(push(tmp_path, 1))
    while "state of step 1" not in queue._summary.pushed:
        time.sleep(0.001)
    assert queue.drain(0.2).missing == {"model of step 1": "not done within 0.2 s: 503"}


def test_a_refusal_is_tried_a_few_times_and_then_told(tmp_path: Path, clock: Simulated):
    refusal = HubError("403 the token may not do that", Remedy.MEND)
    queue, summary = run(Hub(clock, *[refusal] * MOST_REFUSALS), push(tmp_path, 1))
    assert summary.failed == summary.missing == {"state of step 1": "403 the token may not do that"}
    assert [event.what for event in queue.events()] == ["retrying"] * (MOST_REFUSALS - 1) + ["failed"]
    _, summary = run(Hub(clock, *[refusal] * (MOST_REFUSALS - 1)), push(tmp_path, 2))  # a flaw that passes
    assert summary.pushed == ["state of step 2"]


def test_what_failed_once_may_be_there_later(tmp_path: Path, clock: Simulated):
    hub = Hub(clock, HubError("a conflict", Remedy.NONE))
    queue = PushQueue(hub.push, clock)
    queue.submit(push(tmp_path, 1))
    while not queue._summary.failed:
        time.sleep(0.001)
    queue.submit(push(tmp_path, 2))
    summary = queue.drain(10)
    assert list(summary.failed) == ["state of step 1"]
    assert not summary.missing  # the newest is there


def test_a_step_that_is_pushed_again_has_to_land_again(tmp_path: Path, clock: Simulated):
    hub = Hub(clock, None, HubError("no", Remedy.NONE))
    queue = PushQueue(hub.push, clock)
    queue.submit(push(tmp_path, 1))
    while "state of step 1" not in queue._summary.pushed:
        time.sleep(0.001)
    queue.submit(push(tmp_path, 1))  # now with its score
    assert queue.drain(10).missing == {"state of step 1": "no"}


def test_a_bug_is_heard_and_does_not_end_the_thread(tmp_path: Path, clock: Simulated):
    def bug() -> None:
        raise KeyError("oh")

    hub = Hub(clock, *[bug] * MOST_REFUSALS)
    queue = PushQueue(hub.push, clock)
    queue.submit(push(tmp_path, 1))
    while not queue._summary.failed:
        time.sleep(0.001)
    queue.submit(push(tmp_path, 2))
    summary = queue.drain(10)
    assert summary.failed == {"state of step 1": "KeyError: 'oh'"}
    assert summary.pushed == ["state of step 2"]


def test_the_hub_may_ask_for_patience(tmp_path: Path, clock: Simulated):
    hub = Hub(clock, HubError("429", Remedy.RETRY, retry_after=300))
    queue = PushQueue(hub.push, clock)
    queue.submit(push(tmp_path, 1))
    while len(hub.tries) < 2:
        time.sleep(0.001)
    assert hub.tries[1][1] >= 300
    queue.close()


def test_a_hub_that_never_answers_does_not_hold_up_the_end(tmp_path: Path):
    never = threading.Event()

    def hang(push: Push, count_commit: Callable[[], None]) -> None:
        never.wait(30)

    queue = PushQueue(hang)
    queue.submit(push(tmp_path, 1))
    queue.submit(push(tmp_path, 1, "model"))
    started = time.monotonic()
    summary = queue.drain(0.3)
    assert time.monotonic() - started < 5
    assert set(summary.missing) == {"state of step 1", "model of step 1"}
    assert "not done within 0.3 s" in summary.missing["state of step 1"]
    never.set()
    time.sleep(0.05)
    assert not summary.pushed  # too late to count


def test_a_queue_that_is_closed_ends_its_worker(tmp_path: Path):
    """Where it has nothing to do, waits to try again, or is in the middle of a try; without a drain."""
    started, go = threading.Event(), threading.Event()

    def slow(push: Push, count_commit: Callable[[], None]) -> None:
        started.set()
        if push.step == 1:
            raise busy()
        assert go.wait(10)

    idle, troubled, active = (PushQueue(slow) for _ in range(3))
    troubled.submit(push(tmp_path, 1))
    assert started.wait(10)
    started.clear()
    active.submit(push(tmp_path, 2))
    assert started.wait(10)
    active.submit(push(tmp_path, 3))  # is not begun
    threading.Timer(0.05, go.set).start()
    for queue in (idle, troubled, active):
        queue.close(10)
        assert not queue._thread.is_alive()
    assert not (tmp_path / "state-1").exists()
    assert not (tmp_path / "state-3").exists()
    idle.close()  # once more is no error


def test_a_person_can_end_the_waiting(tmp_path: Path):
    never = threading.Event()

    def hang(push: Push, count_commit: Callable[[], None]) -> None:
        never.wait(30)

    queue = PushQueue(hang)
    queue.submit(push(tmp_path, 1))
    told = []
    started = time.monotonic()
    summary = queue.drain(60, lambda: len(told) > 1, lambda: told.append(1))
    assert time.monotonic() - started < 10
    assert summary.missing
    never.set()


@pytest.mark.parametrize("gap", [0.0, 10.0, 35.0])
def test_at_most_a_hundred_commits_in_any_hour(gap: float, clock: Simulated):
    commits: list[float] = []

    def commit(push: Push, count_commit: Callable[[], None]) -> None:
        for _ in range(1 + push.step % 2):  # every other one squashes
            commits.append(clock.now())
            count_commit()

    queue = PushQueue(commit, clock)
    for step in range(400):
        clock.time += gap
        queue.submit(Push("state", step, Path("/nowhere")))
        while queue._waiting or queue._active:
            time.sleep(0.0001)
    queue.submit(Push("state", 400, Path("/nowhere")))
    assert queue.drain(20).pushed[-1] == "state of step 400"
    assert len(commits) == 601
    most = max(sum(at <= other < at + 3600 for other in commits[i:]) for i, at in enumerate(commits))
    assert most <= MOST_PER_HOUR
    assert gap > 10 or most > MOST_PER_HOUR - 10
