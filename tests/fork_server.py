"""Start Python programs from a process that has imported the libraries already.

Importing torch, transformers and DeepSpeed takes several seconds of CPU time, and the tests start hundreds of launchers
and ranks. `ForkServer.python` is a command that takes the arguments of `python`: it asks a server process, which has
imported the libraries and runs on one thread, to fork, and the fork runs the program with the standard streams, the
working directory and the environment of the caller. The command passes signals on and ends with the program's exit
status, so that launchers (`accelerate launch`, torchrun) can use it in place of `python`.

What differs from `python`: the program's process is not a child of its caller, and all programs have the same hash
seed. Tests that look at process ids, or that kill processes, start the real one.

The server runs `python -m tests.fork_server SOCKET`; the command runs `tests/fork_client.py`.
"""

import array
import contextlib
import gc
import importlib
import io
import json
import os
import random
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
PRELOADED = [
    "accelerate",
    "accelerate.commands.launch",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "jinja2.ext",
    "matplotlib.figure",
    "pandas",
    "psutil",
    "pyarrow.parquet",
    "pydantic",
    "regex",
    "rich.progress",
    "rich.table",
    "safetensors.torch",
    "tensorboard",
    "tokenizers",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "transformers.integrations.deepspeed",
    "tyro",
    "yaml",
]
"""Modules that the server imports. None of the package's own: each program imports those itself."""
REQUEST_SIZE = 1 << 20
"""Most bytes of a request: arguments, working directory and environment as JSON."""


class ForkServer:
    """A server process, started at its first use."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="qa_dist-fork-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Return the process id of the server, or None if it was not started."""
        return self._process.pid if self._process else None

    @property
    def python(self) -> str:
        """Return the path of a command to be used in place of `python`."""
        command = self._directory / "python"
        if self._process is None:
            address = self._directory / "socket"
            client = shlex.join(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("fork_client.py")), sys.executable]
            )
            command.write_text(f'#!/bin/sh\nexec {client} {shlex.join([str(address), str(command)])} "$@"\n')
            command.chmod(0o755)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(address)],
                cwd=ROOT,
                stdin=subprocess.PIPE,  # it ends when this process does
                start_new_session=True,
            )
            while not address.exists():
                if self._process.poll() is not None:
                    raise RuntimeError("the fork server has failed; its messages are above")
                time.sleep(0.01)
        return str(command)

    def close(self) -> None:
        """End the server and remove its files."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
        for path in self._directory.iterdir():
            path.unlink()
        self._directory.rmdir()


def serve(address: Path) -> None:
    """Answer requests until standard input ends."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in PRELOADED:
        importlib.import_module(name)
    del os.environ["DS_ACCELERATOR"]
    gc.collect()
    gc.freeze()  # so that the forks do not copy pages by counting references
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if len([name for name in threads if name != "jemalloc_bg_thd"]) > 1:  # jemalloc looks after its own at a fork
        raise RuntimeError(
            f"the fork server runs on several threads, of which a fork would lack all but one: {threads}"
        )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the attendants
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address.with_suffix(".new")))
        listener.listen(64)
        address.with_suffix(".new").rename(address)  # it exists once it answers
        while True:
            ready, _, _ = select.select([listener, sys.stdin.fileno()], [], [])
            if listener not in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                try:
                    listener.close()
                    attend(connection)
                finally:
                    os._exit(1)
            connection.close()


def attend(connection: socket.socket) -> None:
    """Run a program in a fork, report its process id and its exit status, and kill it if the caller has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size = array.array("i").itemsize
    message, ancillary, _, _ = connection.recvmsg(REQUEST_SIZE, socket.CMSG_SPACE(3 * size))
    streams = array.array("i", ancillary[0][2])
    while not message.endswith(b"\n"):
        message += connection.recv(REQUEST_SIZE)
    program = os.fork()
    if program == 0:
        connection.close()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        run(json.loads(message))
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):  # the caller has ended
        connection.sendall(f"{program}\n".encode())
    wait_for(program, connection)


def wait_for(program: int, connection: socket.socket) -> None:
    """Report the exit status of a program to its caller, or kill the program if the caller ends first."""
    descriptor = os.pidfd_open(program)
    ready, _, _ = select.select([descriptor, connection], [], [])
    if descriptor not in ready:
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    with contextlib.suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def run(request: dict[str, Any]) -> NoReturn:
    """Run a program as `python` does, and end the process."""
    code = 1
    try:
        prepare(request)
        execute(request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code == 1 and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def prepare(request: dict[str, Any]) -> None:
    """Take over the caller's environment, working directory and streams."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ |= request["environment"]
    sys.path[1:1] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    renew_constants()
    import numpy as np

    random.seed()
    np.random.seed()  # noqa: NPY002 -- of whoever uses the global generator
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115 -- for good
    sys.stdout = sys.__stdout__ = output(1, write_through=unbuffered, line_buffering=os.isatty(1))
    sys.stderr = sys.__stderr__ = output(2, line_buffering=True, errors="backslashreplace")


def output(descriptor: int, **options: Any) -> io.TextIOWrapper:
    """Return a text stream to a file descriptor."""
    return io.TextIOWrapper(open(descriptor, "wb", closefd=False), **options)


def execute(arguments: list[str]) -> None:
    """Run -m MODULE, -c CODE or a script, each with its arguments."""
    kind, *rest = arguments
    if kind == "-m":
        if rest[0].startswith("accelerate."):
            sys.executable = os.environ["QA_DIST_TESTS_PYTHON"]  # for a single rank, which torchrun does not start
        sys.path[0] = str(Path.cwd())
        sys.argv = [rest[0], *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = str(Path(kind).parent.resolve())
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def renew_constants() -> None:
    """Read the Hub client's settings again: it took them from the environment when it was imported."""
    from huggingface_hub import constants

    old = dict(vars(constants))
    importlib.reload(constants)
    new = {name: value for name, value in vars(constants).items() if name.isupper() and value != old.get(name)}
    if not new:
        return
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__.partition(".")[0] in ("huggingface_hub", "transformers"):
            for name, value in new.items():
                if module is not constants and name in vars(module) and vars(module)[name] == old.get(name):
                    setattr(module, name, value)
    hf_api = sys.modules["huggingface_hub.hf_api"]
    hf_api.api.endpoint = constants.ENDPOINT
    import datasets.config

    importlib.reload(datasets.config)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
