"""The command `qa-dist launch`."""

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from qa_dist.config import RunConfig
from qa_dist.errors import TIME_IS_UP, UserError
from qa_dist.launching.plan import OPTIONS, Options, own_cores, plan
from qa_dist.launching.probe import probe
from qa_dist.launching.supervisor import Outcome, supervise
from qa_dist.reporting.run_lock import record_end
from qa_dist.training.next_steps import after_stop, command_of_this_process

USAGE = """usage: qa-dist launch [OPTIONS] COMMAND [ARGUMENTS]

Starts `qa-dist COMMAND ARGUMENTS` on all GPUs of this machine, or of every node of a SLURM job step, with
`accelerate launch`; watches the processes, and ends with their exit code.

{options}
  --dry_run            Print the command line of each machine, and start nothing.

  qa-dist launch train --config run.yaml --resume auto
  qa-dist launch --config_file zero2 --num_machines 2 --machine_rank 0 --main_process_ip node0 \\
      --main_process_port 29500 train --config run.yaml
"""
NUMBERS = ("num_machines", "machine_rank", "num_processes", "main_process_port")
PATIENCE_SECONDS = 3
"""How long a task of several that failed waits for the others to say what is the matter with them."""
COMMANDS = ("train", "evaluate", "predict", "doctor")
"""Those that run on several processes."""


def launch(
    args: Sequence[str],
    settings_of: Callable[[Sequence[str]], RunConfig],
    show: Callable[[str], object],
    say: Callable[[str], object],
) -> int:
    """Start what `args` say, and return its exit code. Raises `UserError`.

    `settings_of`: the settings that a command and its arguments amount to. `show` prints what was asked for, `say`
    what goes on.
    """
    values, program = _parse(args)
    if "help" in values or not program:
        text = "\n".join(f"  --{name:<18} {text}" for name, text in OPTIONS.items())
        (show if "help" in values else say)(USAGE.format(options=text))
        return 0 if "help" in values else 2
    if program[0] not in COMMANDS:
        raise UserError(f"launch: {program[0]} does not run on several processes; {', '.join(COMMANDS)} do")
    config = settings_of(program)  # a mistake is told here, once, and not by every process
    options = Options(**values)
    chosen = plan(options, program, os.environ, lambda machines: probe(config, machines, options.num_processes))
    cores = own_cores()
    if options.dry_run:
        show("\n".join(chosen.lines(os.environ, cores)))
        return 0
    if cores < chosen.processes_here:
        more = "give the job more (sbatch --cpus-per-task or --exclusive)" if "SLURM_JOB_ID" in os.environ else ""
        say(f"qa-dist launch: note: {cores} cores for {chosen.processes_here} processes; {more or 'it will be slow'}")
    if chosen.machines.count > 1:
        place = f"{socket.gethostname()} is machine {chosen.machines.rank} of {chosen.machines.count}"
        say(f"qa-dist launch: {place}; machine 0 is {chosen.machines.main_ip}, port {chosen.machines.main_port}")
    started = time.time()
    # A terminal may show the progress bar of a process in the line that is cleared.
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""
    outcome = supervise(
        chosen.arguments(), chosen.environment(os.environ, cores), lambda text: say(f"{clear}qa-dist launch: {text}")
    )
    if outcome.main_pid is not None and outcome.code:
        _record(outcome, config, outcome.main_pid, started)
    hints: list[str] = []
    if program[0] == "train" and (outcome.code in (1, TIME_IS_UP) or outcome.code > 128) and chosen.machines.rank == 0:
        command = command_of_this_process() if chosen.machines.count == 1 else None
        hints = after_stop(config.output_dir, command)
    for line in [*hints, *outcome.lines]:
        say(f"qa-dist launch: {line}")
    if chosen.machines.count > 1 and "SLURM_STEP_ID" in os.environ:
        return _in_step(outcome)
    return outcome.code


def _record(outcome: Outcome, config: RunConfig, main_pid: int, started: float) -> None:
    """Correct the run's status.json where the main process could not: it was frozen, or killed."""
    state = "stopped" if outcome.code > 128 or outcome.code == TIME_IS_UP else "failed"
    reason = outcome.lines[-1].partition("] ")[2] if outcome.lines else f"ended with exit code {outcome.code}"
    end = {"state": state, "reason": reason, "exit_code": outcome.code}
    record_end(config.output_dir, main_pid, started, end)


def _in_step(outcome: Outcome) -> int:
    """Exit code of a task of several in a SLURM job step. srun kills the other tasks once one has failed; a stop, of
    which all are to come to the end, is no failure to it. The run's status.json tells the exit code."""
    if outcome.code > 128 or outcome.code == TIME_IS_UP:
        if outcome.in_order:
            return 0
        return 1  # what was stopped here was stopped because something had failed
    if outcome.code:
        time.sleep(PATIENCE_SECONDS)
    return outcome.code


def _parse(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options, and what follows them. Raises `UserError`."""
    values: dict[str, Any] = {}
    rest = list(args)
    while rest and rest[0].startswith("-"):
        flag, _, value = rest.pop(0).partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if name in ("h", "help"):
            return {"help": True}, []
        if name == "dry_run":
            values["dry_run"] = True
            continue
        if not flag.startswith("--") or name not in OPTIONS:
            raise UserError(f"launch: there is no option {flag}; options of the command come after its name")
        if not value and not rest:
            raise UserError(f"{flag}: needs a value")
        value = value or rest.pop(0)
        if name in NUMBERS:
            if not value.isdigit():
                raise UserError(f"{flag}: {value!r} is not a number")
            values[name] = int(value)
        else:
            values[name] = value
    return values, rest
