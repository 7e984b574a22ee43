"""Two launchers, as on two machines without SLURM: the recipe of the README, and the ways in which it goes wrong."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from qa_dist.reporting.status import read_status
from tests.helpers import ROOT, environment, jsonl, kill_group, tiny_flags

CONFIGS = ROOT / "configs/accelerate"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
LAUNCH = [sys.executable, "-m", "qa_dist", "launch"]


def launch_on_two(tmp_path: Path, command: Sequence[str], program: Sequence[str]) -> list[tuple[int, str]]:
    """Exit code and output of each machine's launcher. Each is told its number, and where machine 0 is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the home directory, since DeepSpeed's own launcher writes there
    environ = {**environment(), "HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    processes = []
    for rank in range(2):
        place = ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        processes.append(
            subprocess.Popen(
                [*command, *place, *program, *tiny_flags(), "--run.output_dir", str(tmp_path / "run")],
                cwd=ROOT,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize("engine", ["cpu_zero2", pytest.param("cpu_ddp", marks=pytest.mark.slow)])
def test_the_recipe_for_accelerate_launch(engine: str, tmp_path: Path):
    command = [*ACCELERATE, "--config_file", str(CONFIGS / f"{engine}.yaml")]
    command += ["--num_machines", "2", "--num_processes", "2"]
    (first, output), (second, other) = launch_on_two(tmp_path, command, ["-m", "qa_dist", "train"])
    assert (first, second) == (0, 0), output + other
    assert "2 processes on cpu" in read_status(tmp_path / "run")["launch"]
    assert len([line for line in jsonl(tmp_path / "run/metrics.jsonl") if line["kind"] == "train"]) == 26


def test_the_recipe_for_our_own_launcher(tmp_path: Path):
    command = [*LAUNCH, "--config_file", "cpu_zero2", "--num_machines", "2"]
    (first, output), (second, other) = launch_on_two(tmp_path, command, ["train"])
    assert (first, second) == (0, 0), output + other
    assert read_status(tmp_path / "run")["launch"] == "DeepSpeed ZeRO-2, float32, 2 processes on cpu"


def test_worlds_of_one_under_the_option_cpu_are_refused(tmp_path: Path):
    command = [*ACCELERATE, "--cpu", "--num_machines", "2", "--num_processes", "2"]
    for code, output in launch_on_two(tmp_path, command, ["-m", "qa_dist", "train"]):
        assert code != 0
        assert "more processes were asked for, but this one was started alone" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("deepspeed", path=Path(sys.executable).parent) is None, reason="no deepspeed command")
def test_worlds_of_one_under_deepspeeds_own_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which Accelerate chooses by itself, and which knows of other machines only from a hostfile."""
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / ".deepspeed_env"))  # to which the whole environment is written
    content = yaml.safe_load((CONFIGS / "cpu_zero2.yaml").read_text())
    del content["deepspeed_config"]["deepspeed_multinode_launcher"]
    config = tmp_path / "launch.yaml"
    config.write_text(yaml.safe_dump(content))
    command = [*ACCELERATE, "--config_file", str(config), "--num_machines", "2", "--num_processes", "2"]
    outputs = launch_on_two(tmp_path, command, ["-m", "qa_dist", "train"])
    assert all(code != 0 for code, _ in outputs)
    assert any("several machines were asked for, but DeepSpeed's launcher has started" in text for _, text in outputs)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_launchers_that_do_not_agree_are_refused(tmp_path: Path):
    """One process on each of two machines, and two on the second."""
    command = [*LAUNCH, "--config_file", "cpu_ddp", "--num_machines", "2"]
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/launch"
    script.write_text(f'#!/bin/sh\n[ "$2" = 1 ] && n=4 || n=2\nexec {" ".join(command)} --num_processes $n "$@"\n')
    script.chmod(0o755)
    for code, output in launch_on_two(tmp_path, [str(script)], ["train"]):
        assert code == 2, output
        assert "processes were to be started, and this is one of 3" in output
    assert not (tmp_path / "run").exists()
