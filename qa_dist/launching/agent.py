"""`accelerate launch`, without its tracebacks: which process failed, and how, goes to the launch directory instead.

`python -m qa_dist.launching.agent ARGUMENTS` does what `accelerate launch ARGUMENTS` does. Signals that ask for a stop
do not touch it: the processes hear of them from the launch directory, write their checkpoint and end, and so does this
one. By itself it would have passed the signal on, and killed them after a deadline of its own.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import NoReturn

import psutil

from qa_dist.launch_directory import STOP_SIGNALS, Exit, LaunchDirectory, when_orphaned

SHUTDOWN_SECONDS = 10
"""After one process has failed: how long the others have to end by themselves."""


def main() -> NoReturn:
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
    logging.disable(logging.ERROR)  # what has failed is told at the end
    for number in STOP_SIGNALS:  # which the processes inherit, until they listen to them
        signal.signal(number, signal.SIG_IGN)
    when_orphaned(_end_all)
    directory = LaunchDirectory.of_this_process()
    if directory is not None:
        tempfile.tempdir = str(directory.path)  # of this process: torch's launcher leaves a directory at every start
    exits: list[Exit] = []
    problem = ""
    try:
        _launch(sys.argv[1:])
    except SystemExit as end:
        problem = "" if end.code in (0, None) else f"accelerate launch has ended with {end.code}"
    except subprocess.CalledProcessError as error:  # the one process of the plainest launcher
        exits = [Exit(0, 0, error.returncode)]
    except BaseException as error:
        exits = _exits(error)
        problem = "" if exits else f"{type(error).__name__}: {error}"
    if directory is not None and (exits or problem):
        directory.write_exits(exits, problem)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if exits or problem else 0)


def _end_all() -> NoReturn:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(1)


def _launch(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    with contextlib.redirect_stdout(sys.stderr):
        args = launch_command_parser().parse_args(arguments)
        launch_command(args)


def _exits(error: BaseException) -> list[Exit]:
    """The processes that torch's launcher names in its error, in the order in which they failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not isinstance(error, ChildFailedError):
        return []
    failures = sorted(error.failures.items(), key=lambda item: getattr(item[1], "timestamp", time.time()))
    return [Exit(rank, failure.pid, failure.exitcode) for rank, failure in failures]


if __name__ == "__main__":
    main()
