"""Prepared features on disk, under a key that changes with everything they depend on."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from qa_dist.errors import UserError


def fingerprint(*parts: object) -> str:
    """A key for what `parts` say; files are given as their paths and enter with their contents."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:32]


def cached_table(cache_dir: Path | None, key: str, build: Callable[[], pa.Table]) -> pa.Table:
    """The table under `key`, mapped into memory, each column in one chunk; built and stored first if it is not there.

    A table appears under its key complete or not at all, so processes may ask for it at the same time.
    Raises `UserError` when the cache cannot be written.
    """
    root = cache_dir or _default_directory()
    target = root / f"{key}.arrow"
    if not target.is_file():
        # one record batch, so that every column is mapped as one array
        (batch,) = build().combine_chunks().to_batches()
        temporary = root / f".{key}.{os.getpid()}.tmp"
        try:
            root.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
                writer.write_batch(batch)
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"{root}: prepared features cannot be stored ({error.strerror or error}); free some space or set "
                "data.cache_dir to a directory that can be written"
            ) from None
    with pa.ipc.open_stream(pa.memory_map(str(target))) as reader:
        return reader.read_all()


def _default_directory() -> Path:
    from datasets.config import HF_DATASETS_CACHE

    return Path(HF_DATASETS_CACHE) / "qa_dist"
