"""launch/slurm.sbatch on a real SLURM: two nodes, ZeRO-2, and everything that happens to jobs."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qa_dist.reporting.status import read_status
from qa_dist.training.preemption import slurm_end_time
from tests.e2e.test_token_classification import flags_of as tags_of
from tests.helpers import FORK_SERVER, ROOT, Launcher, jsonl, tiny_flags
from tests.slurm_cluster import SlurmCluster, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"SLURM: {missing()}")

SCRIPT = ROOT / "launch/slurm.sbatch"
FLAGS = tiny_flags(**{"train.epochs": "20", "checkpoint.every": "25 steps"})
LONG = tiny_flags(**{"train.epochs": "2000", "checkpoint.every": "25 steps"})
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
RUN = "runs/qa_dist"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    launch = Launcher(directory).train("zero2", 2, directory / "run", *FLAGS)
    assert launch.code == 0, launch.output
    return directory / "run"


class Job:
    """A job of the batch script, and what it leaves in a directory of its own."""

    def __init__(self, cluster: SlurmCluster, directory: Path, *args: str, flags: list[str], **env: str):
        self.cluster, self.directory, self.run = cluster, directory, directory / RUN
        environ = {"LAUNCH_CONFIG": "cpu_zero2", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environ |= {"PYTHON_EXEC": FORK_SERVER.python} | env
        self.id = cluster.submit(SCRIPT, *(args or FLAGS), flags=["--nodes=2", *flags], env=environ, cwd=directory)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.directory.glob("slurm-*.log"))

    def node_log(self, node: int) -> str:
        return (self.run / f"logs/node-{node}.log").read_text()

    def ended(self, seconds: float = 200) -> dict[str, str]:
        return self.cluster.wait(self.id, ENDED, timeout=seconds)

    def wait(self, condition: Callable[[], object], seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.log}\n{self.node_log(0)}"
            assert self.cluster.job(self.id)["JobState"] not in ENDED, self.log
            time.sleep(0.1)

    def reaches(self, step: int) -> None:
        self.wait(lambda: len(steps(self.run)) >= step)

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for process in self.cluster.processes(containing="qa_dist"):
            try:
                rank = process.environ().get("RANK")
                if rank is not None and "train" in process.cmdline():
                    found[int(rank)] = process
            except psutil.Error:
                continue
        return found


def steps(run: Path) -> list[tuple[int, float]]:
    """Logged steps and their losses, also of a run that is going on."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def assert_same(run: Path, uninterrupted: Path) -> None:
    assert steps(run) == steps(uninterrupted)
    ours, theirs = (json.loads((one / "metrics.json").read_text()) for one in (run, uninterrupted))
    assert ours["history"] == theirs["history"]
    assert len(jsonl(run / "metrics.jsonl")) == len(jsonl(uninterrupted / "metrics.jsonl"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), slurmd_timeout=6) as cluster:
        yield cluster


@pytest.fixture
def submit(cluster: SlurmCluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(*args: str, flags: list[str] | None = None, **env: str) -> Job:
        jobs.append(Job(cluster, tmp_path, *args, flags=flags or [], **env))
        return jobs[-1]

    yield begin
    for job in jobs:
        if cluster.job(job.id)["JobState"] not in ENDED:
            cluster.command("scancel", str(job.id))
            cluster.wait(job.id, ENDED, timeout=60)


@pytest.mark.slow
def test_a_job_of_token_classification_that_is_requeued_goes_on(submit, cluster: SlurmCluster, tmp_path: Path):
    flags = tags_of(tmp_path / "cache", **{"checkpoint.every": "10 steps"})
    alone = Launcher(tmp_path).train("zero2", 2, tmp_path / "alone", *flags)
    assert alone.code == 0, alone.output
    job = submit(*flags)
    job.reaches(15)
    cluster.command("scontrol", "requeue", str(job.id))
    job.wait(lambda: cluster.job(job.id)["Restarts"] == "1")
    assert job.ended()["JobState"] == "COMPLETED", job.log
    assert_same(job.run, tmp_path / "alone")
    assert (job.run / "predictions.json").read_bytes() == (tmp_path / "alone/predictions.json").read_bytes()


def test_a_job_near_its_end_stops_requeues_itself_and_goes_on(submit, cluster: SlurmCluster, uninterrupted: Path):
    job = submit()
    job.reaches(60)
    before = len(steps(job.run))
    cluster.command("scancel", "--batch", "--signal=USR1", str(job.id))  # as --signal=B:USR1@300 does
    job.wait(lambda: "requeueing (restarts without a new checkpoint: 0 of 3)" in job.log)
    stopped = int(re.findall(r"newest checkpoint: step (\d+)", job.log)[-1])
    assert before <= stopped <= before + 40  # the step that it is in, and those until the request is looked at
    assert job.ended()["JobState"] == "COMPLETED", job.log
    assert cluster.job(job.id)["Restarts"] == "1"
    assert f"(step {stopped})" in job.node_log(0)
    assert_same(job.run, uninterrupted)
    assert (job.run / "status.json").is_file()
    assert read_status(job.run)["attempt"] == "1"
    assert not (job.run / "stop").exists()


@pytest.mark.slow
def test_a_job_that_is_cancelled_stays_so_and_leaves_a_checkpoint(submit, cluster: SlurmCluster):
    job = submit(REQUEUE_FAILED="1")
    job.reaches(60)
    cluster.command("scancel", str(job.id))
    assert job.ended()["JobState"] == "CANCELLED"
    status = read_status(job.run)
    assert status["state"] == "stopped"
    assert (job.run / f"checkpoints/step_{status['step']:08}/manifest.json").is_file()
    time.sleep(8)  # a requeued job would be back
    assert cluster.job(job.id)["JobState"] == "CANCELLED"
    assert not job.ranks()


@pytest.mark.slow
def test_a_job_requeued_by_hand(submit, cluster: SlurmCluster, uninterrupted: Path):
    job = submit()
    job.reaches(60)
    cluster.command("scontrol", "requeue", str(job.id))
    cluster.wait(job.id, {"PENDING"}, timeout=60)
    assert job.ended()["JobState"] == "COMPLETED", job.log
    assert_same(job.run, uninterrupted)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_its_rank_host_and_cause(submit, cluster: SlurmCluster):
    job = submit()
    job.reaches(60)
    killed = time.monotonic()
    job.ranks()[1].kill()
    assert job.ended(60)["JobState"] == "FAILED"
    assert time.monotonic() - killed < 60
    last = job.log.splitlines()[-4:]
    assert any(re.search(r"\] rank 1 was killed by signal 9 \(SIGKILL\)", line) for line in last), job.log
    assert "ended: failed, exit code 1, newest checkpoint: step" in last[-1]
    assert not job.ranks()


@pytest.mark.slow
def test_a_job_that_fails_goes_on_if_that_is_asked_for(submit, uninterrupted: Path):
    job = submit(REQUEUE_FAILED="1")
    job.reaches(60)
    job.ranks()[0].kill()
    job.wait(lambda: "requeueing" in job.log)
    assert job.ended()["JobState"] == "COMPLETED", job.log
    assert_same(job.run, uninterrupted)


@pytest.mark.slow
def test_a_node_whose_launcher_dies_is_a_failure_and_not_a_stop(submit, cluster: SlurmCluster, uninterrupted: Path):
    """The processes of all nodes are stopped in order then; the job must neither wait nor take itself for preempted."""
    job = submit(REQUEUE_FAILED="1", PYTHON_EXEC=sys.executable)
    job.reaches(60)
    last = [node for node in cluster.nodes if node != cluster.job(job.id)["BatchHost"]]
    agents = [one for node in last for one in cluster.processes(node, "qa_dist.launching.agent")]
    agents[0].kill()
    job.wait(lambda: "requeueing (restarts without a new checkpoint: 0 of 3)" in job.log)
    assert "the launcher of the processes was killed by signal 9 (SIGKILL)" in job.log
    assert "ended: failed, exit code 1" in job.log
    assert job.ended()["JobState"] == "COMPLETED", job.log
    assert_same(job.run, uninterrupted)


@pytest.mark.slow
def test_a_signal_to_the_tasks_alone_is_a_preemption(submit, cluster: SlurmCluster, uninterrupted: Path):
    """As at the beginning of a partition's GraceTime; the batch script hears nothing of it."""
    job = submit()
    job.reaches(60)
    cluster.command("scancel", "--signal=TERM", str(job.id))
    job.wait(lambda: "ended: stopped, exit code 143" in job.log)
    assert job.ended()["JobState"] == "COMPLETED", job.log
    assert cluster.job(job.id)["Restarts"] == "1"
    assert_same(job.run, uninterrupted)


@pytest.mark.slow
def test_two_jobs_do_not_share_a_run_directory(submit):
    """Those of one name would, by default."""
    first = submit(*LONG)
    first.reaches(20)
    second = submit(*LONG)
    second.ended()
    assert first.cluster.job(second.id)["ExitCode"] == "2:0"
    assert f"is still running (process {read_status(first.run)['pid']} on " in first.log
    first.reaches(len(steps(first.run)) + 20)


@pytest.mark.slow
def test_a_job_that_slurm_has_lost_sight_of_gives_way_to_its_next_attempt(submit, cluster: SlurmCluster):
    """Its node does not answer, but its processes live on; the requeued job must not train beside them."""
    job = submit(*LONG, flags=["--nodes=1"])
    job.reaches(60)
    lost = cluster.job(job.id)["BatchHost"]
    cluster.kill_daemon(lost)
    try:
        job.wait(lambda: re.search(r"waiting up to \d+ s for process \d+ on .* to end", job.node_log(0)), 90)
        job.wait(lambda: read_status(job.run).get("attempt") == "1", 60)
        done = len(steps(job.run))
        job.reaches(done + 20)
        lines = steps(job.run)
        assert [step for step, _ in lines] == list(range(1, len(lines) + 1))
    finally:
        cluster.command("scancel", str(job.id))
        cluster.start_node(lost)


@pytest.mark.slow
def test_a_job_that_always_fails_does_not_loop(submit, cluster: SlurmCluster):
    flags = tiny_flags(**{"train.learning_rate": "1e30", "checkpoint.every": "none"})
    job = submit(*flags, REQUEUE_FAILED="1", MAX_RESTARTS="1")
    assert job.ended(120)["JobState"] == "FAILED"
    assert job.log.count("attempt ") == 2
    assert "gave up: 1 restarts without a new checkpoint (MAX_RESTARTS=1)" in job.log
    assert cluster.job(job.id)["ExitCode"] == "1:0"


def test_a_mistake_is_told_and_not_tried_again(submit, cluster: SlurmCluster):
    job = submit(*tiny_flags(**{"data.max_length": "4000"}), REQUEUE_FAILED="1")
    job.ended()
    assert cluster.job(job.id)["ExitCode"] == "2:0", job.log
    assert "data.max_length: 4000 is more than" in job.log
    assert job.log.count("attempt ") == 1


@pytest.mark.slow
def test_a_node_that_vanishes(submit, cluster: SlurmCluster, uninterrupted: Path):
    """SLURM sees it, and requeues the job on nodes that are left."""
    job = submit()
    job.reaches(60)
    lost = cluster.job(job.id)["BatchHost"]
    cluster.kill_node(lost)
    try:
        assert cluster.wait(job.id, {"PENDING", "COMPLETING"}, timeout=60)
        cluster.wait(job.id, {"RUNNING"}, timeout=60)
        assert job.ended(120)["JobState"] == "COMPLETED", job.log
    finally:
        cluster.start_node(lost)
    assert cluster.job(job.id)["Restarts"] == "1"
    assert_same(job.run, uninterrupted)


@pytest.mark.slow
def test_preemption_by_a_job_of_higher_priority(tmp_path: Path, uninterrupted: Path):
    with SlurmCluster(tmp_path / "slurm", nodes=2, preemption=True) as cluster:
        job = Job(cluster, tmp_path, flags=[])
        job.reaches(60)
        script = tmp_path / "short.sh"
        script.write_text("#!/bin/sh\nsleep 3\n")
        other = cluster.submit(script, flags=["--partition=high", "--nodes=2", "--exclusive"])
        cluster.wait(other, {"COMPLETED"}, timeout=90)
        assert job.ended(120)["JobState"] == "COMPLETED", job.log
        assert int(cluster.job(job.id)["Restarts"]) >= 1
        assert_same(job.run, uninterrupted)


def test_the_end_of_a_job_is_known(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "sleep.sh"
    script.write_text("#!/bin/sh\nsleep 30\n")
    number = cluster.submit(script, flags=["--time=7"])
    cluster.wait(number, {"RUNNING"}, timeout=20)
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("SLURM_JOB_ID", str(number))
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    end = slurm_end_time()
    assert end is not None
    assert 0 < end - time.time() <= 7 * 60
    cluster.command("scancel", str(number))
    assert os.environ["SLURM_CONF"] == cluster.environment["SLURM_CONF"]
