"""A program that the fork server runs is run as `python` runs it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import FORK_SERVER

PROGRAM = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ["WORD"], sys.stdin.read(), __name__]))
print("to standard error", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def run(python: str, directory: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [python, *arguments],
        cwd=directory,
        env=os.environ | {"WORD": "ä"},
        input="read",
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("form", ["-c", "script", "-m"])
@pytest.mark.parametrize("code", ["0", "3"])
def test_arguments_directory_environment_streams_and_exit_code(form: str, code: str, tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM)
    start = {"-c": ("-c", PROGRAM), "script": ("program.py",), "-m": ("-m", "program")}[form]
    assert run(FORK_SERVER.python, tmp_path, *start, code) == run(sys.executable, tmp_path, *start, code)


def test_what_a_program_raises(tmp_path: Path):
    for statement in ("1 / 0", "raise SystemExit('a reason')", "import nothing_of_this_name"):
        code, _, found = run(FORK_SERVER.python, tmp_path, "-c", statement)
        expected = run(sys.executable, tmp_path, "-c", statement)
        assert (code, found.splitlines()[-1]) == (expected[0], expected[2].splitlines()[-1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_signals_are_passed_on_and_come_back(number: int):
    """By number, for a program that does not handle them."""
    program = "import signal, sys, time; signal.signal(2, signal.SIG_DFL); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([FORK_SERVER.python, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(timeout=20) == -number


def test_a_program_ends_with_its_caller():
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([FORK_SERVER.python, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        forked = psutil.Process(int(process.stdout.readline()))
        assert forked.is_running()
        process.kill()
    end = time.monotonic() + 20
    while forked.is_running() and time.monotonic() < end:
        time.sleep(0.01)
    assert not forked.is_running()


def test_settings_of_the_hub_are_those_of_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    program = (
        "import huggingface_hub as h, huggingface_hub.constants as c, datasets, transformers.utils.hub as t; "
        "print(h.HfApi().endpoint, h.hf_api.api.endpoint, c.HF_HUB_CACHE, c.HF_HUB_OFFLINE); "
        "print(datasets.config.HF_CACHE_HOME)"
    )
    found = run(FORK_SERVER.python, tmp_path, "-c", program)
    assert found == run(sys.executable, tmp_path, "-c", program)
    assert str(tmp_path) in found[1]
