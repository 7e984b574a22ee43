"""What to do when a run has ended: look at it and use it, or resume it. For the last lines of its output."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from qa_dist.checkpoint import manifest as manifests

LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
MOST_ANCESTORS = 4
"""How far a launcher may be above its processes: Accelerate may start another launcher."""


def after_completion(run: Path) -> list[str]:
    """Return the commands with which to look at a completed run, and to use its model if it has one."""
    lines = [f"  qa-dist report {shlex.quote(str(run))}  # a page of its figures and examples"]
    if (run / "model").is_dir():
        lines.append(f"  qa-dist serve --model {shlex.quote(str(run / 'model'))}  # a page to try the model")
    return lines


def after_stop(run: Path, command: Sequence[str] | None) -> list[str]:
    """Return where the newest checkpoint of a run is that was stopped or has failed, and how to resume it; nothing
    where there is no checkpoint.

    `command`: the one that started the run; None if that is not known.
    """
    newest = newest_checkpoint(run)
    if newest is None:
        return []
    again = shlex.join(resuming(command)) if command else "start the same command with --resume auto"
    return [f"checkpoint of step {manifests.step_number(newest.name)}: {newest}", f"to resume: {again}"]


def newest_checkpoint(run: Path) -> Path | None:
    """Return the directory of the newest complete checkpoint: one that has a manifest."""
    found = [
        path.parent
        for path in run.glob(f"checkpoints/step_*/{manifests.NAME}")
        if manifests.DIRECTORY.fullmatch(path.parent.name)
    ]
    return max(found, key=lambda path: manifests.step_number(path.name), default=None)


def resuming(command: Sequence[str]) -> list[str]:
    """Return `command` with --resume auto in place of any other --resume."""
    kept: list[str] = []
    arguments = iter(command)
    for argument in arguments:
        if argument == "--resume":
            next(arguments, None)
        elif not argument.startswith("--resume="):
            kept.append(argument)
    return [*kept, "--resume", "auto"]


def command_of_this_process(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the command with which a user started this process, or the launcher above it; None if that is not known:
    in a batch job, and where the run is on several machines, each of which has a command of its own."""
    if "SLURM_JOB_ID" in environ or environ.get("LOCAL_WORLD_SIZE", "1") != environ.get("WORLD_SIZE", "1"):
        return None
    launcher: list[str] | None = None
    try:
        process = psutil.Process()
        for ancestor in process.parents()[:MOST_ANCESTORS]:
            command = ancestor.cmdline()
            if _is_launcher(command):
                launcher = command
    except psutil.Error:
        return None
    if launcher is None and "LOCAL_RANK" in environ:
        return None
    command = launcher or sys.orig_argv
    return shortened(command) if "train" in command else None  # not where main() was called from Python


def _is_launcher(command: Sequence[str]) -> bool:
    names = [Path(part).name for part in command[:2]]
    return any(name in LAUNCHERS for name in names) or "accelerate.commands" in " ".join(command[:3])


def shortened(command: Sequence[str]) -> list[str]:
    """Return `command` as it is typed: the system shows that of an installed script with its interpreter and path."""
    if len(command) < 2 or not Path(command[0]).name.startswith("python") or command[1].startswith("-"):
        return list(command)
    script = Path(command[1])
    found = shutil.which(script.name)
    if found is not None and script.is_file() and script.samefile(found):
        return [script.name, *command[2:]]
    return list(command[1:]) if os.access(script, os.X_OK) else list(command)
