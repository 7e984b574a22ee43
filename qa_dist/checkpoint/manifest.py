"""A checkpoint's manifest: what it holds, for whom, and how to tell that nothing of it is missing or changed."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qa_dist.errors import UserError

NAME = "manifest.json"
SCHEMA_VERSION = 1
DIRECTORY = re.compile(r"step_(\d{8,})")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def step_number(name: str) -> int:
    """Of a directory that is called as checkpoints are."""
    return int(name.removeprefix("step_"))


class DamagedError(Exception):
    """Why a checkpoint cannot be used."""


@dataclass(frozen=True)
class File:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "File":
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its tensors."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """The epoch that training goes on in, from 1."""
    engine: str
    """What it was trained with, for people."""
    world_size: int
    config: dict[str, Any]
    """The settings of the run."""
    data: str
    """Digest of the training features."""
    progress: dict[str, Any]
    """The run's counters and history."""
    score: float | None
    """The metric by which checkpoints are compared, where the last thing done was an evaluation."""
    tensors: dict[str, list[int]]
    """Name -> shape of all tensors."""
    files: dict[str, File]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest in `directory`. Raises `DamagedError` where there is none, or one that cannot be trusted."""
        try:
            content = json.loads((directory / NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DamagedError("it has no manifest: it was not finished") from None
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedError(f"its manifest cannot be read: {error}") from None
        return cls.parse(content, directory.name)

    @classmethod
    def parse(cls, content: Any, directory_name: str) -> "Manifest":
        """Raises `DamagedError` for what is not a manifest of the directory of that name, and `UserError` for one
        of a newer version."""
        if not isinstance(content, dict) or not isinstance(content.get("schema_version"), int):
            raise DamagedError("its manifest is not one of qa_dist")
        if content["schema_version"] > SCHEMA_VERSION:
            raise UserError(
                f"{directory_name}: was written by a newer version of qa_dist (schema {content['schema_version']}, and "
                f"this one knows {SCHEMA_VERSION}); update qa_dist"
            )
        try:
            files = {name: File(int(file["size"]), str(file["sha256"])) for name, file in content["files"].items()}
            manifest = cls(**{**content, "files": files})
            numbers = (manifest.step, manifest.epoch, manifest.world_size)
            if not all(isinstance(number, int) and number >= 0 for number in numbers):
                raise TypeError
            parts = (manifest.config, manifest.progress, manifest.tensors)
            if not all(isinstance(part, dict) for part in parts) or not files:
                raise TypeError
            if not isinstance(manifest.score, int | float | None) or not isinstance(manifest.data, str):
                raise TypeError
            if not all(isinstance(size, int) for shape in manifest.tensors.values() for size in [*shape]):
                raise TypeError
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise DamagedError("its manifest is incomplete") from None
        for name in files:
            if not FILE_NAME.fullmatch(name):
                raise DamagedError(f"its manifest names a file outside of its directory: {name!r}")
        if (match := DIRECTORY.fullmatch(directory_name)) and int(match[1]) != manifest.step:
            raise DamagedError(f"its manifest is that of step {manifest.step}")
        return manifest


def damage(directory: Path, manifest: Manifest, *, may_be_missing: bool = False) -> str | None:
    """What is wrong with the files in `directory`, or None. `may_be_missing`: on another node's disk, perhaps."""
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            if may_be_missing:
                continue
            return f"{name} is missing"
        if path.stat().st_size != expected.size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected.size:,}"
        try:
            changed = File.of(path).sha256 != expected.sha256
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if changed:
            return f"{name} has changed since it was written"
    return None
