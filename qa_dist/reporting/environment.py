"""What a run was computed on and with, for whoever wants to do it again."""

import contextlib
import importlib.metadata
import os
import platform
from typing import Any

import torch

PACKAGES = ("qa_dist", "torch", "accelerate", "deepspeed", "transformers", "datasets", "huggingface_hub", "evaluate")


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def software() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that matter, by name."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an optional one
            found[name] = importlib.metadata.version(name)
    return found


def hardware() -> list[str]:
    """This machine and its GPUs, a line each."""
    lines = [f"{os.cpu_count()} cores, {host_memory() / 2**30:.0f} GiB of memory, {platform.system()}"]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*lines, *(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))]


def environment(launch: str) -> dict[str, Any]:
    """`launch`: one line on device, engine, precision and processes."""
    return {"launch": launch, "hardware": hardware(), "software": software()}
