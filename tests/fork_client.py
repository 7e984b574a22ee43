"""Ask the fork server for a program; see `tests/fork_server.py`.

    python -I -S tests/fork_client.py PYTHON SOCKET COMMAND [ARGUMENT OF PYTHON ...]

COMMAND: the path by which this program was called. Imports little, as each launcher and rank starts with it.
"""

import json
import os
import signal
import socket
import sys

REAL = ("LD_PRELOAD", "PYTHONHASHSEED")
"""Variables that take effect when Python starts: with one of them the real one is started."""


def main() -> None:
    python, address, command, *arguments = sys.argv[1:]
    plain = [argument for argument in arguments if argument != "-u"]
    if not plain or (plain[0].startswith("-") and plain[0] not in ("-m", "-c")) or any(map(os.environ.get, REAL)):
        os.execv(python, [python, *arguments])
    environment = dict(os.environ)
    if "-u" in arguments[:1]:
        environment["PYTHONUNBUFFERED"] = "1"
    environment["QA_DIST_TESTS_PYTHON"] = command
    request = {"arguments": plain, "directory": os.getcwd(), "environment": environment}  # noqa: PTH109 -- see above
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    content = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(connection, [content], [0, 1, 2])
    connection.sendall(content[sent:])
    answers = connection.makefile()
    program = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, lambda number, _: pass_on(program, number))
    code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def pass_on(program: int, number: int) -> None:
    try:  # noqa: SIM105 -- contextlib takes longer to import than the rest
        os.kill(program, number)
    except ProcessLookupError:  # it has ended, and its exit status is on its way
        pass


main()
