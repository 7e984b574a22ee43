"""What is to be started where, and how its end is told: the pure parts of `qa-dist launch`."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qa_dist.config import OutputConfig, RunConfig
from qa_dist.errors import UserError
from qa_dist.launch_directory import Exit, LaunchDirectory, Note
from qa_dist.launching.plan import CONFIGS, Options, plan, port_of
from qa_dist.launching.probe import Probe
from qa_dist.launching.supervisor import account
from qa_dist.training.extension_lock import KernelLock
from qa_dist.training.preemption import stop_file, time_limits
from qa_dist.training.watchdog import Place, described, grouped

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "MASTER_ADDR": "node7",
}


def planned(environ: dict[str, str] | None = None, devices: int = 8, no_bf16: bool = False, **options: Any) -> str:
    found = Probe(devices, no_bf16, "ddp")
    chosen = plan(Options(**options), ["train", "--x", "a b"], environ or {}, lambda machines: found)
    return " ".join(chosen.arguments()).replace(f"{CONFIGS}/", "")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            planned(),
            "--config_file ddp.yaml --num_processes 8 --num_machines 1 --machine_rank 0 --main_process_port 0 "
            "-m qa_dist train --x a b",
        ),
        (
            planned(STEP, config_file="zero2"),
            "--config_file zero2.yaml --num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip node7 "
            f"--rdzv_backend static --deepspeed_multinode_launcher standard --main_process_port {port_of(STEP)} "
            "-m qa_dist train --x a b",
        ),
        (
            planned(STEP | {"MASTER_PORT": "29500"}, config_file="fsdp2", num_processes=4),
            "--config_file fsdp2.yaml --num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip node7 "
            "--rdzv_backend static --main_process_port 29500 -m qa_dist train --x a b",
        ),
        (
            planned(num_machines=3, machine_rank=2, main_process_ip="a", main_process_port=1, devices=2, no_bf16=True),
            "--config_file ddp.yaml --num_processes 6 --num_machines 3 --machine_rank 2 --main_process_ip a "
            "--rdzv_backend static --main_process_port 1 --mixed_precision fp16 -m qa_dist train --x a b",
        ),
        (
            planned(devices=0, config_file="cpu_zero2"),
            "--config_file cpu_zero2.yaml --num_processes 2 --num_machines 1 --machine_rank 0 --main_process_port 0 "
            "-m qa_dist train --x a b",
        ),
        (
            planned(devices=4, config_file="cpu_ddp"),  # which says use_cpu
            "--config_file cpu_ddp.yaml --num_processes 2 --num_machines 1 --machine_rank 0 --main_process_port 0 "
            "-m qa_dist train --x a b",
        ),
    ],
)
def test_what_is_started(found: str, expected: str):
    assert found == expected


@pytest.mark.parametrize(
    ("environ", "options", "expected"),
    [
        (STEP | {"SLURM_STEP_NUM_TASKS": "16"}, {}, "srun has started 16 tasks on 2 nodes; one on each is needed"),
        (STEP, {"num_processes": 3}, "3 processes cannot be divided evenly among 2 machines"),
        ({}, {"num_machines": 2, "machine_rank": 0, "main_process_ip": "a"}, "--main_process_port: are not set"),
        ({}, {"num_machines": 2}, "--machine_rank: is not set"),
        ({}, {"config_file": "nowhere.yaml"}, "there is no such launch config"),
    ],
)
def test_what_cannot_be_started(environ: dict[str, str], options: dict[str, Any], expected: str):
    with pytest.raises(UserError, match=expected):
        planned(environ, **options)


def test_gpus_that_are_not_there_are_no_reason_to_train_on_the_cpu():
    with pytest.raises(UserError, match=r"zero2\.yaml is for GPUs, and none is found here"):
        planned(devices=0, config_file="zero2")
    assert "--num_processes 2" in planned(devices=0, config_file="zero2", num_processes=2)


def test_attempts_of_a_job_and_jobs_beside_each_other_have_ports_of_their_own():
    jobs = [{"SLURM_JOB_ID": str(1000 + i), "SLURM_RESTART_COUNT": str(j)} for i in range(20) for j in range(7)]
    assert len({port_of(job) for job in jobs}) == len(jobs)


def test_what_the_user_has_set_for_the_processes_stays():
    chosen = plan(Options(), ["train"], {}, lambda machines: Probe(4, False, "ddp"))
    assert chosen.environment({}, cores=32)["OMP_NUM_THREADS"] == "8"
    assert "OMP_NUM_THREADS" not in chosen.environment({"OMP_NUM_THREADS": "3"}, cores=32)


# ------------------------------------------------------------------------------------------- how it has ended


def note(rank: int, code: int | None = 0, message: str = "", at: float = 0.0) -> Note:
    return Note(rank, 100 + rank, "", "h", code, message, at)


@pytest.mark.parametrize(
    ("notes", "exits", "gone", "agent_code", "stop_signal", "code", "lines"),
    [
        ([note(0), note(1)], [], {}, 0, 0, 0, []),
        ([note(0, 143, "stopped"), note(1, 143, "stopped")], [], {}, 0, 15, 143, ["ranks 0, 1: stopped"]),
        (  # one is killed, the others notice, and some more have to be ended
            [note(0, 1, "another is gone", 5.1), note(1, None), note(2, None)],
            [Exit(1, 101, -9), Exit(2, 102, -9)],
            {1: 5.2, 2: 15.3},
            1,
            0,
            1,
            ["rank 2 had to be ended", "rank 0: another is gone", "rank 1 was killed by signal 9 (SIGKILL) (by hand"],
        ),
        (  # one fails first, and says why
            [note(0, 1, "another is gone", 7.0), note(1, 1, "no memory", 5.0)],
            [],
            {},
            1,
            0,
            1,
            ["rank 0: another is gone", "rank 1: no memory"],
        ),
        ([note(0, 2, "mend it", 1.0), note(1, None)], [Exit(1, 101, -9)], {1: 12.0}, 1, 0, 2, ["rank 1 had", "rank 0"]),
        (  # one finds a mistake, and the others are ended while they are still importing
            [note(0, 2, "mend it", 1.0), note(1, None)],
            [Exit(1, 101, -15), Exit(2, 102, -15)],
            {1: 1.2},
            1,
            0,
            2,
            ["rank 1 had to be ended", "rank 0: mend it"],
        ),
        (  # by hand
            [note(0, 1, "another is gone", 5.1), note(1, None)],
            [Exit(1, 101, -15)],
            {1: 5.0},
            1,
            0,
            1,
            ["rank 0: another is gone", "rank 1 was killed by signal 15 (SIGTERM)"],
        ),
        ([], [Exit(3, 103, 1)], {}, 1, 0, 1, ["rank 3 ended with exit code 1 without a message"]),
        ([], [], {}, 1, 0, 1, ["nothing was started: port is taken"]),
        ([note(0, None)], [], {}, -9, 15, 143, ["rank 0 had to be ended", "the launcher of the processes was killed"]),
    ],
)
def test_the_account_of_a_launch(
    notes: list[Note],
    exits: list[Exit],
    gone: dict[int, float],
    agent_code: int,
    stop_signal: int,
    code: int,
    lines: list[str],
):
    outcome = account(notes, exits, gone, "port is taken", agent_code, stop_signal)
    assert outcome.code == code
    assert outcome.in_order == (code not in (1,) and not any("had to be" in line for line in outcome.lines))
    assert len(outcome.lines) == len(lines)
    for line, expected in zip(outcome.lines, lines, strict=True):
        assert line.partition("] ")[2].startswith(expected)


def test_a_launch_directory_that_has_gone_is_no_reason_to_stop(tmp_path: Path):
    directory = LaunchDirectory(tmp_path / "gone")
    directory.note(1, "nobody will read this")
    directory.ask_to_stop(15)
    assert (directory.notes(), directory.exits(), directory.stop_signal()) == ([], ([], ""), 0)


# ------------------------------------------------------------------------------------------- hangs and stops


def test_the_lock_of_a_compilation_goes_with_its_process(tmp_path: Path):
    path = str(tmp_path / "lock")
    program = f"""
import time
from qa_dist.training.extension_lock import KernelLock
print(KernelLock({path!r}).try_acquire(), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        lock = KernelLock(path)
        assert not lock.try_acquire()
        process.kill()
        lock.wait()
        assert lock.try_acquire()
    again = KernelLock(path)
    assert not again.try_acquire()
    lock.release()
    assert again.try_acquire()


def test_those_who_are_elsewhere_than_most_are_named_first():
    waiting, reading = "in all_reduce, step.py:5 (run)", "in read, data.py:9 (collate)"
    places = {0: Place("a", waiting), 1: Place("b", reading), 2: Place("a", waiting), 3: Place("b", waiting)}
    assert described(grouped(places, 6)) == (
        "ranks 4, 5 did not answer: stopped, or the machine or its network is gone. "
        "rank 1 (b) was in read, data.py:9 (collate). "
        "ranks 0, 2, 3 (a, b) were in all_reduce, step.py:5 (run)."
    )


@pytest.mark.parametrize(
    ("content", "reason", "code"),
    [
        ("", "stopped because of the file", 130),
        ("USR1\n", "stopped by signal 10 (SIGUSR1)", 138),
        ("sigterm", "stopped by signal 15 (SIGTERM)", 143),
        ("KILL", "stopped because of the file", 130),
    ],
)
def test_a_stop_file(content: str, reason: str, code: int, tmp_path: Path):
    path = tmp_path / "stop"
    assert stop_file(path) is None
    path.write_text(content)
    request = stop_file(path)
    assert request is not None
    assert request[0].startswith(reason)
    assert request[1] == code
    assert not path.exists()


def test_limits_of_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    config = RunConfig(run=OutputConfig(max_hours=0.5, end_margin_minutes=6))
    hours, job = (moment - time.monotonic() for moment, _ in time_limits(config))
    assert hours == pytest.approx(1800, abs=2)
    assert job == pytest.approx(3600 - 360, abs=2)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 120))  # the margin would leave nothing
    _, job = (moment - time.monotonic() for moment, _ in time_limits(config))
    assert job == pytest.approx(90, abs=2)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert len(time_limits(config)) == 1
