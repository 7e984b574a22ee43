"""Training speed while it pushes to a Hub that takes a minute for every answer, or never answers, beside none at all.

The three are run by turns; all write the same checkpoints. Compared are the medians of the seconds per step.

    python -m tests.benchmarks.hub
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from tests.helpers import TINY_BERT, Launcher, jsonl, tiny_flags
from tests.hub_server import Fault, HubServer, hang

KINDS = ("none", "slow", "silent")
SHAPE = TINY_BERT | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}


def seconds_per_step(kind: str, directory: Path, epochs: int, delay: float) -> tuple[float, int]:
    """The median of one run's steps, and how many pushes were done."""
    flags = tiny_flags(
        **{
            "model.config": json.dumps(SHAPE),
            "data.synthetic.train_examples": "600",
            "train.epochs": str(epochs),
            "train.global_batch_size": "16",
            "checkpoint.every": "40 steps",
            "run.log_every": "5",
            "hub.drain_timeout": "1",
        }
    )
    directory.mkdir()
    with HubServer(directory / "hub") as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "0"}
        if kind != "none":
            flags += ["--hub.repo_id", "alice/model"]
            # after the one that makes the repository, at the start
            late = hang(delay if kind == "slow" else None)
            hub.faults.add(Fault("POST", "", late, times=None, after=1))
        launch = Launcher(directory).train("ddp", 2, directory / "run", *flags, timeout=1200)
        status = json.loads((directory / "run/status.json").read_text())
        if status["state"] != "completed":
            sys.exit(launch.output)
    lines = [line for line in jsonl(directory / "run/metrics.jsonl") if line["kind"] == "train"]
    return statistics.median(line["seconds_per_step"] for line in lines[4:]), len(
        status.get("hub", {}).get("pushed", [])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20, help="how long each run is")
    parser.add_argument("--delay", type=float, default=60.0, help="seconds until the slow Hub answers")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    pushed = 0
    with tempfile.TemporaryDirectory() as directory:
        for number in range(arguments.rounds):
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                path = Path(directory) / f"{number}-{kind}"
                seconds, pushes = seconds_per_step(kind, path, arguments.epochs, arguments.delay)
                found[kind].append(seconds)
                pushed += pushes if kind == "slow" else 0
                print(f"{number} {kind}: {seconds * 1e3:.1f} ms a step, {pushes} pushed", file=sys.stderr, flush=True)
    print("| Hub | time per step / without a Hub | in any round |")
    print("|---|---|---|")
    for kind, name in (("slow", f"answers after {arguments.delay:g} s ({pushed} pushed)"), ("silent", "never answers")):
        ratios = [with_hub / without for with_hub, without in zip(found[kind], found["none"], strict=True)]
        print(f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")


if __name__ == "__main__":
    main()
