"""The wheel, alone in a new environment: what `pip install` brings trains in an empty directory."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qa_dist.installed import NO_DEEPSPEED
from tests.helpers import ROOT, environment, tiny_flags

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def done(*command: str | Path, cwd: Path = ROOT, code: int = 0) -> str:
    """Run a command that ends with `code`, and return its output."""
    found = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert found.returncode == code, found.stdout
    assert "Traceback" not in found.stdout, found.stdout
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel that is built from the sdist, as on PyPI."""
    directory = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", directory)
    (sdist,) = directory.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    done(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, sdist)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` of an environment with the wheel and what it needs, in the pinned versions."""
    directory = tmp_path_factory.mktemp("environment")
    done(sys.executable, "-m", "venv", directory)
    pip = (directory / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    pinned = (*pip, "--only-binary", ":all:", "-c", "launch/constraints.txt")
    # the build that is tested: PyPI's would bring gigabytes of CUDA
    done(*pinned, "--no-deps", f"torch=={importlib.metadata.version('torch')}")
    done(*pinned, wheel)
    return directory / "bin"


def test_what_the_wheel_holds(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "qa_dist").rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.parent.name != "__pycache__"
    }
    configs = {f"qa_dist/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*") if path.is_file()}
    others = {name for name in names if ".dist-info/" not in name} - package
    assert package <= names
    assert "qa_dist/py.typed" in names
    assert others == configs | {"qa_dist/slurm.sbatch"}


def test_training_from_an_empty_directory(installed: Path, tmp_path: Path):
    """Without DeepSpeed, which is an extra, and without the clone."""
    flags = [flag for flag in tiny_flags(**{"train.epochs": "1", "data.synthetic.long_share": ""}) if flag]
    qa_dist = installed / "qa-dist"
    shown = done(qa_dist, "launch", "--num_processes", "2", "train", "--config", "demo", *flags, cwd=tmp_path)
    assert "DDP, float32, 2 processes on cpu" in shown
    assert (tmp_path / "runs/demo/model/model.safetensors").is_file()
    answered = done(
        *(qa_dist, "answer", "--model", "runs/demo", "--question", "Who?", "--context", "Ada Lovelace wrote it."),
        cwd=tmp_path,
    )
    assert answered
    shown = done(qa_dist, "launch", "--config_file", "cpu_zero2", "train", "--config", "demo", cwd=tmp_path, code=2)
    assert NO_DEEPSPEED in shown


def test_the_batch_script_finds_the_environment_that_it_is_in(installed: Path, tmp_path: Path):
    (script,) = installed.parent.glob("lib/python*/site-packages/qa_dist/slurm.sbatch")
    flags = ("--config", "demo", "--model.name", "m")
    shown = done("env", "DRY_RUN=1", "NODES=2", "bash", script, *flags, cwd=tmp_path)
    assert shown.count("accelerate launch") == 2 or "qa-dist launch" in shown, shown
