"""What the Hub holds when a run starts: whether the run may push there, and which states it could go on from."""

import contextlib
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qa_dist.checkpoint import manifest as manifests
from qa_dist.checkpoint.hub import MAIN, Repository
from qa_dist.checkpoint.hub_client import HubError, Remedy
from qa_dist.checkpoint.manifest import DamagedError
from qa_dist.checkpoint.publication import ConflictError, Identity, Pointer, read_pointer, require_usable
from qa_dist.checkpoint.pull import RemoteStates, pull, read_manifest, states
from qa_dist.config import RunConfig
from qa_dist.errors import UserError
from qa_dist.reporting.tracker import announce
from qa_dist.training.engine import Engine

Result = TypeVar("Result")

METRICS = "metrics.jsonl"
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
            time.sleep(min(error.retry_after, 60.0) or random.uniform(0.5, 1.0) * 2**attempt)
    raise AssertionError


@dataclass(frozen=True)
class HubView:
    """What was found; the same on all ranks."""

    problem: str | None = None
    """Why the Hub could not be asked, or would not let this run push."""
    model: Pointer | None = None
    state: Pointer | None = None
    """Who has pushed last to the branches of this run's repository."""
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

    def identity(self, config: RunConfig, run_id: str) -> Identity:
        """Who this process is to the Hub. Raises `UserError` where the repository holds what is not this run's. On
        the main process."""
        if config.hub.repo_id is not None and self.problem is None:
            repository = Repository(config.hub.repo_id)
            try:
                patiently(lambda: require_usable(repository, run_id, (self.model, self.state), repository.head(MAIN)))
            except ConflictError as error:
                raise UserError(f"hub.repo_id: {error}") from None
            except HubError as error:
                raise UserError(f"hub.repo_id: {config.hub.repo_id} cannot be read: {error}") from None
        known = {pointer.attempt for pointer in (self.model, self.state) if pointer and pointer.run == run_id}
        return Identity(run_id, known=known, is_settled=self.problem is None)


def _look(config: RunConfig, source: str | None, revision: str | None) -> HubView:
    hub = config.hub
    model, state = None, None
    try:
        if hub.repo_id is not None:
            repository = Repository(hub.repo_id)
            if problem := patiently(repository.access).problem:
                return HubView(problem)
            patiently(lambda: repository.create(private=hub.private))
            model = patiently(lambda: _pointer(repository, MAIN))
            state = patiently(lambda: _pointer(repository, hub.branch))
        from_id = source or hub.repo_id
        if from_id is None:
            return HubView()
        found = patiently(lambda: states(Repository(from_id), revision or hub.branch))
        return HubView(None, model, state, found)
    except (HubError, DamagedError) as error:
        return HubView(str(error))


def _pointer(repository: Repository, branch: str) -> Pointer | None:
    head = repository.head_if_any(branch)
    return read_pointer(repository, head) if head is not None else None


def fetch(engine: Engine, view: RemoteStates, root: Path, above: int) -> tuple[Path | None, list[str]]:
    """Put the newest state of a step higher than `above` that is complete and unchanged into `root`, on every node,
    and tell why newer ones are not used. None where there is none.

    Raises `UserError` where that cannot be found out, or the state is another run's than what lies in `root`.
    """
    notes: list[str] = []
    names = list(view.names)
    while names and manifests.step_number(names[0]) > above:
        problem = _fetch_on_nodes(engine, view, names[0], root)
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


def _fetch_on_nodes(engine: Engine, view: RemoteStates, name: str, root: Path) -> str | None:
    """One download for each disk. Returns what is wrong with the state."""
    damage: str | None = None

    def get() -> None:
        nonlocal damage
        try:
            patiently(lambda: pull(view, name, root, announce))
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
    needs_own = engine.is_local_main and not (root / name / manifests.NAME).is_file()
    engine.on_ranks(get if needs_own else None)
    return next((text for text in engine.gather(damage) if text is not None), None)


def fetch_metrics(config: RunConfig) -> None:
    """Give a run directory that begins on this machine the logged steps from before, for the curves. On the main
    process; where they cannot be had, the run does without."""
    target = config.output_dir / METRICS
    if config.hub.repo_id is None or target.exists():
        return
    repository = Repository(config.hub.repo_id)
    with contextlib.suppress(HubError, OSError):
        if content := repository.read(METRICS, repository.head(MAIN)):
            target.write_bytes(content)


def run_of(view: RemoteStates, name: str) -> str | None:
    """The run that a state belongs to; None where that cannot be told."""
    try:
        return read_manifest(view, name)[0].progress.get("run_id")
    except DamagedError:
        return None
