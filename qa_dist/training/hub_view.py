"""What the Hub holds when a run starts: whether the run may push there, and which states it could go on from."""

import contextlib
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from qa_dist.checkpoint import manifest as manifests
from qa_dist.checkpoint.hub import MAIN, Repository
from qa_dist.checkpoint.hub_client import HubError, Remedy
from qa_dist.checkpoint.manifest import FILE_NAME, DamagedError, File, Manifest
from qa_dist.checkpoint.ownership import ConflictError
from qa_dist.checkpoint.publication import Found, Identity, Pointer, read_pointer, require_usable
from qa_dist.checkpoint.pull import KINDS, RemoteStates, fetch_files, pull, read_manifest, states
from qa_dist.checkpoint.store import publish_directory
from qa_dist.config import RunConfig
from qa_dist.errors import UserError
from qa_dist.reporting.tracker import announce
from qa_dist.training.engine import Engine

Result = TypeVar("Result")

NO_MODEL = ("metrics.json", "predictions_summary.json", "pushed.json")
"""What lies beside the model on `main`."""
MOVED = "the run that pushes there has squashed the branch in the meantime"
TRIES, LONGEST = 4, 60.0
"""Of what has to be known before a run can start: so many tries, and none after so many seconds."""


def patiently(action: Callable[[], Result]) -> Result:
    """Try `action` a few times, while it is the network or the Hub that is at fault. The GPUs wait meanwhile."""
    started = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return action()
        except HubError as error:
            late = time.monotonic() - started > LONGEST
            if error.remedy is not Remedy.RETRY or attempt >= TRIES or late:
                raise
            wait = min(error.retry_after, 60.0) or random.uniform(0.5, 1.0) * 2**attempt
            announce(f"hub: {error}; once more in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError


@dataclass(frozen=True)
class HubView:
    """What was found; the same on all ranks."""

    problem: str | None = None
    """Why nothing could be pushed now."""
    states_problem: str | None = None
    """Why it is not known which states there are."""
    main: str | None = None
    """The newest commit on `main` of this run's repository."""
    model: Pointer | None = None
    """Who has pushed last there."""
    own: RemoteStates | None = None
    """The states in this run's repository."""
    states: RemoteStates | None = None
    """Those to go on from, in the repository that --resume names, or this run's own."""

    @classmethod
    def look(cls, engine: Engine, config: RunConfig, source: str | None, revision: str | None) -> "HubView":
        """Make this run's repository, if it is not there, and read what is there. `source`: another repository to go
        on from. Raises `UserError` where the run could not push and `hub.strict` is set."""
        view = cls()

        def on_main() -> None:
            nonlocal view
            view = _look(config, source, revision)
            if view.problem and config.hub.strict and config.hub.repo_id:
                raise UserError(
                    f"hub.repo_id: nothing could be pushed to {config.hub.repo_id}: {view.problem}. Mend that, or "
                    "train all the same (--hub.strict false)"
                )

        engine.on_main(on_main)
        return engine.broadcast(view)

    def identity(self, config: RunConfig, run_id: str, step: int) -> Identity:
        """Who this process is to the Hub; `step`: where it goes on. On the main process.

        Raises `UserError` where the repository holds what is not this run's.
        """
        assert config.hub.repo_id is not None
        repository = Repository(config.hub.repo_id)
        unsettled = Identity(run_id, step=step, is_settled=False)
        if self.problem is not None:
            return unsettled
        try:
            main, branch = Found(self.main, self.model), config.hub.branch
            own = Found(self.own.commit, self.own.pointer) if self.own else Found(None, None)
            patiently(lambda: require_usable(repository, run_id, main, branch, own))
        except ConflictError as error:
            raise UserError(f"hub.repo_id: {error}") from None
        except (HubError, DamagedError) as error:
            if config.hub.strict:
                raise UserError(f"hub.repo_id: {config.hub.repo_id} cannot be read: {error}") from None
            return unsettled
        pointers = (main.pointer, own.pointer)
        return Identity(run_id, step=step, known={pointer.attempt for pointer in pointers if pointer})


def _look(config: RunConfig, source: str | None, revision: str | None) -> HubView:
    """As few requests as can be: a Hub under load may take a minute for each."""
    hub = config.hub
    view = HubView()
    if hub.repo_id is not None:
        repository = Repository(hub.repo_id)
        try:
            access = patiently(repository.access)
            head = access.head
            if head is None and access.problem is None:  # or seems not to be there: then this finds it
                head = patiently(lambda: repository.create(private=hub.private))
            if head is not None:
                model = patiently(lambda: read_pointer(repository, head))
                own = patiently(lambda: states(repository, hub.branch))
                view = HubView(access.problem, None, head, model, own, own)
            else:
                view = HubView(access.problem)
        except (HubError, DamagedError) as error:
            view = HubView(str(error), str(error))
    if source is None or (source == hub.repo_id and revision is None):
        return view
    try:
        found = patiently(lambda: states(Repository(source), revision or hub.branch))
        return replace(view, states=found, states_problem=None)
    except (HubError, DamagedError) as error:
        return replace(view, states=None, states_problem=str(error))


def fetch(
    engine: Engine, view: RemoteStates, root: Path, above: int, check: Callable[[Manifest], object]
) -> tuple[Path | None, list[str]]:
    """Put the newest state of a step higher than `above` that is complete and unchanged into `root`, on every node,
    and tell why newer ones are not used. None where there is none.

    `check` looks at a state before it is fetched. Raises `UserError` where that does, or it cannot be fetched.
    """
    notes: list[str] = []
    names = list(view.names)
    while names and manifests.step_number(names[0]) > above:
        problem = _fetch_on_nodes(engine, view, names[0], root, check)
        if problem is None:
            return root / names[0], notes
        if problem == MOVED and MOVED not in notes:  # once: it is not for ever
            notes.append(MOVED)
            view = _again(engine, view)
            names = list(view.names)
        else:
            notes.append(f"{view.repo_id}: {names.pop(0)} is not used: {problem}")
    return None, notes


def _again(engine: Engine, view: RemoteStates) -> RemoteStates:
    """What lies on the branch now."""
    found: RemoteStates | None = None

    def on_main() -> None:
        nonlocal found
        try:
            found = patiently(lambda: states(view.repository, view.revision))
        except (HubError, DamagedError) as error:
            raise UserError(f"{view.repo_id}: {error}") from None

    engine.on_main(on_main)
    return engine.broadcast(found) or view


def _fetch_on_nodes(
    engine: Engine, view: RemoteStates, name: str, root: Path, check: Callable[[Manifest], object]
) -> str | None:
    """One download for each disk. Returns what is wrong with the state."""
    damage: str | None = None

    def get() -> None:
        nonlocal damage
        try:
            patiently(lambda: pull(view, name, root, announce, check))
        except DamagedError as error:
            damage = str(error)
        except HubError as error:
            if error.is_missing:
                damage = MOVED
                return
            raise UserError(
                f"{view.repo_id} holds {name}, but it cannot be fetched: {error}. The run does not start without it; "
                "try again"
            ) from None

    engine.on_main(get)
    if (problem := engine.broadcast(damage)) is not None:
        return problem
    # which returns at once on a disk that has it by now
    engine.on_ranks(get if engine.is_local_main and not engine.is_main else None)
    return next((text for text in engine.gather(damage) if text is not None), None)


def run_of(view: RemoteStates) -> str | None:
    """The run that the states belong to; None where that cannot be told. Raises `UserError`. On the main process."""
    if view.pointer is not None:
        return view.pointer.run
    for name in view.names:
        try:
            return patiently(lambda name=name: read_manifest(view, name))[0].run_id or None
        except DamagedError:
            continue
        except HubError as error:
            raise UserError(f"{view.repo_id}: {error}; try again") from None
    return None


def fetch_model(engine: Engine, config: RunConfig, pointer: Pointer | None, step: int) -> bool:
    """Put the model of `step`, which this run has pushed from another machine, into model/. Returns whether that was
    possible."""
    done = False

    def on_main() -> None:
        nonlocal done
        if pointer is None or pointer.step != step or config.hub.repo_id is None:
            return
        repository = Repository(config.hub.repo_id)
        hashes = {
            name: sha256
            for name, sha256 in pointer.files.items()
            if FILE_NAME.fullmatch(name) and name.endswith(KINDS) and name not in NO_MODEL
        }

        def write(directory: Path) -> None:
            head = repository.head(MAIN)
            entries = repository.tree(head)
            if any(entries.get(name) is None for name in hashes):
                raise DamagedError("the model on the Hub is not the one that was pushed")
            files = {
                name: File(entry.size, hashes[name]) for name, entry in entries.items() if entry and name in hashes
            }
            fetch_files(repository, "", head, files, directory)

        with contextlib.suppress(HubError, DamagedError):
            patiently(lambda: publish_directory(config.output_dir / "model", write))
            done = True

    engine.on_main(on_main)
    return engine.broadcast(done)
