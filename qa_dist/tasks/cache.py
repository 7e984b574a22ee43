"""Prepared features on disk, under a key that changes with everything they depend on."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.config import HF_DATASETS_CACHE

from qa_dist.errors import UserError


def fingerprint(*parts: object) -> str:
    """A key for what `parts` say; files are given as their paths and enter with their contents."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:32]


def cached_table(cache_dir: Path | None, key: str, build: Callable[[], pa.Table]) -> datasets.Dataset:
    """The table under `key`, mapped into memory; built and stored first if it is not there.

    A table appears under its key complete or not at all, so processes may ask for it at the same time.
    Raises `UserError` when the cache cannot be written.
    """
    root = cache_dir or Path(HF_DATASETS_CACHE) / "qa_dist"
    target = root / key
    if not target.is_dir():
        table = build()
        temporary = None
        try:
            root.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
            # the directory itself is what load_from_disk looks for, so it is renamed as a whole
            datasets.Dataset(table).save_to_disk(temporary / "table", num_shards=1)
            (temporary / "table").rename(target)
        except OSError as error:
            if not target.is_dir():  # else another process was faster, with the same table
                raise UserError(
                    f"{root}: prepared features cannot be stored ({error.strerror or error}); free some space or "
                    "set data.cache_dir to a directory that can be written"
                ) from None
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
    return datasets.load_from_disk(str(target))  # pyright: ignore[reportReturnType] -- a Dataset was saved
