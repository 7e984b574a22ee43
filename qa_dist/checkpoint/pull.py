"""States of training, from the Hub to a run directory: whole and unchanged, or not at all.

Whoever wrote the repository may be wrong or hostile. Names are checked before anything is written, sizes against what
the Hub itself says before anything is fetched, and every byte against its hash before it is used. Nothing that could
be executed is fetched.
"""

import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qa_dist.checkpoint import manifest as manifests
from qa_dist.checkpoint.hub import Repository, sha256_of
from qa_dist.checkpoint.hub_client import HubError, Remedy
from qa_dist.checkpoint.manifest import DamagedError, File, Manifest, damage
from qa_dist.checkpoint.ownership import UnreadablePointerError
from qa_dist.checkpoint.publication import Pointer, listing, read_pointer
from qa_dist.checkpoint.store import flush, put_in_place

KINDS = (".safetensors", ".json", ".jsonl", ".txt", ".model", ".jinja")
"""Of the files that a state is made of: tensors, settings, figures, and what tokenizers are stored in."""
MOST_FILES = 5_000
AT_ONCE = 4
"""Files that are fetched at the same time."""
ROOM_TO_SPARE = 64 * 2**20
"""Bytes that stay free on the disk."""


@dataclass(frozen=True)
class RemoteStates:
    """The states on a branch at one commit."""

    repo_id: str
    revision: str
    """Where that was looked for: a branch, most often."""
    commit: str
    names: tuple[str, ...]
    """Folders, the newest first."""
    pointer: Pointer | None

    @property
    def repository(self) -> Repository:
        return Repository(self.repo_id)

    @property
    def newest_step(self) -> int:
        """-1 where there is no state."""
        return manifests.step_number(self.names[0]) if self.names else -1


def states(repository: Repository, revision: str) -> RemoteStates | None:
    """What lies there; None where there is no such branch. Raises `HubError`."""
    commit = repository.head_if_any(revision)
    if commit is None:
        return None
    try:
        pointer = read_pointer(repository, commit)
    except UnreadablePointerError:  # then the names have to do
        pointer = None
    entries = listing(repository, commit, pointer)
    present = {path for path, entry in entries.items() if entry is None and manifests.DIRECTORY.fullmatch(path)}
    told = [name for name in (pointer.states if pointer else {}) if name in present]
    others = sorted(present - set(told), key=manifests.step_number, reverse=True)
    return RemoteStates(repository.id, revision, commit, (*told, *others), pointer)


def read_manifest(remote: RemoteStates, name: str) -> tuple[Manifest, bytes]:
    """The manifest of a state, and its bytes. Raises `DamagedError`, `HubError`, and `UserError` for a newer one."""
    content = remote.repository.read(f"{name}/{manifests.NAME}", remote.commit, manifests.MAX_BYTES)
    if content is None:
        raise DamagedError("it has no manifest: it was not finished")
    expected = remote.pointer.states.get(name) if remote.pointer else None
    if expected is not None and sha256_of(content) != expected:
        raise DamagedError("its manifest is not the one that was pushed")
    manifest = Manifest.parse(content, name)
    if len(manifest.files) > MOST_FILES:
        raise DamagedError(f"its manifest names {len(manifest.files):,} files")
    foreign = [file for file in manifest.files if not file.endswith(KINDS) or file == manifests.NAME]
    if foreign:
        raise DamagedError(f"it holds a file of a kind that no state has: {foreign[0]!r}")
    return manifest, content


def pull(
    remote: RemoteStates,
    name: str,
    root: Path,
    say: Callable[[str], None],
    check: Callable[[Manifest], object] = lambda manifest: None,
) -> Path:
    """Put a state into `root`, unless it is there already, and return its directory. `check` may raise before
    anything is fetched.

    Raises `DamagedError` for one that is incomplete or not what its manifest says, `HubError`, and `OSError`.
    """
    manifest, content = read_manifest(remote, name)
    check(manifest)
    target = root / name
    if _is_there(target, content, manifest):
        return target
    repository = remote.repository
    entries = repository.tree(remote.commit, name)
    for file, expected in manifest.files.items():
        entry = entries.get(f"{name}/{file}")
        if entry is None:
            raise DamagedError(f"{file} is missing")
        if entry.size != expected.size:
            raise DamagedError(f"{file} has {entry.size:,} bytes instead of {expected.size:,}")
    total = sum(file.size for file in manifest.files.values())
    root.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(root).free) < total + ROOM_TO_SPARE:
        raise HubError(
            f"{name} has {total / 1e9:.1f} GB, and {root} has room for {free / 1e9:.1f} GB; free some", Remedy.NONE
        )
    say(f"fetching {name} from {remote.repo_id} ({total / 1e6:,.1f} MB)")
    temporary = root / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fetch_files(repository, name, remote.commit, manifest.files, temporary)
        (temporary / manifests.NAME).write_bytes(content)  # last, as everywhere
        flush(temporary / manifests.NAME)
        put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def fetch_files(repository: Repository, folder: str, commit: str, files: Mapping[str, File], directory: Path) -> None:
    """Fetch `files` of a folder in the repository, a few at a time. Raises as `Repository.download` does."""
    pool, given_up = ThreadPoolExecutor(AT_ONCE), threading.Event()

    def fetch(file: str) -> None:
        path = directory / file
        repository.download(f"{folder}/{file}".lstrip("/"), commit, path, files[file], given_up.is_set)
        flush(path)

    try:
        for done in [pool.submit(fetch, file) for file in files]:
            done.result()
    except Exception:  # nothing may write into the directory once this returns
        given_up.set()
        pool.shutdown(cancel_futures=True)
        raise
    finally:  # a download that hangs must not hold up a person who interrupts
        given_up.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _is_there(target: Path, content: bytes, manifest: Manifest) -> bool:
    try:
        return (target / manifests.NAME).read_bytes() == content and damage(target, manifest) is None
    except OSError:
        return False
