"""Directories that are there complete, or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def publish_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary directory beside `target`, flush it to the disk, and put it in `target`'s place.

    A crash leaves the old directory or the new one, never a mixture; between the two renames the old one is
    called `.NAME.old`.
    """
    temporary, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(temporary.rglob("*")):
        if path.is_file():  # safetensors writes files that only their owner can read
            path.chmod(0o666 & ~umask)
        flush(path)
    flush(temporary)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file or a directory is on the disk, not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
