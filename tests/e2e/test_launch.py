"""`qa-dist launch`: processes that are watched, stopped and accounted for. Real processes, real signals."""

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from qa_dist.cli import main
from qa_dist.reporting.status import read_status
from tests.helpers import ROOT, TINY_BERT, Launcher, environment, tiny_flags

LONG = tiny_flags(**{"train.epochs": "20000", "checkpoint.every": "20 steps"})
LAUNCH = [sys.executable, "-m", "qa_dist", "launch"]


def start(*args: object, forked_ranks: bool = True, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*LAUNCH, *map(str, args)],
        cwd=ROOT,
        env={**environment(forked_ranks=forked_ranks), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_of(process: "subprocess.Popen[str]", seconds: float = 60) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise AssertionError(f"no end after {seconds} s:\n{process.communicate()[0]}") from None


def wait_until(process: "subprocess.Popen[str]", condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(end_of(process, 1))
        time.sleep(0.1)


def ranks(process: "subprocess.Popen[str]") -> dict[int, psutil.Process]:
    """The processes that train, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        command = child.cmdline()
        if "qa_dist" in command and "train" in command and "qa_dist.launching.agent" not in command:
            found[int(child.environ().get("RANK", 0))] = child
    return found


def trains(run: Path, step: int = 3) -> Callable[[], bool]:
    def check() -> bool:
        return (run / "metrics.jsonl").is_file() and len(jsonl_of(run)) >= step

    return check


def jsonl_of(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that is being written."""
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.split("_")[1]) for path in (run / "checkpoints").glob("step_*"))


@pytest.fixture
def started(tmp_path: Path):
    """A run of two processes that would take long, which is past its third step; no process is left of it."""
    processes: list[subprocess.Popen[str]] = []
    left: list[psutil.Process] = []

    def begin(
        *flags: str, engine: str = "cpu_zero2", forked_ranks: bool = True, **env: str
    ) -> "tuple[subprocess.Popen[str], Path]":
        run = tmp_path / "run"
        arguments = ("--config_file", engine, "train", *LONG, "--run.output_dir", run, *flags)
        process = start(*arguments, forked_ranks=forked_ranks, **env)
        processes.append(process)
        wait_until(process, trains(run))
        left.extend(psutil.Process(process.pid).children(recursive=True))
        return process, run

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    _, alive = psutil.wait_procs(left, timeout=30)
    for one in alive:
        one.kill()
    assert not alive


# ------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_stops_all_processes_with_a_checkpoint(number: int, started):
    process, run = started()
    process.send_signal(number)
    output = end_of(process)
    assert process.returncode == 128 + number, output
    status = read_status(run)
    assert (status["state"], status["exit_code"]) == ("stopped", 128 + number)
    assert checkpoints(run)[-1] == status["step"]
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("qa-dist launch: ")
    assert "ranks 0, 1: stopped by signal" in output.splitlines()[-1]


def test_what_a_terminal_shows_and_the_commands_that_it_names(tmp_path: Path):
    """Ctrl-C; the printed command is run as it is printed, and then the one that a completed run names."""
    run = tmp_path / "a run"
    flags = tiny_flags(**{"train.epochs": "6", "checkpoint.every": "20 steps"})
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        command = [*LAUNCH, "--config_file", "cpu_ddp", "train", *flags, "--run.output_dir", str(run)]
        os.execvpe(command[0], command, {**environment(), "TERM": "xterm", "COLUMNS": "120"})
    shown = bytearray()
    has_asked = False
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while part := os.read(terminal, 65536):
            shown += part
            if not has_asked and b"loss" in part and jsonl_of(run):
                has_asked = True
                os.write(terminal, b"\x03")
    os.close(terminal)
    text = shown.decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, text
    lines = [line.rpartition("\r\x1b[2K")[2].strip("\r") for line in text.split("\n")]  # what of each is not cleared
    assert "qa-dist launch: SIGINT: stopping after the current step, with a checkpoint" in lines, text
    step = read_status(run)["step"]
    assert f"qa-dist launch: checkpoint of step {step}: {run}/checkpoints/step_{step:08}" in lines
    again = next(line for line in lines if "to resume" in line).removeprefix("qa-dist launch: to resume: ")
    done = subprocess.run(again, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{run}/checkpoints/step_{step:08} (step {step})" in done.stdout
    _, report, serve = done.stdout.splitlines()[-3:]
    assert shlex.split(serve, comments=True) == ["qa-dist", "serve", "--model", str(run / "model")]
    with pytest.raises(SystemExit) as exit_:
        main(shlex.split(report, comments=True)[1:])
    assert exit_.value.code == 0
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_signals_to_all_processes_at_once_are_one_request(started):
    """As some batch systems send them, and a terminal's Ctrl-C."""
    process, run = started()
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        one.send_signal(signal.SIGTERM)
    output = end_of(process)
    assert process.returncode == 143, output
    assert checkpoints(run)[-1] == read_status(run)["step"]


@pytest.mark.slow
def test_a_second_signal_stops_at_once(started):
    """Even where a process would never come to the end of its step."""
    process, _ = started(forked_ranks=False)
    ranks(process)[1].suspend()
    process.send_signal(signal.SIGTERM)
    time.sleep(6)  # signals within five seconds are one
    process.send_signal(signal.SIGTERM)
    output = end_of(process, 20)
    assert process.returncode == 143, output


def test_a_stop_file_stops_and_does_not_stay(started):
    process, run = started()
    (run / "stop").touch()
    output = end_of(process)
    assert process.returncode == 130, output
    assert "because of the file" in read_status(run)["reason"]
    assert checkpoints(run)[-1] == read_status(run)["step"]
    assert not (run / "stop").exists()


@pytest.mark.slow
def test_time_that_is_up(started):
    process, run = started("--run.max_hours", "0.004")  # 14 s
    output = end_of(process)
    assert process.returncode == 75, output
    status = read_status(run)
    assert (status["state"], status["reason"]) == (
        "stopped",
        "stopped: the time limit run.max_hours (0.004) is reached",
    )
    assert checkpoints(run)[-1] == status["step"]


def test_the_time_limit_of_a_slurm_job(started):
    process, run = started(SLURM_JOB_ID="17", SLURM_JOB_END_TIME=str(int(time.time()) + 45))
    output = end_of(process)
    assert process.returncode == 75, output
    assert "the SLURM job's time limit is near" in read_status(run)["reason"]
    assert read_status(run)["job"] == "SLURM 17"


# -------------------------------------------------------------------------------------------------- failing


def test_a_process_that_is_killed(started):
    process, run = started(forked_ranks=False)
    ranks(process)[1].kill()
    output = end_of(process)
    assert process.returncode == 1
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert re.search(r"rank 1 was killed by signal 9 \(SIGKILL\) \(by hand, or by the system because the host's", last)
    assert read_status(run)["state"] == "failed"
    assert "another process of this run is gone" in output


@pytest.mark.slow
def test_the_launcher_underneath_is_killed(started):
    """The processes, which it would have ended, are told to stop."""
    process, run = started(forked_ranks=False)
    agent = next(c for c in psutil.Process(process.pid).children() if "qa_dist.launching.agent" in c.cmdline())
    agent.kill()
    output = end_of(process)
    assert process.returncode != 0, output
    assert read_status(run)["state"] == "stopped", output
    assert checkpoints(run)[-1] == read_status(run)["step"]


def test_the_launcher_itself_is_killed(started):
    """Nobody is left to end the processes: they do it themselves."""
    process, run = started(forked_ranks=False)
    left = ranks(process)
    process.kill()
    process.wait()
    psutil.wait_procs(list(left.values()), timeout=30)
    assert read_status(run)["state"] == "stopped"
    assert checkpoints(run)[-1] == read_status(run)["step"]


@pytest.mark.parametrize("frozen", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_hangs(frozen: int, started):
    """Also that one through which the processes talk."""
    process, run = started("--run.step_timeout_minutes", "0.05", engine="cpu_ddp", forked_ranks=False)
    ranks(process)[frozen].suspend()
    output = end_of(process, 90)
    assert process.returncode == 1
    last = output.splitlines()[-1]
    assert "no progress for" in last, output
    other = 1 - frozen
    assert f"rank {frozen} did not answer: stopped, or the machine or its network is gone. rank {other} (" in last
    assert re.search(rf"rank {other} \(\S+\) was in \w+, \w+\.py:\d+ \(\w+\)\.$", last)
    assert f"rank {other} was here:\n  File " in output
    status = read_status(run)  # which the launcher corrects, where the main process is the frozen one
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert f"rank {frozen} did not answer" in status["reason"]
    assert status["launch"] == "DDP, float32, 2 processes on cpu"


@pytest.mark.slow
def test_a_process_that_hangs_in_the_first_batch_of_an_evaluation(tmp_path: Path):
    """Which has the limit of a step, since all that it does was done in training."""
    run = tmp_path / "run"
    model = TINY_BERT | {"hidden_size": 128, "num_hidden_layers": 4}
    sizes = {"data.synthetic.train_examples": "8", "data.synthetic.validation_examples": "300", "train.epochs": "1"}
    flags = tiny_flags(**{**sizes, "model.config": json.dumps(model), "evaluation.batch_size": "400"})
    limits = ("--run.step_timeout_minutes", "0.2")
    process = start("--config_file", "cpu_ddp", "train", *flags, *limits, "--run.output_dir", run, forked_ranks=False)
    wait_until(
        process, lambda: (run / "metrics.jsonl").is_file() and jsonl_of(run)[-1:] and jsonl_of(run)[-1]["epoch"] == 1
    )
    ranks(process)[1].suspend()
    output = end_of(process, 120)
    last = output.splitlines()[-1]
    assert re.search(
        r"no progress for \d+ s in the evaluation, batch 1 of \d+ \(run\.step_timeout_minutes: 12 s\)", last
    ), output
    assert "rank 1 did not answer" in last


@pytest.mark.slow
def test_a_process_that_hangs_while_a_checkpoint_waits_for_the_one_before(tmp_path: Path):
    """The disk may take its time, and a process that does not answer not."""
    run = tmp_path / "run"
    model = TINY_BERT | {"max_position_embeddings": 1_000_000}  # which makes large checkpoints, and costs no time else
    flags = tiny_flags(**{"train.epochs": "20000", "checkpoint.every": "1 step", "model.config": json.dumps(model)})
    limits = ("--run.step_timeout_minutes", "0.1")
    process = start("--config_file", "cpu_ddp", "train", *flags, *limits, "--run.output_dir", run, forked_ranks=False)

    def waits() -> bool:
        if not (run / "metrics.jsonl").is_file() or not (logged := jsonl_of(run)):
            return False
        return (run / f"checkpoints/.step_{logged[-1]['step'] - 1:08}.tmp").is_dir()

    wait_until(process, waits)
    ranks(process)[1].suspend()
    output = end_of(process, 120)
    last = output.splitlines()[-1]
    assert "no sign of life from rank 1 for" in last, output
    assert "in waiting until the previous checkpoint is written (run.step_timeout_minutes: 6 s)" in last
    assert "rank 1 did not answer" in last


@pytest.mark.parametrize("launched", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_memory_that_does_not_suffice_on_one_process(launched: bool, started, launcher: Launcher, tmp_path: Path):
    """It is told with its rank, by `qa-dist launch` and by `accelerate launch`, and the others end too."""
    if launched:
        process, run = started(forked_ranks=False)
    else:
        run = tmp_path / "plain"
        process = launcher.start(
            launcher.command("zero2", 2, "-m", "qa_dist", "train", *LONG, "--run.output_dir", str(run))
        )
        wait_until(process, trains(run))
    one = ranks(process)[1]
    one.rlimit(psutil.RLIMIT_AS, (one.memory_info().vms, one.memory_info().vms))
    output = end_of(process)
    assert process.returncode == 1
    assert re.search(r"rank 1\]?:? .*the memory of this machine does not suffice", output)
    if launched:
        assert "rank 1: the memory of this machine does not suffice" in output.splitlines()[-1]
    assert read_status(run)["state"] == "failed"


# -------------------------------------------------------------------------------------------- what is started


def test_one_process_without_a_gpu(tmp_path: Path):
    run = tmp_path / "run"
    process = start("train", *tiny_flags(), "--run.output_dir", run)
    output = end_of(process, 120)
    assert process.returncode == 0, output
    assert "float32, 1 process on cpu" in read_status(run)["launch"]


def test_a_mistake_is_told_once_and_its_exit_code_comes_through(tmp_path: Path):
    flags = [*tiny_flags(**{"model.config": ""}), "--model.name", "./nowhere", "--run.output_dir", tmp_path / "run"]
    process = start("--config_file", "cpu_zero2", "train", *flags)
    output = end_of(process)
    assert process.returncode == 2, output
    assert output.count("model.name: ./nowhere: there is no such directory") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--config_file", "zero7", "train"], "--config_file: zero7: there is no such launch config"),
        (["--num_machines", "2", "train"], "--machine_rank: is not set"),
        (["--num_machines", "2", "--machine_rank", "2", "train"], "--machine_rank: 2 is not the number of a machine"),
        (["--num_machines", "2", "--machine_rank", "0", "train"], "--main_process_ip and --main_process_port: are not"),
        (["--num_processes", "x", "train"], "--num_processes: 'x' is not a number"),
        (["--nonsense", "train"], "there is no option --nonsense"),
        (["score"], "score does not run on several processes"),
        (["--config_file", "cpu_ddp", "train", "--train.epoch", "3"], "--train.epoch"),
    ],
)
def test_mistakes(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["launch", *args])
    assert exit_.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_command_lines_of_a_dry_run_are_those_that_run(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    flags = ["train", *tiny_flags(), "--run.output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit_:
        main(["launch", "--dry-run", "--config_file", "cpu_zero2", *flags])
    assert exit_.value.code == 0
    line = capsys.readouterr().out.strip()
    bin_ = Path(sys.executable).parent
    done = subprocess.run(
        line,
        shell=True,
        cwd=ROOT,
        env={**environment(), "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"},
        timeout=120,
    )
    assert done.returncode == 0
    assert read_status(tmp_path / "run")["launch"] == "DeepSpeed ZeRO-2, float32, 2 processes on cpu"


def test_a_world_smaller_than_planned_is_refused(tmp_path: Path):
    """As when one of two launchers is told of one machine only."""
    environ = {**environment(), "QA_DIST_WORLD_SIZE": "4"}
    command = [sys.executable, "-m", "qa_dist", "train", *tiny_flags(), "--run.output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "4 processes were to be started, and this is one of 1" in done.stderr
