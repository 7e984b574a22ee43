"""launch/install.sh where something is missing; .ci/run does what succeeds, in a fresh clone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers import ROOT

NEEDED = ("bash", "cat", "cksum", "dirname", "grep", "mktemp", "rm", "sed", "tail")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of what the installation reads, without an environment."""
    directory = tmp_path / "project"
    shutil.copytree(ROOT / "launch", directory / "launch")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    return directory


@pytest.fixture
def without_compiler(tmp_path: Path) -> str:
    """Return a PATH that has what the script calls first, and no g++."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in NEEDED:
        (directory / name).symlink_to(shutil.which(name) or name)
    return str(directory)


def install(project: Path, *extras: str, **changes: str) -> subprocess.CompletedProcess[str]:
    (project.parent / "tmp").mkdir(exist_ok=True)
    environ: Mapping[str, str] = {
        **os.environ, "PYTHON": sys.executable, "TMPDIR": str(project.parent / "tmp"), **changes
    }  # fmt: skip
    return subprocess.run(
        [shutil.which("bash") or "bash", "launch/install.sh", *extras],
        cwd=project, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_stage_that_fails_shows_pips_last_lines_and_what_to_do(project: Path):
    """Where no package can be had; the environment is made, in place of the rest of an interrupted attempt."""
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    done = install(project, "test", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1, done
    head, environment, tools = done.stdout.splitlines()
    assert head == "installing qa_dist with extras test into .venv"
    assert environment.split("…")[0].strip() == "virtual environment"
    assert environment.endswith(" s")
    assert "build tools …" in tools
    assert "failed after" in tools
    assert "ERROR: " in done.stderr  # of pip
    assert 'failed at "build tools"; all of the output is in' in done.stderr
    assert "run the same command again" in done.stderr
    assert (project / ".venv/bin/pip").exists()
    assert not list(project.glob(".venv/.installed-*"))  # the next attempt does not take it for done


def test_an_environment_that_is_complete_is_left_alone(project: Path, without_compiler: str):
    """For the extras and versions that were asked for then, and no others."""
    wanted = subprocess.run(
        "cat pyproject.toml launch/constraints.txt | cksum",
        shell=True, cwd=project, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout.strip()  # fmt: skip
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/accelerate").write_text("")
    (project / ".venv/bin/accelerate").chmod(0o755)
    stamp = project / ".venv/.installed-test,dev"
    stamp.write_text(f"{wanted} with DeepSpeed\n")
    before = sorted(project.rglob("*"))
    for extras in ([], ["test"], ["dev"], ["test", "dev"]):
        for path in (os.environ["PATH"], without_compiler):  # what was compiled elsewhere is complete
            done = install(project, *extras, PATH=path)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(project.rglob("*")) == before
    assert begins(project, "test", "deepspeed")
    stamp.write_text(f"{wanted}\n")  # without a compiler, which is here now
    assert begins(project, "test")
    stamp.write_text("of other versions with DeepSpeed\n")
    assert begins(project, "test")


def begins(project: Path, *extras: str) -> bool:
    """Return whether the script does not take the environment for complete: without any Python it goes no further."""
    done = install(project, *extras, PYTHON="/nonexistent/python")
    return done.returncode == 1 and "installing qa_dist" in done.stdout


def test_without_a_compiler_deepspeed_is_left_out(project: Path, without_compiler: str):
    done = install(project, PATH=without_compiler, PYTHON="/nonexistent/python")
    assert "g++ was not found, and DeepSpeed is left out" in done.stderr
    assert "install g++ and run the same command again" in done.stderr
    assert done.stdout.startswith("installing qa_dist into .venv\n")
