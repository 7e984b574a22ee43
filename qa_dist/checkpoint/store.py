"""Directories of checkpoints: complete or not there at all, listed, verified and thinned out."""

import contextlib
import itertools
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qa_dist.checkpoint import manifest as manifests
from qa_dist.checkpoint.manifest import DamagedError, File, Manifest, damage
from qa_dist.errors import listing


def publish_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary directory beside `target`, flush it to the disk, and put it in `target`'s place.

    A crash leaves the old directory or the new one, never a mixture; between the two renames the old one is
    called `.NAME.old`.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with _disk_errors(target):
        write(temporary)
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            use_default_mode(path)
        flush(path)
    put_in_place(temporary, target)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What the disk says, as the `OSError` that it is, and with the path: safetensors hides either."""
    try:
        yield
    except SafetensorError as error:
        if not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a directory that is complete, over an older one of that name if need be."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    flush(temporary)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def use_default_mode(path: Path) -> None:
    """Give a file the mode that new files get there: safetensors writes files that only their owner can read.

    The mode is that of an empty file made for the purpose. So it follows the umask, which a thread cannot read without
    changing it for the others, and the default access control list of a shared directory.
    """
    probe = path.with_name(f".{path.name}.mode")
    probe.unlink(missing_ok=True)
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def flush(path: Path) -> None:
    """Wait until a file or a directory is on the disk, not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------- checkpoints


def directory_name(step: int) -> str:
    return f"step_{step:08d}"


def shard_name(rank: int, world_size: int) -> str:
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def write_shard(directory: Path, name: str, tensors: dict[str, Tensor]) -> File:
    """Write one rank's tensors, and wait until they are on the disk."""
    path = directory / name
    with _disk_errors(path):
        save_file(tensors, path)
    use_default_mode(path)
    flush(path)
    return File.of(path, in_chunks=True)


def add_files(directory: Path, write: Callable[[Path], object]) -> dict[str, File]:
    """Let `write` add flat files to `directory`, and wait until they are on the disk. Returns those it has added."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".companions") as name:
        write(Path(name))
        found = {}
        for path in sorted(Path(name).iterdir()):
            final = path.rename(directory / path.name)
            flush(final)
            found[final.name] = File.of(final)
    return found


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint: that it is there says that the others are."""
    temporary = directory / f".{manifests.NAME}.tmp"
    temporary.write_text(manifest.to_json(), encoding="utf-8")
    flush(temporary)
    temporary.rename(directory / manifests.NAME)


@dataclass(frozen=True)
class Found:
    """A checkpoint's directory."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: str | None
    """Why it cannot be used, as far as has been looked."""


def checkpoints(root: Path) -> list[Found]:
    """The checkpoints in `root`, newest first, judged by their manifests alone."""
    found = []
    for name in step_directories(root):
        path, step = root / name, manifests.step_number(name)
        try:
            found.append(Found(path, step, Manifest.read(path), None))
        except DamagedError as error:
            found.append(Found(path, step, None, str(error)))
    return sorted(found, key=lambda one: one.step, reverse=True)


def step_directories(root: Path) -> list[str]:
    """Return the names of the directories in `root` that are called as checkpoints are.

    One that cannot be looked at, such as a link to a disk that is not there, is among them. Raises `OSError` where
    `root` is there but cannot be read.
    """

    def is_file(entry: "os.DirEntry[str]") -> bool:
        try:
            return entry.is_file()
        except OSError:
            return False

    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if manifests.DIRECTORY.fullmatch(entry.name) and not is_file(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def verified(root: Path, *, may_be_missing: bool = False) -> Iterator[Found]:
    """`checkpoints`, with every file read and compared with its hash, one by one."""
    for one in checkpoints(root):
        problem = one.problem or (one.manifest and damage(one.path, one.manifest, may_be_missing=may_be_missing))
        yield Found(one.path, one.step, one.manifest, problem)


def thin_out(root: Path, keep_last: int, keep_best: int, never: Collection[int] = ()) -> dict[Path, str]:
    """Remove all checkpoints but the newest `keep_last`, the best `keep_best` by score, and the steps in `never`.

    Incomplete checkpoints are not counted, and left to `tidy`. Returns the directories that could not be removed, each
    with the reason.
    """
    complete = [one for one in checkpoints(root) if one.manifest is not None]
    scored = [one for one in complete if one.manifest and one.manifest.score is not None]
    if complete and (newest := complete[0].manifest):  # scores on other validation data say nothing about later ones
        first = newest.progress.compared_from
        scored = [one for one in scored if one.manifest and len(one.manifest.progress.history) > first]
    scored.sort(key=lambda one: (one.manifest.score or 0.0) if one.manifest else 0.0, reverse=True)
    kept = {one.step for one in complete[:keep_last]} | {one.step for one in scored[:keep_best]} | set(never)
    for doomed in root.glob(".step_*.gone"):  # what could not be removed before, perhaps because it was being read
        shutil.rmtree(doomed, ignore_errors=True)
    problems = {}
    for one in complete:
        if one.step in kept:
            continue
        # renamed first: what is half removed has no name of a checkpoint
        doomed = one.path.with_name(f".{one.path.name}.gone")
        try:
            one.path.rename(doomed)
            shutil.rmtree(doomed)
        except FileNotFoundError:  # another process was faster
            pass
        except OSError as error:
            left = doomed if doomed.is_dir() else one.path
            problems[left] = error.strerror or str(error)
    return problems


def recover(root: Path) -> None:
    """Give checkpoints their names back that a run was about to replace when it was killed."""
    for path in root.glob(".step_*.old") if root.is_dir() else ():
        target = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if not target.exists() and (path / manifests.NAME).is_file():
            path.rename(target)


ASIDE = "damaged."
"""Prefix of the names of checkpoints that were set aside."""


def set_aside(path: Path) -> None:
    """Rename a checkpoint that cannot be used, so that nothing replaces it. Raises `OSError`."""
    suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    targets = (path.with_name(f"{ASIDE}{path.name}{suffix}") for suffix in suffixes)
    path.rename(next(target for target in targets if not target.exists()))


def tidy(root: Path) -> None:
    """Remove what a run that was killed has left half-written. Only for the run that owns `root`, at its start."""
    for path in root.iterdir() if root.is_dir() else ():
        if path.name.startswith(".step_") and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


class Shards:
    """The tensors of a checkpoint, read from the shards that lie in its directory."""

    def __init__(self, directory: Path, manifest: Manifest):
        """Raises `DamagedError` for a shard that cannot be read."""
        self.shapes = {key: tuple(spec.shape) for key, spec in manifest.tensors.items()}
        self.dtypes: dict[str, str] = {}
        """Tensor -> element type of the pieces of it that are here."""
        names = [name for name in manifest.files if name.endswith(".safetensors")]
        self.missing = [name for name in names if not (directory / name).is_file()]
        self.pieces: dict[str, list[tuple[int, int, str, str]]] = {}
        """Tensor -> start, number of values, file and name there, of each piece of it that is here."""
        self._files = {}
        for name in names:
            if name in self.missing:
                continue
            try:
                self._files[name] = safe_open(directory / name, framework="pt").__enter__()
                for stored in self._files[name].keys():  # noqa: SIM118 -- not a dictionary
                    key, _, start = stored.partition(":")
                    piece = self._files[name].get_slice(stored)
                    self.pieces.setdefault(key, []).append(
                        (int(start or 0), math.prod(piece.get_shape()), name, stored)
                    )
                    expected = manifest.tensors[key].dtype if key in manifest.tensors else None
                    dtype = self.dtypes.setdefault(key, expected or piece.get_dtype())
                    if piece.get_dtype() != dtype:
                        raise DamagedError(f"{stored} in {name} is {piece.get_dtype()} instead of {dtype}")
            except (OSError, ValueError, SafetensorError) as error:
                raise DamagedError(f"{name} cannot be read: {error}") from None
        for pieces in self.pieces.values():
            pieces.sort()

    def piece(self, file: str, stored: str) -> Tensor:
        """One piece, as it is stored."""
        return self._files[file].get_tensor(stored)

    def read(self, key: str) -> Tensor:
        """A whole tensor. All its pieces have to be here."""
        pieces = [self.piece(file, stored).flatten() for _, _, file, stored in self.pieces[key]]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(self.shapes[key])


def gap(shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, Iterable[tuple[int, int]]]) -> str | None:
    """Which tensors the `pieces` (start and number of values of each) do not make up exactly; None if there is none."""
    wrong = sorted(set(shapes) ^ set(pieces))
    for key in shapes.keys() & pieces.keys():
        at = 0
        for start, count in sorted(pieces[key]):
            at = at + count if start == at else -1
            if at < 0:
                break
        if at != math.prod(shapes[key]):
            wrong.append(key)
    return listing(wrong) if wrong else None
