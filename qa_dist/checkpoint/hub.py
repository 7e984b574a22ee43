"""A model repository on the Hugging Face Hub: what it holds now, never what a cache remembers of it, and what is
written to it, one commit at a time."""

import contextlib
import hashlib
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    hf_hub_url,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from qa_dist.checkpoint import hub_client
from qa_dist.checkpoint.hub_client import HubError, Remedy, troubles, with_time_outs
from qa_dist.checkpoint.manifest import DamagedError, File

MAIN = "main"
"""The branch that holds what people load."""
DOWNLOAD_TRIES = 6
"""Tries of one download without progress."""
MOST_ENTRIES = 20_000
"""Of one folder; more is not something that this package has written."""
UNKNOWN_QUESTION = (404, 405, 501)
"""Answers of a Hub, such as one behind a proxy, that does not have everything that huggingface.co has."""
MOST_JSON_BYTES = 32 * 2**20


def _is_absent(error: HfHubHTTPError) -> bool:
    """Whether it is the file that is not there, and not the repository or the commit."""
    others = RepositoryNotFoundError | RevisionNotFoundError
    return error.response.status_code == 404 and not isinstance(error, others)


class _Api(HfApi):
    """The client, but for one thing that it does before it commits."""

    def _validate_yaml(self, content: str, **options: Any) -> None:
        """Have the Hub look at a model card. That it cannot do so just now must not keep the model back."""
        try:
            super()._validate_yaml(content, **options)
        except ValueError as error:
            if "Invalid metadata" in str(error):
                raise
        except (httpx2.HTTPError, OSError):
            pass


@dataclass(frozen=True)
class Entry:
    """A file in a repository."""

    size: int
    """Bytes."""
    sha256: str | None
    """None for a small file that is stored in git itself."""


@dataclass(frozen=True)
class Access:
    """What the token may do with a repository."""

    user: str
    head: str | None
    """The newest commit on `main`; None where there is no such repository."""
    is_private: bool
    problem: str | None
    """Why this token could not push there."""


class Repository:
    """A model repository. All its methods raise `HubError`; those that read, `DamagedError` for what is not to be
    read."""

    def __init__(self, repo_id: str):
        self.id = repo_id
        self._api = _Api()
        with_time_outs()

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.id}"

    # ----------------------------------------------------------------------------------------- reading

    def head(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit's name stands for now."""
        with troubles():
            sha = self._api.repo_info(self.id, revision=revision, timeout=hub_client.TIMEOUT.read).sha
            if not isinstance(sha, str) or not sha:
                raise ValueError("the Hub did not say which commit is the newest")
            return sha

    def head_if_any(self, revision: str) -> str | None:
        """Return `head`, or None where there is no such revision, or no repository that this token can see.

        Nobody takes the Hub's word for it after one answer: a run would begin anew where its states lie.
        """
        try:
            return self.head(revision)
        except HubError as error:
            if not error.is_missing:
                raise
        if revision in self._references():
            raise HubError(f"{self.id}: {revision} is there, and yet cannot be found", Remedy.RETRY)
        return None

    def _references(self) -> set[str]:
        """Return the names of all branches and tags; none where there is no repository."""
        with troubles():
            try:
                refs = self._api.list_repo_refs(self.id)
            except HfHubHTTPError as error:
                if isinstance(error, RepositoryNotFoundError) or error.response.status_code in (404, 501):
                    return set()
                raise
            return {ref.name for ref in (*refs.branches, *refs.tags)}

    def history(self, branch: str) -> list[str]:
        """Return the titles of the commits of a branch, newest first."""
        with troubles():
            return [commit.title for commit in self._api.list_repo_commits(self.id, revision=branch)]

    def tree(self, commit: str, folder: str = "", *, recursive: bool = False) -> dict[str, Entry | None]:
        """Return path -> what lies there, below `folder`; None for a folder. Empty where `folder` is not there; that is
        asked twice, as the files of a commit do not go away. Raises `DamagedError` for more than anybody has written
        there on purpose."""
        with troubles():
            return self._tree(commit, folder, recursive) or self._tree(commit, folder, recursive)

    def _tree(self, commit: str, folder: str, recursive: bool) -> dict[str, Entry | None]:
        listed = self._api.list_repo_tree(self.id, path_in_repo=folder or None, revision=commit, recursive=recursive)
        found: dict[str, Entry | None] = {}
        try:
            for item in itertools.islice(listed, MOST_ENTRIES + 1):
                is_file = isinstance(item, RepoFile)
                found[item.path] = Entry(item.size, item.lfs.sha256 if item.lfs else None) if is_file else None
        except HfHubHTTPError as error:
            if _is_absent(error) and folder:
                return {}
            raise
        if len(found) > MOST_ENTRIES:
            raise DamagedError(f"{folder or self.id} holds more than {MOST_ENTRIES:,} files")
        return found

    def read(self, path: str, commit: str, limit: int = MOST_JSON_BYTES) -> bytes | None:
        """Return the bytes of a small file, or None if neither it nor its name is there. Raises `DamagedError` for a
        larger one."""
        with troubles():
            content = bytearray()
            try:
                with self._stream(path, commit, 0) as response:
                    for chunk in response.iter_bytes():
                        content += chunk
                        if len(content) > limit:
                            raise DamagedError(f"{path} has more than {limit:,} bytes")
            except HfHubHTTPError as error:
                if not _is_absent(error):
                    raise
                if path in self.tree(commit, path.rpartition("/")[0]):
                    raise HubError(f"{path} is listed, and yet cannot be found", Remedy.RETRY) from error
                return None
            return bytes(content)

    def download(
        self, path: str, commit: str, target: Path, expected: File, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Fetch a file, and continue where a broken connection left off. Not a byte more than `expected` has is
        written, and none once `given_up` returns True.

        Raises `DamagedError` unless it is what is `expected`.
        """
        attempt, reached, mismatches = 0, 0, 0
        while True:
            attempt += 1
            try:
                with troubles():
                    self._fetch_rest(path, commit, target, expected, given_up)
                if (found := File.of(target)).is_same(expected):
                    return
                raise DamagedError(f"{path} is not what its manifest says (sha256 {found.sha256[:12]}…)")
            except DamagedError:
                target.unlink(missing_ok=True)
                reached, mismatches = 0, mismatches + 1
                if mismatches >= 2:  # once it may have been the line
                    raise
            except HubError as error:
                size = target.stat().st_size if target.is_file() else 0
                if size - reached >= max(2**20, expected.size // 100):  # it gets on
                    attempt, reached = 0, size
                if error.remedy is not Remedy.RETRY or attempt >= DOWNLOAD_TRIES or given_up():
                    raise
                time.sleep(max(error.retry_after, random.uniform(0.5, 1) * min(2**attempt, 30)))

    def _fetch_rest(self, path: str, commit: str, target: Path, expected: File, given_up: Callable[[], bool]) -> None:
        """Append to `target` what it lacks."""
        done = target.stat().st_size if target.is_file() else 0
        if done >= expected.size > 0:
            return
        with self._stream(path, commit, done) as response, target.open("ab") as file:
            if done and response.status_code != 206:  # the answer is the whole file
                file.truncate(0)
                done = 0
            for chunk in response.iter_bytes():
                done += len(chunk)
                if done > expected.size:
                    raise DamagedError(f"{path} is longer than its manifest says ({expected.size:,} bytes)")
                if given_up():
                    raise HubError(f"{path} is not needed any more", Remedy.NONE)
                file.write(chunk)
        if done < expected.size:
            raise ConnectionError(f"{path}: the connection ended after {done:,} of {expected.size:,} bytes")

    @contextlib.contextmanager
    def _stream(self, path: str, commit: str, start: int) -> Iterator[httpx2.Response]:
        url = hf_hub_url(self.id, path, revision=commit, endpoint=constants.ENDPOINT)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # ranges count the bytes that are sent
        if start:
            headers["Range"] = f"bytes={start}-"
        with get_session().stream("GET", url, headers=headers) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            yield response

    # ----------------------------------------------------------------------------------------- writing

    def access(self) -> Access:
        """What the token may do, found out without changing anything."""
        with troubles():
            try:
                user = self._api.whoami()
            except HfHubHTTPError as error:
                if error.response.status_code not in UNKNOWN_QUESTION:
                    raise
                user = {}
            name, info = str(user.get("name", "an unknown user")), self._info()
            if info is None and (problem := self._cannot_create(user)) is not None:
                info = self._info()  # it has to be true before a run is refused
                if info is None:
                    return Access(name, None, False, problem)
            if info is None:
                return Access(name, None, False, None)
            return Access(name, info.sha, bool(info.private), self._cannot_write(user))

    def _info(self) -> Any:
        """What the Hub says of the repository; None where there is none that this token can see."""
        try:
            return self._api.repo_info(self.id, revision=MAIN, timeout=hub_client.TIMEOUT.read)
        except HfHubHTTPError as error:
            if isinstance(error, RepositoryNotFoundError) or error.response.status_code == 404:
                return None
            raise

    def _cannot_create(self, user: dict[str, Any]) -> str | None:
        owner = self.id.partition("/")[0]
        owners = [user.get("name"), *(org.get("name") for org in user.get("orgs") or ())]
        if user and owner not in owners:
            return f"the repository is not there, and this token's user cannot create one for {owner!r}"
        return None if _role(user) != "read" else "the token is for reading only; make one that may write"

    def _cannot_write(self, user: dict[str, Any]) -> str | None:
        try:
            self._api.auth_check(self.id, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                return f"the token may not write to {self.id}; make one that may"
            if error.response.status_code not in UNKNOWN_QUESTION:
                raise
        return None if _role(user) != "read" else "the token is for reading only; make one that may write"

    def create(self, *, private: bool) -> str:
        """Create the repository, if it is not there; return the newest commit on `main`, which may be somebody's."""
        with troubles():
            info = self._info()
            if info is None:
                with contextlib.suppress(LookupError):  # the client did not understand the answer
                    self._api.create_repo(self.id, private=private, exist_ok=True)
                info = self._info()
            if info is None or not info.sha:
                raise HubError(f"{self.id} was created, and yet cannot be found", Remedy.RETRY)
            return info.sha

    def create_branch(self, branch: str) -> None:
        with troubles():
            self._api.create_branch(self.id, branch=branch, exist_ok=True)

    def commit(
        self,
        branch: str,
        parent: str,
        additions: Mapping[str, "Path | bytes | CommitOperationAdd"],
        deletions: Sequence[str],
        message: str,
        hashes: Mapping[str, str] | None = None,
    ) -> str:
        """Add and delete files in one commit on top of `parent`, and see that it is what the branch holds now.

        `additions`: path -> file, content, or a file that has been uploaded. `deletions`: paths; folders end with "/".
        `hashes`: path -> sha256, where it is known, so that large files need not be read twice. Returns the commit.
        """
        with troubles():
            # New objects for every try: the client remembers in them what it believes to have done.
            operations: list[CommitOperationAdd | CommitOperationDelete] = []
            for path, content in additions.items():
                operation = content if isinstance(content, CommitOperationAdd) else _addition(path, content)
                if hashes and path in hashes and not operation.upload_info.is_hashed:
                    operation.upload_info.sha256 = bytes.fromhex(hashes[path])
                operations.append(operation)
            operations += [CommitOperationDelete(path, is_folder=path.endswith("/")) for path in deletions]
            info = self._api.create_commit(
                self.id, operations, commit_message=message, revision=branch, parent_commit=parent
            )
            added = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
            infos = {operation.path_in_repo: operation.upload_info for operation in added}
            self.require(info.oid, {path: File(info.size, info.sha256.hex()) for path, info in infos.items()})
            return info.oid

    def require(self, commit: str, files: Mapping[str, File]) -> None:
        """Raise `HubError` unless these files are in the commit: an ignore file in the repository, for one, makes the
        client leave some out."""
        found: dict[str, Entry | None] = {}
        for folder in {path.rpartition("/")[0] for path in files}:
            found |= self.tree(commit, folder)
        for path, file in files.items():
            entry = found.get(path)
            if entry is None or entry.size != file.size or entry.sha256 not in (None, file.sha256):
                raise HubError(f"{path} was pushed, but is not there (does a .gitignore name it?)", Remedy.MEND)

    def upload(self, files: Mapping[str, Path], hashes: Mapping[str, str]) -> None:
        """Upload large files (path in the repository -> file) for a later commit, which may be another process's."""
        with troubles():
            operations = [_addition(path, file) for path, file in files.items()]
            for operation in operations:
                operation.upload_info.sha256 = bytes.fromhex(hashes[operation.path_in_repo])
            self._api.preupload_lfs_files(self.id, operations, free_memory=False)
            small = [operation.path_in_repo for operation in operations if not operation._is_uploaded]
            if small:
                raise HubError(f"the Hub takes {small[0]} within a commit only", Remedy.NONE)

    def squash(self, branch: str, message: str) -> None:
        """Make the branch's newest commit its only one."""
        with troubles():
            self._api.super_squash_history(self.id, branch=branch, commit_message=message)


def _addition(path: str, content: Path | bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def _role(user: dict[str, Any]) -> str | None:
    token = (user.get("auth") or {}).get("accessToken") or {}
    return token.get("role")


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
