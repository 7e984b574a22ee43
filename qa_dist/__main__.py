"""`python -m qa_dist`, which is what `accelerate launch -m qa_dist` starts on every process."""

import os
import sys
import traceback
from typing import NoReturn

from qa_dist.cli import main
from qa_dist.launch_directory import LaunchDirectory, conclude, when_orphaned


def run() -> NoReturn:
    """The command line, and the end of the process."""
    if directory := LaunchDirectory.of_this_process():
        directory.note()
        when_orphaned(lambda: os._exit(1))
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        conclude(code, "")
    except BaseException as error:
        traceback.print_exc()
        code = 1
        conclude(code, f"{type(error).__name__}: {error}")
    # Everything is written and closed by now. Leave without the destructors of native libraries: after DDP over gloo
    # one run in some forty ended with "terminate called without an active exception", which made a failure of a
    # finished run. And a push that a silent Hub holds up must not hold up the end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
