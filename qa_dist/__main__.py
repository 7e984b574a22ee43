"""`python -m qa_dist`, which is what `accelerate launch -m qa_dist` starts on every process."""

import os
import sys

from qa_dist.cli import main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        # Everything is written and closed by now. Leave without the destructors of native libraries: after DDP over
        # gloo one run in some forty ended with "terminate called without an active exception", which made a failure
        # of a finished run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
