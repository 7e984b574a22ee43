"""tests/hygiene.py finds what tests and fixtures leave behind, and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

TESTS = """
import subprocess, threading, time
import pytest

ended = threading.Event()
LASTING = ["sleep", "30"]


@pytest.fixture(scope="module")
def server():
    ended.clear()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    process = subprocess.Popen(LASTING)
    yield
    process.kill()
    process.wait()
    ended.set()
    thread.join()


@pytest.fixture(scope="module")
def careless():
    threading.Thread(target=time.sleep, args=(5,), name="careless fixture", daemon=True).start()


@pytest.fixture
def own_server():
    process = subprocess.Popen(LASTING)
    yield
    process.kill()
    process.wait()


def test_leaves_a_thread():
    threading.Thread(target=time.sleep, args=(5,), name="careless thread", daemon=True).start()


def test_leaves_a_process():
    subprocess.Popen(LASTING)


def test_leaves_a_process_whose_parent_has_ended():
    subprocess.run(["sh", "-c", "sleep 31 & exit 0"], start_new_session=True, check=True)


def test_with_a_server_of_the_module(server):
    threading.Timer(0.01, print).start()


def test_with_a_server_of_the_module_again(server):
    pass


def test_requests_a_server_while_it_runs(request):
    request.getfixturevalue("server")


def test_with_its_own_server(own_server):
    pass


def test_runs_a_command():
    subprocess.run(["true"], check=True)


def test_with_a_careless_fixture(careless):
    pass
"""


def test_what_is_left_behind_is_found(tmp_path: Path):
    (tmp_path / "test_all.py").write_text(TESTS)
    program = (
        "import sys, pytest, tests.hygiene as h; h.PATIENCE = 0.3; sys.exit(pytest.main(sys.argv[1:], plugins=[h]))"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "-q",
        "-rE",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    for process in re.findall(r"process (\d+): sleep", done.stdout):
        subprocess.run(["kill", process], check=False)
    found = dict(re.findall(r"(?m)^(test_\w+|the fixture \w+) left behind: (.*)$", done.stdout))
    assert found.keys() == {
        "test_leaves_a_thread",
        "test_leaves_a_process",
        "test_leaves_a_process_whose_parent_has_ended",
        "the fixture careless",
    }, done.stdout
    assert found["test_leaves_a_thread"] == "thread 'careless thread'"
    assert re.fullmatch(r"process \d+: sleep 30", found["test_leaves_a_process"])
    assert re.fullmatch(r"process \d+: sleep 31", found["test_leaves_a_process_whose_parent_has_ended"])
    assert found["the fixture careless"] == "thread 'careless fixture'"
    assert "9 passed, 4 errors" in done.stdout
    assert done.returncode == 1
