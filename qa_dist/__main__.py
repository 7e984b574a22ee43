"""`python -m qa_dist`, which is what `accelerate launch -m qa_dist` starts on every process."""

import os
import sys
from typing import NoReturn

from qa_dist.cli import main


def run() -> NoReturn:
    """The command line, and the end of the process."""
    try:
        main()
    except SystemExit as end:
        # Everything is written and closed by now. Leave without the destructors of native libraries: after DDP over
        # gloo one run in some forty ended with "terminate called without an active exception", which made a failure
        # of a finished run. And a push that a silent Hub holds up must not hold up the end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)


if __name__ == "__main__":
    run()
