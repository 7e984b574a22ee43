"""The repositories of the tests' Hub: branches, commits and blobs on disk, no HTTP.

Commits and blobs never change, and a branch moves by one `os.replace`: a server that is killed at any moment
shows the state before a commit or after it, never a part of one.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

LFS_ABOVE = 5 * 1024**2
_LFS_NAMES = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot *.parquet
*.pb *.pickle *.pkl *.png *.pt *.pth *.rar *.safetensors *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*
"""
LFS_PATTERNS = _LFS_NAMES.split()
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


class HubError(Exception):
    """A refusal: `code` is the Hub's X-Error-Code, from which the client makes a typed exception."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `oid` is git's name of what git holds: for a file in LFS that is the pointer."""

    size: int
    oid: str
    sha256: str | None = None
    """Of the content of a file in LFS; None for a regular file."""

    @property
    def blob(self) -> str:
        """The content's name on disk."""
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int | None:
        return len(lfs_pointer(self.sha256, self.size)) if self.sha256 else None

    @classmethod
    def lfs(cls, sha256: str, size: int) -> "Entry":
        return cls(size, git_oid(lfs_pointer(sha256, size)), sha256)


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    parent: str | None
    message: str
    author: str
    date: str
    files: dict[str, Entry]

    @classmethod
    def new(cls, title: str, files: dict[str, Entry], author: str, parent: str | None, message: str = "") -> "Commit":
        date = now()
        named = json.dumps([title, message, author, parent, date, time.time_ns(), list(files)])
        return cls(hashlib.sha1(named.encode()).hexdigest(), title, parent, message, author, date, files)

    @classmethod
    def load(cls, path: Path) -> "Commit":
        data = json.loads(path.read_text())
        return cls(**data | {"files": {name: Entry(**entry) for name, entry in data["files"].items()}})

    def save(self, directory: Path) -> None:
        write_atomically(directory / f"{self.sha}.json", [json.dumps(asdict(self)).encode()])


@dataclass(frozen=True)
class Add:
    path: str
    entry: Entry


@dataclass(frozen=True)
class Delete:
    path: str
    is_folder: bool = False


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub keeps such a file outside git."""
    return size > LFS_ABOVE or any(fnmatch(PurePosixPath(path).name, pattern) for pattern in LFS_PATTERNS)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def write_atomically(path: Path, pieces: Iterable[bytes], sha256: str | None = None) -> str:
    """All of it or nothing; nothing too if the content's sha256, which is returned, is not the one given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    temporary, digest = Path(name), hashlib.sha256()
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        if sha256 not in (None, digest.hexdigest()):
            raise HubError(400, f"The content's sha256 is {digest.hexdigest()}, not {sha256}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


class Blobs:
    """Contents by name: sha256 for what LFS holds, git's oid for regular files."""

    def __init__(self, directory: Path):
        self._directory = directory

    def path(self, name: str) -> Path:
        return self._directory / name

    def size(self, name: str) -> int | None:
        """None where there is no such blob."""
        with suppress(FileNotFoundError):
            return self.path(name).stat().st_size
        return None

    def add_regular(self, content: bytes) -> Entry:
        entry = Entry(len(content), git_oid(content))
        write_atomically(self.path(entry.blob), [content])
        return entry

    def add_lfs(self, content: bytes) -> Entry:
        entry = Entry.lfs(hashlib.sha256(content).hexdigest(), len(content))
        write_atomically(self.path(entry.blob), [content])
        return entry

    def add(self, path: str, content: bytes) -> Entry:
        """`content` as the Hub would keep it under `path`."""
        return self.add_lfs(content) if is_lfs(path, len(content)) else self.add_regular(content)


class Repo:
    """One repository. Its methods may be called from any thread, next to the requests of clients."""

    def __init__(self, store: "Store", repo_id: str):
        self.id = repo_id
        self._store = store
        self._settings = store.directory / repo_id / "repo.json"
        self._commits_directory = self._settings.parent / "commits"
        settings = json.loads(self._settings.read_text())
        self.private: bool = settings["private"]
        self.created: str = settings["created"]
        self._branches: dict[str, str] = settings["branches"]
        self._tags: dict[str, str] = settings.get("tags", {})
        self._commits = {path.stem: Commit.load(path) for path in self._commits_directory.glob("*.json")}
        self._forget_unreachable()

    @property
    def branches(self) -> dict[str, str]:
        with self._store.lock:
            return dict(self._branches)

    @property
    def tags(self) -> dict[str, str]:
        with self._store.lock:
            return dict(self._tags)

    def resolve(self, revision: str = "main") -> Commit:
        """`revision`: a branch, a tag or the full sha of a commit that some branch or tag still reaches."""
        with self._store.lock:
            commit = self._commits.get((self._tags | self._branches).get(revision, revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commits(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        with self._store.lock:
            history = [self.resolve(revision)]
            while history[-1].parent:
                history.append(self._commits[history[-1].parent])
        return history

    def files(self, revision: str = "main") -> dict[str, Entry]:
        return dict(self.resolve(revision).files)

    def read(self, path: str, revision: str = "main") -> bytes:
        return self._store.blobs.path(self.resolve(revision).files[path].blob).read_bytes()

    def stored_bytes(self) -> int:
        """What the Hub charges for: every LFS blob that a commit in some branch's history names, once."""
        with self._store.lock:
            commits = list(self._commits.values())
        blobs = {entry.sha256: entry.size for commit in commits for entry in commit.files.values() if entry.sha256}
        return sum(blobs.values())

    def commit_as(
        self, author: str, changes: Mapping[str, bytes | None], branch: str = "main", title: str = "A foreign commit"
    ) -> Commit:
        """A commit that no client of the test makes; None deletes a file."""
        operations = [
            Delete(path) if content is None else Add(path, self._store.blobs.add(path, content))
            for path, content in changes.items()
        ]
        return self.commit(branch, title, operations, author)

    def commit(
        self,
        branch: str,
        title: str,
        operations: Iterable[Add | Delete],
        author: str,
        *,
        parent: str | None = None,
        message: str = "",
    ) -> Commit:
        """`parent`: what the branch's head has to be, else nothing is changed."""
        with self._store.writing():
            head = self._head(branch)
            if parent is not None and not (len(parent) >= 7 and head.sha.startswith(parent)):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = _apply(head.files, operations)
            return self._move(branch, Commit.new(title, files, author, head.sha, message))

    def squash(self, branch: str, title: str, author: str) -> Commit:
        """One commit without a parent in place of the branch's history."""
        with self._store.writing():
            commit = self._move(branch, Commit.new(title, self._head(branch).files, author, None))
            self._forget_unreachable()
            return commit

    def create_branch(self, name: str, revision: str = "main") -> None:
        with self._store.writing():
            if name in self._branches:
                raise HubError(409, f"Reference already exists: {name}")
            self._save(self._branches | {name: self.resolve(revision).sha})

    def create_tag(self, name: str, revision: str = "main") -> None:
        with self._store.writing():
            if name in self._tags:
                raise HubError(409, f"Reference already exists: {name}")
            self._tags = self._tags | {name: self.resolve(revision).sha}
            self._save(self._branches)

    def delete_branch(self, name: str) -> None:
        with self._store.writing():
            if name == "main":
                raise HubError(403, "Cannot delete the main branch")
            self._head(name)
            self._save({branch: sha for branch, sha in self._branches.items() if branch != name})
            self._forget_unreachable()

    def _head(self, branch: str) -> Commit:
        if branch not in self._branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return self._commits[self._branches[branch]]

    def _move(self, branch: str, commit: Commit) -> Commit:
        commit.save(self._commits_directory)
        self._commits[commit.sha] = commit
        self._save(self._branches | {branch: commit.sha})
        return commit

    def _save(self, branches: dict[str, str]) -> None:
        """The moment from which a change is there."""
        settings = {"private": self.private, "created": self.created, "branches": branches, "tags": self._tags}
        write_atomically(self._settings, [json.dumps(settings).encode()])
        self._branches = branches

    def _forget_unreachable(self) -> None:
        """Commits that a squash left behind, or that a killed server wrote before it could move a branch to them."""
        reachable: set[str] = set()
        for sha in (*self._branches.values(), *self._tags.values()):
            reachable |= {commit.sha for commit in self.commits(sha)}
        for sha in self._commits.keys() - reachable:
            del self._commits[sha]
            (self._commits_directory / f"{sha}.json").unlink(missing_ok=True)


class Store:
    """All repositories below one directory."""

    def __init__(self, directory: Path):
        self.directory = directory / "repos"
        self.blobs = Blobs(directory / "blobs")
        self.lock = threading.RLock()
        self._closed = False
        found = [str(path.parent.relative_to(self.directory)) for path in self.directory.glob("*/*/repo.json")]
        self._repos = {repo_id: Repo(self, repo_id) for repo_id in found}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The lock, for a change. After `close` nothing changes: the directory may belong to another server."""
        with self.lock:
            if self._closed:
                raise HubError(503, "The server is closed")
            yield

    def close(self) -> None:
        with self.lock:
            self._closed = True

    def get(self, repo_id: str) -> Repo | None:
        with self.lock:
            return self._repos.get(repo_id)

    def create(self, repo_id: str, *, private: bool, author: str) -> Repo:
        if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo_id):
            raise HubError(400, f"Invalid repo name: {repo_id}")
        with self.writing():
            directory = self.directory / repo_id
            shutil.rmtree(directory, ignore_errors=True)
            attributes = {".gitattributes": self.blobs.add(".gitattributes", GIT_ATTRIBUTES)}
            first = Commit.new("initial commit", attributes, author, None)
            first.save(directory / "commits")
            settings = {"private": private, "created": now(), "branches": {"main": first.sha}}
            write_atomically(directory / "repo.json", [json.dumps(settings).encode()])
            self._repos[repo_id] = repo = Repo(self, repo_id)
            return repo

    def delete(self, repo_id: str) -> None:
        with self.writing():
            del self._repos[repo_id]
            (self.directory / repo_id / "repo.json").unlink()
            shutil.rmtree(self.directory / repo_id)


def _apply(files: Mapping[str, Entry], operations: Iterable[Add | Delete]) -> dict[str, Entry]:
    """In the order given, as a folder may be deleted before new files go into it."""
    result = dict(files)
    for operation in operations:
        if isinstance(operation, Add):
            result[operation.path] = operation.entry
            continue
        path = operation.path.rstrip("/")
        gone = [name for name in result if name.startswith(f"{path}/")] if operation.is_folder else [path]
        if not gone or gone[0] not in result:
            raise HubError(404, f"A file with this name doesn't exist: {operation.path}", "EntryNotFound")
        for name in gone:
            del result[name]
    return dict(sorted(result.items()))
