"""What a run keeps on the Hub, and where.

`main` holds what people load. The training states lie on a branch of their own, each in a folder like a checkpoint on
disk, the newest few only. Each branch has a small file, `pushed.json`, that says who pushed last and what: by it a
commit whose answer was lost is known, and a run sees that another one pushes to the same place.
"""

import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from huggingface_hub import CommitOperationAdd
from pydantic import ConfigDict, Field, ValidationError

from qa_dist.checkpoint import manifest as manifests
from qa_dist.checkpoint.hub import MAIN, Entry, Repository, sha256_of
from qa_dist.checkpoint.hub_client import HubError, Remedy
from qa_dist.checkpoint.manifest import DamagedError, File, Manifest, Sha256
from qa_dist.checkpoint.ownership import (
    CARD,
    POINTER,
    WEIGHTS,
    ConflictError,
    UnreadablePointerError,
    require_free_branch,
    require_no_model,
)
from qa_dist.checkpoint.progress import Count, Record
from qa_dist.checkpoint.push_queue import Lane, Push
from qa_dist.checkpoint.store import directory_name
from qa_dist.errors import UserError

SCHEMA_VERSION = 1
WaitForShards = Callable[[Mapping[str, File]], tuple[Mapping[str, CommitOperationAdd], str]]
"""Path -> file of what is wanted; returns what there is of it, and what is the matter with the rest."""
MODEL_TITLE = "Model of step "
"""How the titles of the commits begin that hold a model."""
MOST_LEFT_BEHIND = 5
"""Folders that a push looks into, to see whether they can be removed."""


class Pointer(Record):
    """Who pushed last to a branch, and what."""

    model_config = ConfigDict(frozen=True)

    run: Annotated[str, Field(max_length=200)]
    """Identifies the run: the same from its first start to its end, on whatever machines."""
    attempt: Annotated[str, Field(max_length=200)]
    """Identifies the process: another one after each start."""
    step: Count
    states: dict[str, Sha256] = Field(default_factory=dict)
    """Folder -> sha256 of its manifest, newest first; on the branch of training states."""
    files: dict[str, Sha256] = Field(default_factory=dict)
    """Path -> sha256; on `main`."""
    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION

    def to_json(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()

    @classmethod
    def parse(cls, content: Any) -> "Pointer | None":
        """Return the pointer that `content` holds, or None for anything else. Fields of later versions are skipped."""
        try:
            return cls.model_validate({name: content[name] for name in cls.model_fields if name in content})
        except (ValidationError, TypeError, LookupError):
            return None


def read_pointer(repository: Repository, commit: str) -> Pointer | None:
    """None where there surely is none: who pushed is not to be guessed at. Raises `HubError`, also for one of a newer
    version of this package."""
    try:
        content = repository.read(POINTER, commit)
        if content is None:
            return None
        pointer = Pointer.parse(json.loads(content))
    except (DamagedError, ValueError, RecursionError):
        pointer = None
    if pointer is None:
        raise UnreadablePointerError(
            f"{POINTER} in {repository.id} cannot be read, so it is not known whose work lies there", Remedy.RETRY
        )
    if pointer.schema_version > SCHEMA_VERSION:
        raise HubError(f"{repository.id} was written by a newer version of qa_dist; update qa_dist", Remedy.NONE)
    return pointer


def listing(repository: Repository, commit: str, pointer: Pointer | None) -> dict[str, Entry | None]:
    """Return what lies at the top of a commit that has this pointer. Raises `HubError` for a listing without it.

    One answer that lacks a state does not prove that the state is gone.
    """
    entries = repository.tree(commit)
    if pointer is not None and not entries.keys() >= {POINTER, *pointer.states}:
        entries |= repository.tree(commit)
        if POINTER not in entries:
            raise HubError(f"the Hub lists {repository.id} without {POINTER}, which is there", Remedy.RETRY)
    return entries


def new_id() -> str:
    return secrets.token_hex(8)


@dataclass
class Identity:
    """Who pushes."""

    run: str
    attempt: str = field(default_factory=new_id)
    step: int = 0
    """The newest that this process goes on from, or has pushed anything of."""
    known: set[str] = field(default_factory=set)
    """Earlier attempts whose work this one goes on with."""
    is_settled: bool = True
    """Whether `known` is complete; else the Hub could not be asked yet, and what it holds of this run is."""

    def require_own(self, pointer: Pointer | None, repository: Repository) -> None:
        """Raise `ConflictError` if somebody else has pushed since."""
        if pointer is None:
            return
        if not self.is_settled and pointer.run == self.run:
            if pointer.step > self.step:
                raise ConflictError(
                    f"{repository.id} is at step {pointer.step} of this run already, and this is step {self.step}: an "
                    "older copy. Go on with the newer one (--resume hub)"
                )
            self.known.add(pointer.attempt)
        if pointer.attempt not in {self.attempt, *self.known}:
            other = "this run, started a second time," if pointer.run == self.run else "another run"
            raise ConflictError(
                f"{other} pushes to {repository.id} too (it is at step {pointer.step}); nothing of it is overwritten"
            )


class Publication:
    """Pushes what a run has to one repository. All its methods raise `HubError`."""

    def __init__(
        self, repository: Repository, identity: Identity, branch: str, keep: int, keep_models: int | None = None
    ):
        self.repository = repository
        self.identity = identity
        self.branch = branch
        self.keep = keep
        self.keep_models = keep_models
        self.skips_unchanged = False
        """Whether what another process of this run has pushed already is not pushed again. A run in progress does push
        it: so an older process of the same run, if it still lives, sees that it has a successor."""
        self.wait_for_shards: WaitForShards = lambda shards: ({}, "")
        """For the shards that lie on other nodes' disks."""
        self.notes: list[str] = []
        """What people should know beside; whoever reads it empties it."""
        self._begun: set[Lane] = set()
        """What this process has pushed."""
        self._has_made_branch = False
        # the first push squashes: earlier attempts may have ended before they did
        self._commits_since_squash = keep
        self._card_is_kept = False
        self._foreign: set[str] = set()
        """Folders of states that are not this run's."""

    def push(self, push: Push, count_commit: Callable[[], None]) -> None:
        """One try. Calls `count_commit` before each commit."""
        self.identity.step = max(self.identity.step, push.step)
        if push.lane not in self._begun:
            self._require_other_branch(MAIN if push.lane == "state" else self.branch)
        {"state": self._push_state, "model": self._push_model}[push.lane](push, count_commit)
        self._begun.add(push.lane)
        self.identity.is_settled = True  # both branches have been looked at

    def _require_other_branch(self, branch: str) -> None:
        """Two runs that start at the same time must not end up with a branch each."""
        head = self.repository.head_if_any(branch)
        if head is not None:
            self.identity.require_own(read_pointer(self.repository, head), self.repository)

    # -------------------------------------------------------------------------------------------- states

    def _push_state(self, push: Push, count_commit: Callable[[], None]) -> None:
        repository, folder = self.repository, directory_name(push.step)
        head = repository.head_if_any(self.branch)
        if head is None:
            repository.create_branch(self.branch)
            self._has_made_branch, self._commits_since_squash = True, 0
            head = repository.head(self.branch)
        pointer = read_pointer(repository, head)
        self.identity.require_own(pointer, repository)
        entries = listing(repository, head, pointer)
        if pointer is None and not self._has_made_branch:
            require_free_branch(repository, self.branch, entries)
        manifest_bytes = (push.directory / manifests.NAME).read_bytes()
        digest = sha256_of(manifest_bytes)
        manifest = Manifest.parse(manifest_bytes, folder)
        if pointer and self._has_pushed(pointer, push) and pointer.states.get(folder) == digest:
            return repository.require(head, {f"{folder}/{name}": file for name, file in manifest.files.items()})
        present = {path for path, entry in entries.items() if entry is None and manifests.DIRECTORY.fullmatch(path)}
        before = [name for name in (pointer.states if pointer else {}) if name in present and name != folder]
        # newest first; what is of a step not reached yet is of a past that this run has not gone on from
        kept = [name for name in before if name < folder][: self.keep - 1]
        states = {folder: digest} | {name: pointer.states[name] for name in kept if pointer}
        gone = [f"{name}/" for name in before if name not in states]
        gone += [f"{name}/" for name in self._left_behind(head, present.difference(before, states), min(states))]
        if pointer is None or not pointer.states:  # a branch begins as a copy of main, whose model is not a state
            copied = entries.keys() - {CARD} if pointer is None else {path.split("/")[0] for path in pointer.files}
            copied = (copied & entries.keys()) - {".gitattributes", POINTER, folder}
            gone += [path + "/" * (entries[path] is None) for path in sorted(copied)]
        additions, hashes = self._state_files(push, manifest)
        gone += self._outdated(repository, head, folder, additions) if folder in present else []
        own = Pointer(run=self.identity.run, attempt=self.identity.attempt, step=push.step, states=states)
        count_commit()
        repository.commit(
            self.branch, head, {**additions, POINTER: own.to_json()}, gone, f"State of step {push.step}", hashes
        )
        self._commits_since_squash += 1
        if self._commits_since_squash >= self.keep:
            self.squash(count_commit)
        return None

    def _has_pushed(self, pointer: Pointer, push: Push) -> bool:
        """Return whether an earlier try, whose answer was lost, has pushed this step, or another process that this one
        need not replace."""
        if pointer.attempt == self.identity.attempt:
            return True
        return self.skips_unchanged and pointer.run == self.identity.run and pointer.step == push.step

    def _left_behind(self, head: str, names: Iterable[str], oldest: str) -> list[str]:
        """Return which of the folders `names` hold states of this run that are older than the folder `oldest`: no
        pointer names them any more, and nobody else would remove them."""
        found: list[str] = []
        for name in sorted(name for name in names if name < oldest and name not in self._foreign)[:MOST_LEFT_BEHIND]:
            try:
                content = self.repository.read(f"{name}/{manifests.NAME}", head, manifests.MAX_BYTES)
                is_ours = content is not None and Manifest.parse(content, name).run_id == self.identity.run
            except HubError:  # the next push asks again
                continue
            except (DamagedError, UserError):  # it does not say whose it is
                is_ours = False
            if is_ours:
                found.append(name)
            else:
                self._foreign.add(name)
        return found

    def _state_files(
        self, push: Push, manifest: Manifest
    ) -> tuple[dict[str, Path | CommitOperationAdd], dict[str, str]]:
        """Path -> file or what another node has uploaded, and path -> sha256."""
        folder = directory_name(push.step)
        additions: dict[str, Path | CommitOperationAdd] = {
            f"{folder}/{name}": push.directory / name for name in manifest.files if (push.directory / name).is_file()
        }
        hashes = {f"{folder}/{name}": manifest.files[name].sha256 for name in manifest.files}
        elsewhere = {f"{folder}/{name}": file for name, file in manifest.files.items()}
        elsewhere = {path: file for path, file in elsewhere.items() if path not in additions}
        if elsewhere:
            uploaded, trouble = self.wait_for_shards(elsewhere)
            additions |= uploaded
            absent = [path for path in elsewhere if path not in uploaded]
            if absent:
                raise HubError(f"{absent[0]} has not been uploaded by its node yet {trouble}".strip(), Remedy.RETRY)
        additions[f"{folder}/{manifests.NAME}"] = push.directory / manifests.NAME
        return additions, hashes

    @staticmethod
    def _outdated(repository: Repository, head: str, folder: str, additions: Iterable[str]) -> list[str]:
        """What an earlier state of the same step, of another number of processes, has left in the folder."""
        return sorted(set(repository.tree(head, folder)) - set(additions))

    def squash(self, count_commit: Callable[[], None]) -> None:
        """Forget the history of the branch of states: what was deleted only takes no more room then."""
        count_commit()
        try:
            self.repository.squash(self.branch, "Older states are not kept")
            self._commits_since_squash = 0
        except HubError as error:  # the state itself is there; the next push tries again
            self.notes.append(f"hub: the history of {self.branch} could not be squashed: {error}")

    # --------------------------------------------------------------------------------------------- model

    def _push_model(self, push: Push, count_commit: Callable[[], None]) -> None:
        repository = self.repository
        directory = push.complete(push.directory) if push.complete else push.directory
        head = repository.head(MAIN)
        pointer = read_pointer(repository, head)
        self.identity.require_own(pointer, repository)
        if pointer is None:
            require_no_model(repository, head)
        local = sorted(path for path in directory.rglob("*") if path.is_file())
        files = {path.relative_to(directory).as_posix(): path for path in local}
        if CARD in files and not self._may_replace_card(head, pointer):
            del files[CARD]
        known = {name: File.of(path) for name, path in files.items()}
        hashes = {name: file.sha256 for name, file in known.items()}
        if pointer and self._is_unchanged(pointer, push, hashes):
            # what is made anew for each try, the card and the logs, may be newer
            same = {name: file for name, file in known.items() if pointer.files.get(name) == file.sha256}
            return repository.require(head, {name: known[name] for name in known if name.endswith(WEIGHTS)} | same)
        present = repository.tree(head)
        before = pointer.files if pointer else {}
        # What lies in folders is logs, and those of earlier machines stay; the card is not ours once it was edited.
        gone = [name for name in before if name in present and name not in {*files, CARD} and "/" not in name]
        own = Pointer(run=self.identity.run, attempt=self.identity.attempt, step=push.step, files=hashes)
        additions: dict[str, Path | bytes | CommitOperationAdd] = {**files, POINTER: own.to_json()}
        message = f"{MODEL_TITLE}{push.step}"
        try:
            count_commit()
            repository.commit(MAIN, head, additions, gone, message, hashes)
        except HubError as error:
            if "Invalid metadata in README.md" not in str(error):
                raise
            self.notes.append(f"hub: the model card is not pushed: {error}")
            del additions[CARD]
            count_commit()
            repository.commit(MAIN, head, additions, gone, message, hashes)
        self._bound_history(push, count_commit)
        return None

    def _is_unchanged(self, pointer: Pointer, push: Push, hashes: Mapping[str, str]) -> bool:
        """Return whether the model has been pushed already, see `_has_pushed`."""
        if pointer.step != push.step or not self._has_pushed(pointer, push):
            return False
        if pointer.attempt == self.identity.attempt:
            return True
        kept = {CARD} - hashes.keys()  # a card that a person has edited is not pushed
        return {name: sha256 for name, sha256 in pointer.files.items() if name not in kept} == hashes

    def _bound_history(self, push: Push, count_commit: Callable[[], None]) -> None:
        """Forget the history of `main` where it holds more models than are to be kept. Files are not touched."""
        if self.keep_models is None:
            return
        try:
            titles = self.repository.history(MAIN)
            if sum(title.startswith(MODEL_TITLE) for title in titles) > self.keep_models:
                count_commit()
                self.repository.squash(MAIN, f"{MODEL_TITLE}{push.step}")
        except HubError as error:  # the model itself is there; the next push tries again
            self.notes.append(f"hub: the history of {MAIN} could not be squashed: {error}")

    def _may_replace_card(self, head: str, pointer: Pointer | None) -> bool:
        """Whether the card on the Hub is ours as we pushed it, or holds no text yet; what a person has written there
        stays."""
        content = self.repository.read(CARD, head)
        if content is None:
            return True
        if pointer is not None and pointer.files.get(CARD) == sha256_of(content):
            return True
        if pointer is None:
            text = content.decode("utf-8", "replace").strip()
            body = text.removeprefix("---").partition("\n---")[2] if text.startswith("---") else text
            if not body.strip():
                return True
        if not self._card_is_kept:
            self._card_is_kept = True
            self.notes.append(f"hub: the README.md of {self.repository.id} was written by hand and stays as it is")
        return False


class Found(NamedTuple):
    """What a branch holds when a run starts."""

    commit: str | None
    """None where there is no such branch."""
    pointer: Pointer | None


def require_usable(repository: Repository, run: str, main: Found, branch: str, states: Found) -> None:
    """Raise `ConflictError` if the repository holds what is not this run's: another run's work, or what no run has
    pushed. `states` is what `branch` holds."""
    for pointer in (main.pointer, states.pointer):
        if pointer is not None and pointer.run != run:
            has_states = states.pointer is not None and states.pointer.states
            advice = "go on with it (--resume hub), or name" if has_states else "name"
            raise ConflictError(
                f"{repository.id} holds another run (at step {pointer.step}), and nothing is overwritten: {advice} "
                "another repository"
            )
    if main.pointer is None and main.commit is not None:
        require_no_model(repository, main.commit)
    if states.pointer is None and states.commit is not None:
        require_free_branch(repository, branch, repository.tree(states.commit))
