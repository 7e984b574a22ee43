"""Every test runs without a network, in caches of its own, with one thread per process."""

import contextlib
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
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402

from tests.helpers import FORK_SERVER, Launcher  # noqa: E402
from tests.hub_server import HubServer, online  # noqa: E402

LONGEST = [
    f"tests/{name}.py"
    for name in (
        *("e2e/test_slurm", "e2e/test_launch", "e2e/test_readme", "e2e/test_training", "distributed/test_state"),
        *("distributed/test_resume", "e2e/test_checkpoints", "distributed/test_engines", "e2e/test_hub"),
        *("e2e/test_wheel", "e2e/test_several_machines", "e2e/test_throughput_settings"),
        *("e2e/test_unusable_checkpoints", "e2e/test_hub_resume", "distributed/test_strategies"),
    )
]
"""Files of tests, in the order in which they start where several run at a time."""

pytest_plugins = ["tests.hygiene"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no worker is left with one of them at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_unconfigure() -> None:
    import shutil

    FORK_SERVER.close()
    shutil.rmtree(_cache, ignore_errors=True)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """Starts commands on several processes, as a user does."""
    with contextlib.closing(Launcher(tmp_path)) as launcher:
        yield launcher


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of the test's own, which the client of this process, and of those that it starts, takes for the Hub."""
    with HubServer(tmp_path / "hub") as server:
        online(monkeypatch, server.url)
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": "hf_alice",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hf"),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        # it may hold the address of an earlier test's Hub
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        yield server
