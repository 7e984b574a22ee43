"""How soon a run that is asked to stop has left a complete checkpoint, and what it costs to look for such requests.

python -m tests.benchmarks.stopping
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qa_dist.checkpoint.manifest import NAME as MANIFEST
from qa_dist.launch_directory import LAUNCHER, LaunchDirectory, start_of
from qa_dist.reporting.status import read_status
from qa_dist.training.preemption import POLL_SECONDS, STOP_FILE_SECONDS, stop_file
from tests.helpers import ROOT, TINY_BERT, environment, jsonl, tiny_flags

MODEL = TINY_BERT | {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 4}
WAYS = ("signal to the launcher", "stop file, as slurm.sbatch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| way | stopped after / (step + write) | in any round |\n|---|---|---|")
    for way in WAYS:
        ratios = [stop(way) for _ in range(rounds)]
        print(f"| {way} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |", flush=True)
    print(f"\nLooking for requests takes {100 * share_of_polling():.3f} % of one core's time.")
    return 0


def stop(way: str) -> float:
    """Seconds from the request to a complete checkpoint, divided by those of the longest of 30 steps and of a write."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        flags = tiny_flags(
            **{"train.epochs": "20000", "checkpoint.every": "10 steps", "model.config": json.dumps(MODEL)},
            **{"train.global_batch_size": "64"},
        )
        command = [sys.executable, "-m", "qa_dist", "launch", "--config_file", "cpu_zero2"]
        process = subprocess.Popen(
            [*command, "train", *flags, "--run.output_dir", str(run)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len(lines := steps(run)) < 40:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 1))
        asked = time.time()
        if way == WAYS[0]:
            process.send_signal(signal.SIGUSR1)
        else:
            (run / "stop").write_text("USR1")
        process.wait()
        status = read_status(run)
        newest = run / f"checkpoints/step_{status['step']:08}"
        assert status["exit_code"] == 138
        lines = steps(run)
        step = max(line["seconds_per_step"] for line in lines[-30:])
        return (newest.joinpath(MANIFEST).stat().st_mtime - asked) / (step + write_seconds(newest))


def write_seconds(checkpoint: Path) -> float:
    """From the first of its files to the manifest, which is the last."""
    times = [path.stat().st_mtime for path in checkpoint.iterdir()]
    return max(times) - min(times)


def steps(run: Path) -> list[dict]:
    try:
        return [line for line in jsonl(run / "metrics.jsonl") if line["kind"] == "train"]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def share_of_polling(turns: int = 2000) -> float:
    """Of one core: the stop file, and the launch directory with the launcher's process, as often as that happens."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ[LAUNCHER] = f"{os.getpid()}@{start_of(os.getpid())}"
        launch = LaunchDirectory(Path(directory))
        started = time.thread_time()
        for _ in range(turns):
            stop_file(Path(directory) / "stop")
        files = (time.thread_time() - started) / turns / STOP_FILE_SECONDS
        started = time.thread_time()
        for _ in range(turns):
            launch.stop_signal()
        return files + (time.thread_time() - started) / turns / POLL_SECONDS


if __name__ == "__main__":
    sys.exit(main())
