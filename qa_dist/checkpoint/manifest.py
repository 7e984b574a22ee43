"""The manifest of a checkpoint: what it holds, and how to tell that nothing of it is missing or changed.

Schema 2 protects itself: `digest` is the sha256 of the file with an empty digest in its place. Every field has a type
and a range, and the fields are compared with each other, since a manifest may come from anywhere. Manifests of schema 1
have no digest; they are read as far as they pass the same checks.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from qa_dist.checkpoint.progress import Count, Number, Progress, Record
from qa_dist.errors import UserError

NAME = "manifest.json"
SCHEMA_VERSION = 2
DIRECTORY = re.compile(r"step_([0-9]{8,15})")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
CHUNK_BYTES = 16 * 2**20
"""Size of the parts of a shard that have a hash each. 840 GB (70 B weights with moments) have 4 MB of hashes."""
MAX_BYTES = 16 * 2**20
"""Size of the largest manifest that is read."""
MAX_CONTAINERS = 200_000
"""Most lists and objects in a manifest: three for each tensor and two for each file, with room to spare."""
MAX_VALUES = 1_000_000
MAX_DEPTH = 32

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=200)]
Dtype = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
"""Element types under the names that safetensors gives them."""
TENSOR = re.compile(r"(weight|exp_avg|exp_avg_sq|buffer)/[^:]+")


def step_number(name: str) -> int:
    """Return the step of a directory that is called as checkpoints are."""
    return int(name.removeprefix("step_"))


class DamagedError(Exception):
    """Why a checkpoint cannot be used."""


class File(Record):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    size: Count
    """Bytes."""
    sha256: Sha256
    chunks: Annotated[tuple[Sha256, ...], Field(strict=False)] = ()
    """The sha256 of each `CHUNK_BYTES` of a shard, so that a part of it can be verified without reading the whole;
    empty for other files."""

    def __init__(self, size: int, sha256: str, chunks: Sequence[str] = ()):
        values: dict[str, Any] = {"size": size, "sha256": sha256, "chunks": chunks}
        super().__init__(**values)

    @classmethod
    def of(cls, path: Path, *, in_chunks: bool = False) -> Self:
        """Return size and hashes of the file at `path`; `in_chunks` also those of its chunks."""
        if not in_chunks:
            with path.open("rb") as file:
                return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        whole, chunks, size = hashlib.sha256(), [], 0
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                whole.update(chunk)
                chunks.append(hashlib.sha256(chunk).hexdigest())
                size += len(chunk)
        return cls(size, whole.hexdigest(), tuple(chunks))

    def is_same(self, other: "File") -> bool:
        """Return True if the content is the same, whether or not the hashes of chunks are known."""
        return (self.size, self.sha256) == (other.size, other.sha256)


class TensorSpec(Record):
    """Element type and shape of a tensor."""

    dtype: Dtype | None
    """None where a manifest of schema 1 does not say it."""
    shape: Annotated[list[Count], Field(max_length=16)]


class Launch(Record):
    """How the run that wrote a checkpoint was launched."""

    strategy: Text
    precision: Text
    """float32, bf16 or fp16."""
    world_size: Annotated[int, Field(ge=1, le=10**6)]
    device: Text
    """Device type, such as cuda or cpu."""

    def __str__(self) -> str:
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{self.strategy}, {self.precision}, {processes} on {self.device}"


class Optimizer(Record):
    """The implementation of the optimizer, on which the last bit of an update depends."""

    name: Literal["AdamW"] = "AdamW"
    fused: bool
    """Whether it was PyTorch's fused one."""


class Manifest(Record):
    """Everything about a checkpoint except for its tensors."""

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    step: Count
    """Optimizer steps done."""
    epoch: Annotated[int, Field(ge=1)]
    """The epoch in which training continues, from 1."""
    launch: Launch
    optimizer: Optimizer
    config: dict[str, Any]
    """The settings of the run."""
    data: Text
    """Digest of the training features."""
    validation: Text | None = None
    """Digest of the validation features; None where there are none, and in schema 1."""
    progress: Progress
    """The run's counters and history."""
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,64}$")] = ""
    """Identifies the run, whatever machines it has been on."""
    loss_scale: dict[Text, Number] = Field(default_factory=dict)
    """State of float16's loss scaler; empty in other precisions."""
    metrics_bytes: Count = 0
    """Bytes of metrics.jsonl that belong to the checkpoint."""
    score: Number | None
    """The metric by which checkpoints are compared, where the last thing done was an evaluation."""
    tensors: dict[str, TensorSpec]
    """Name -> element type and shape of all tensors."""
    files: dict[str, File]
    sections: dict[str, Any] = Field(default_factory=dict)
    """Optional parts that later versions add; readers skip those they do not know."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.step, self.epoch) != (self.progress.step, self.progress.epoch):
            raise ValueError("step and epoch are not those of progress")
        if problem := self.progress.contradiction():
            raise ValueError(f"progress contradicts itself: {problem}")
        for name, spec in self.tensors.items():
            kind, _, parameter = name.partition("/")
            if not TENSOR.fullmatch(name) or math.prod(spec.shape) > 2**50:
                raise ValueError(f"tensors: {name[:100]!r} is not a tensor of a model")
            if kind != "buffer" and spec.dtype not in ("F32", None):
                raise ValueError(f"tensors: {name[:100]!r} is {spec.dtype}, and has to be F32")
            weight = self.tensors.get(f"weight/{parameter}") if kind.startswith("exp") else spec
            if weight is None or weight.shape != spec.shape:
                raise ValueError(f"tensors: {name[:100]!r} has not the shape of its weight")
        return self

    def to_json(self) -> str:
        """Return the content of the manifest's file, with its digest."""
        content = {"schema_version": SCHEMA_VERSION, "digest": ""}
        content |= self.model_dump(mode="json", exclude={"schema_version"})
        text = "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in content.items()) + "\n}\n"
        return text.replace(_digest_field(""), _digest_field(hashlib.sha256(text.encode()).hexdigest()), 1)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Return the manifest in `directory`. Raises `DamagedError` where there is none, or one that is damaged, and
        `UserError` for one of a newer version."""
        try:
            with (directory / NAME).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise DamagedError("it has no manifest: it was not finished") from None
        except OSError as error:
            raise DamagedError(f"its manifest cannot be read: {error.strerror or error}") from error
        return cls.parse(content, directory.name)

    @classmethod
    def parse(cls, content: bytes, directory_name: str) -> Self:
        """Return the manifest of the directory of that name from the bytes of its file.

        Raises `DamagedError` for what is not one, or has changed, and `UserError` for one of a newer version.
        """
        values = _parsed(content)
        version = values.get("schema_version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise DamagedError("its manifest is not one of qa_dist")
        if version > 1:
            digest = values.pop("digest", None)
            if not isinstance(digest, str) or not _is_digest_of(content, digest):
                raise DamagedError("its manifest has changed since it was written")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{directory_name}: was written by a newer version of qa_dist (schema {version}, and this one knows "
                f"{SCHEMA_VERSION}); update qa_dist"
            )
        try:
            manifest = cls.model_validate(_from_schema_1(values) if version == 1 else values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(str(part)[:100] for part in first["loc"])
            problem = f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")
            raise DamagedError(f"its manifest is not valid: {problem[:500]!a}") from None
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DamagedError("its manifest is incomplete") from None
        manifest._require_of(directory_name)
        return manifest

    def _require_of(self, directory_name: str) -> None:
        """Raise `DamagedError` unless the files are files of the directory, and the step is that of its name."""
        for name, file in self.files.items():
            if not FILE_NAME.fullmatch(name) or name == NAME:
                raise DamagedError(f"its manifest names a file outside of its directory: {name[:200]!r}")
            if file.chunks and len(file.chunks) != -(-file.size // CHUNK_BYTES):
                raise DamagedError(f"its manifest has {len(file.chunks)} hashes of chunks of {name}")
        if not self.files:
            raise DamagedError("its manifest names no files")
        if (match := DIRECTORY.fullmatch(directory_name)) and int(match[1]) != self.step:
            raise DamagedError(f"its manifest is that of step {self.step}")


def _parsed(content: bytes) -> dict[str, Any]:
    """Return the JSON object in `content`. Raises `DamagedError`, at little cost, for what is too large to be a
    manifest: a few megabytes of empty lists take seconds and a gigabyte once they are parsed."""
    if len(content) > MAX_BYTES:
        raise DamagedError(f"its manifest has more than {MAX_BYTES:,} bytes")
    if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS or content.count(b",") > MAX_VALUES:
        raise DamagedError("its manifest has more entries than a manifest can have")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        values = json.loads(content.decode("utf-8"), parse_constant=refuse)
        level = [values]
        for _ in range(MAX_DEPTH):
            containers = [one.values() if isinstance(one, dict) else one for one in level]
            level = [inner for one in containers for inner in one if isinstance(inner, dict | list)]
        if not isinstance(values, dict) or level:
            raise ValueError("it is not the object of a manifest")
        # text that cannot be encoded cannot be printed either
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError, TypeError) as error:
        raise DamagedError(f"its manifest cannot be read: {str(error)[:200]!a}") from None
    return values


def _lines(value: Any) -> str:
    """Return `value` as JSON, with a line for each entry of an object."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    entries = (f"  {json.dumps(key)}: {json.dumps(inner, allow_nan=False)}" for key, inner in value.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def _digest_field(digest: str) -> str:
    return f'"digest": "{digest}"'


def _is_digest_of(content: bytes, digest: str) -> bool:
    """Return True if `digest` is that of the file `content`, in which it stands."""
    try:
        plain = content.replace(_digest_field(digest).encode(), _digest_field("").encode(), 1)
    except UnicodeEncodeError:
        return False
    return hashlib.sha256(plain).hexdigest() == digest


def _from_schema_1(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest of schema 1 as those of `Manifest`. Raises what dictionaries raise for fields
    that are missing or of another type."""
    values = dict(values)
    progress = dict(values["progress"])
    strategy, precision, processes = values.pop("engine").split(", ")
    device = processes.rpartition(" on ")[2]
    world_size = values.pop("world_size")
    values["launch"] = {"strategy": strategy, "precision": precision, "world_size": world_size, "device": device}
    values["optimizer"] = {"fused": device == "cuda" and precision != "fp16"}
    values["loss_scale"], values["metrics_bytes"] = progress.pop("loss_scale"), progress.pop("metrics_bytes")
    values["run_id"] = progress.pop("run_id", "")
    values["progress"] = progress
    values["tensors"] = {
        name: {"dtype": None if name.startswith("buffer/") else "F32", "shape": shape}
        for name, shape in values["tensors"].items()
    }
    return values


def damage(directory: Path, manifest: Manifest, *, may_be_missing: bool = False) -> str | None:
    """Return what is wrong with the files in `directory`, or None. `may_be_missing`: they may lie on another node's
    disk."""
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            if may_be_missing:
                continue
            return f"{name} is missing"
        if path.stat().st_size != expected.size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected.size:,}"
        try:
            changed = not File.of(path).is_same(expected)
            place = _damaged_chunk(path, expected) if changed else ""
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if changed:
            return f"{name} has changed since it was written{place}"
    return None


def _damaged_chunk(path: Path, expected: File) -> str:
    """Return which bytes of the file have changed, as far as the hashes of its chunks tell; empty otherwise."""
    found = File.of(path, in_chunks=True).chunks
    bad = [i for i, pair in enumerate(zip(found, expected.chunks, strict=False)) if pair[0] != pair[1]]
    if not bad or len(expected.chunks) < 2:
        return ""
    return f" ({len(bad)} of {len(expected.chunks)} chunks, from byte {bad[0] * CHUNK_BYTES:,} on)"
