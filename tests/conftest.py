"""Every test runs without a network, in caches of its own, with one thread per process."""

import os
import tempfile
from pathlib import Path

# Before anything imports the libraries that read these once.
_cache = Path(tempfile.mkdtemp(prefix="qa_dist-tests-"))
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(_cache / "hf"),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest  # noqa: E402

from tests.helpers import Launcher  # noqa: E402


def pytest_unconfigure() -> None:
    import shutil

    shutil.rmtree(_cache, ignore_errors=True)


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    """Starts commands on several processes, as a user does."""
    return Launcher(tmp_path)
