"""What is installed: optional packages, and the files of `configs/`."""

import importlib.util
from pathlib import Path

NO_DEEPSPEED = (
    'DeepSpeed is not installed. Install it (pip install "qa_dist[deepspeed]"; it is compiled and needs g++), or use a '
    "launch config without it: ddp or fsdp2 on GPUs, cpu_ddp on a CPU"
)


def has_deepspeed() -> bool:
    """Return whether DeepSpeed can be imported, without importing it."""
    return importlib.util.find_spec("deepspeed") is not None


def shipped_configs() -> Path:
    """Return the directory of the settings and launch configs that come with the project: a part of the package where
    it was installed from a wheel, else `configs` of the clone."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"
