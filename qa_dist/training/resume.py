"""Going on where an earlier run was: which checkpoint, whether it fits, and how its tensors come back."""

import contextlib
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from qa_dist.checkpoint import manifest as manifests
from qa_dist.checkpoint.manifest import DamagedError, Manifest, TensorSpec, damage
from qa_dist.checkpoint.pull import RemoteStates
from qa_dist.checkpoint.state import restore, tensor_specs
from qa_dist.checkpoint.store import ASIDE, Shards, gap, set_aside, step_directories
from qa_dist.config import RunConfig
from qa_dist.errors import TrainingError, UserError, listing
from qa_dist.reporting.run_directory import require_free
from qa_dist.reporting.status import read_status
from qa_dist.training.changes import check_settings, is_same_run
from qa_dist.training.engine import PASSING, Engine
from qa_dist.training.hub_view import HubView, fetch, run_of

DIRECTORY = "checkpoints"
"""Where they lie in a run directory."""
NOTHING_THERE = HubView()


@dataclass(frozen=True)
class Resume:
    """What the user asked for."""

    source: str = "none"
    """none, auto, hub, hub:user/name or hub:user/name@revision, or a path."""
    allow_changed: tuple[str, ...] = ()
    """Settings that may differ from those of the checkpoint."""

    @property
    def is_auto(self) -> bool:
        return self.source == "auto"

    @property
    def is_from_hub(self) -> bool:
        return self.source == "hub" or self.source.startswith("hub:")

    @property
    def is_in_place(self) -> bool:
        """Whether the run goes on in its own directory, whatever it goes on from."""
        return self.is_auto or self.is_from_hub

    @property
    def repository(self) -> tuple[str | None, str | None]:
        """Id and revision of the repository that is named; None for this run's own, and its newest state."""
        name, _, revision = self.source.removeprefix("hub").removeprefix(":").partition("@")
        return (name or None, revision or None) if self.is_from_hub else (None, None)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete, seen over all nodes."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Unusable:
    """A checkpoint that is there and cannot be used."""

    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path} is not used: {self.problem}"

    @property
    def step(self) -> int:
        """-1 for one that was set aside earlier."""
        is_named = manifests.DIRECTORY.fullmatch(self.path.name)
        return manifests.step_number(self.path.name) if is_named else -1


def find(
    engine: Engine, config: RunConfig, resume: Resume, view: HubView = NOTHING_THERE
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest complete checkpoint of what `resume` names, the same on all ranks, and why newer ones are not
    used.

    One that lies on the Hub (`view`) is fetched into the run directory. None where there is nothing to resume. Raises
    `UserError` where there are checkpoints and none can be used, and `TrainingError` if the cause may pass.
    """
    if resume.source == "none":
        return None, []
    if resume.is_in_place:
        return _find_own(engine, config, resume, view)
    path = Path(resume.source).expanduser()
    if any(engine.gather(_may_be_checkpoint(path))):
        problem, manifest = _agreed(engine, path)
        if manifest is None:
            kind = _kind(engine, [Unusable(path, problem)])
            raise kind(f"--resume: {path} cannot be used: {problem}")
        return Checkpoint(path, manifest), []
    passed: list[Unusable] = []
    for root in (path / DIRECTORY, path):
        found, more = _newest(engine, root)
        passed += more
        if found is not None:
            return found, [str(one) for one in passed]
    raise _kind(engine, passed)(
        f"--resume: {path} holds no complete checkpoint{': ' + '; '.join(map(str, passed)) if passed else ''}. Name a "
        f"run directory, or a directory step_… in its {DIRECTORY}/"
    )


def _find_own(engine: Engine, config: RunConfig, resume: Resume, view: HubView) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint of the run directory or of the Hub, whichever is newer, and notes."""
    root = config.output_dir / DIRECTORY
    local, passed = _newest(engine, root, with_set_aside=True)
    notes = [str(one) for one in passed]
    here = local.manifest.step if local else -1
    if resume.is_from_hub:
        _require_states(resume, view, root, here)
    remote = view.states
    if remote is None or not remote.names:
        reason = "the Hub could not be asked whether it holds states of this run" if view.states_problem else ""
        return _local_only(engine, root, local, passed, reason)
    if resume.is_auto and here >= remote.newest_step:
        return local, notes
    if not _is_of_same_run(engine, config, local, remote, passed):
        if resume.is_auto:
            reason = f"the states in {remote.repo_id} are another run's, and not used"
            return _local_only(engine, root, local, passed, reason)
        raise UserError(
            f"--resume {resume.source}: {config.output_dir} holds another run than {remote.repo_id}, and nothing is "
            "overwritten: go on with it (--resume auto), or set --run.output_dir to another directory"
        )
    newest_passed = max((one.step for one in passed), default=-1)
    is_older = resume.is_auto and local is None and remote.newest_step < newest_passed
    if is_older and _kind(engine, passed) is TrainingError:  # what may be readable later is worth waiting for
        return _local_only(engine, root, None, passed, f"the newest state in {remote.repo_id} is older")

    def check(manifest: Manifest) -> None:
        check_settings(manifest, config, resume.allow_changed)

    engine.on_ranks((lambda: _set_aside(passed)) if engine.is_local_main and passed else None)
    path, more = fetch(engine, remote, root, here if resume.is_auto else here - 1, check)
    if path is None:
        if local is None and not passed:
            raise UserError(f"--resume {resume.source}: no state of training can be used: {'; '.join(more)}")
        return _local_only(engine, root, local, passed, *more)
    problem, manifest = _agreed(engine, path)
    if manifest is None:
        raise UserError(f"--resume {resume.source}: {path} cannot be used: {problem}")
    return Checkpoint(path, manifest), notes + more


def _require_states(resume: Resume, view: HubView, root: Path, here: int) -> None:
    """Raise `UserError` unless the Hub has states that are not older than the local checkpoint of step `here`."""
    remote = view.states
    if view.states_problem:
        raise UserError(f"--resume {resume.source}: {view.states_problem}")
    if remote is None or not remote.names:
        raise UserError(f"--resume {resume.source}: there is no state of training on that branch")
    if here > remote.newest_step:
        raise UserError(
            f"--resume {resume.source}: {root} has a newer checkpoint (step {here}) than {remote.repo_id} (step "
            f"{remote.newest_step}): go on with that one (--resume auto), or set --run.output_dir to another directory"
        )


def _local_only(
    engine: Engine, root: Path, local: Checkpoint | None, passed: list[Unusable], *reasons: str
) -> tuple[Checkpoint | None, list[str]]:
    """Return the local checkpoint, if there is one, and notes; `reasons` say why none of the Hub is used.

    Raises `UserError` where there are local checkpoints and none can be used: a run that started over would replace
    them. Raises `TrainingError` instead if the cause may pass.
    """
    notes = [*map(str, passed), *filter(None, reasons)]
    if local is not None or not passed:
        return local, notes
    kind = _kind(engine, passed)
    lines = "\n".join(f"  - {note}" for note in notes)
    remedy = (
        "A disk reports errors that may pass: start the same command again later"
        if kind is TrainingError
        else "Restore one of them from a copy, or make it readable"
    )
    raise kind(
        f"--resume: {root} holds checkpoints, but none of them can be used:\n{lines}\n{remedy}. To start over, set "
        "--run.output_dir to another directory. Nothing was overwritten"
    )


def _kind(engine: Engine, passed: Iterable[Unusable]) -> type[UserError]:
    """Return the kind of error for checkpoints that cannot be used, the same on all ranks: `TrainingError` if a disk
    reports an error that may pass."""
    passes = engine.is_local_main and any(_read_error(one.path) in PASSING for one in passed)
    return TrainingError if any(engine.gather(passes)) else UserError


def _read_error(path: Path) -> int | None:
    """Return the number of the error with which reading the files of a checkpoint fails; None if it does not."""
    try:
        for file in sorted(path.iterdir()):
            with file.open("rb") as content:
                while content.read(2**24):
                    pass
    except OSError as error:
        return error.errno
    return None


def _set_aside(passed: Iterable[Unusable]) -> None:
    """Rename checkpoints that cannot be used, so that none from the Hub replaces them."""
    for one in passed:
        with contextlib.suppress(FileNotFoundError):  # on another node, or set aside by another process
            if one.step >= 0:
                set_aside(one.path)


def _is_of_same_run(
    engine: Engine, config: RunConfig, local: Checkpoint | None, remote: RemoteStates, passed: list[Unusable]
) -> bool:
    """Return whether states of `remote` may be put into the run directory."""
    same = True

    def on_main() -> None:
        nonlocal same
        if local is None and not passed:
            if not is_same_run(config):
                require_free(config.output_dir)
            return
        theirs, known = run_of(remote), [read_status(config.output_dir).get("run")]
        if local is not None:
            known.append(local.manifest.run_id)
        same = theirs is not None and theirs in known

    engine.on_main(on_main)
    return engine.broadcast(same)


def _newest(engine: Engine, root: Path, *, with_set_aside: bool = False) -> tuple[Checkpoint | None, list[Unusable]]:
    """Return the newest checkpoint in `root` that can be used, and the newer ones that cannot; the same on all ranks.

    `with_set_aside`: where there are no others, those that were set aside earlier are among the latter. Raises
    `UserError` if `root` cannot be read, and `TrainingError` if that may pass.
    """
    own: list[str] = []
    aside: list[str] = []
    failure: tuple[str, bool] | None = None
    if engine.is_local_main:
        try:
            own = step_directories(root)
            if with_set_aside and root.is_symlink() and not root.exists():
                raise FileNotFoundError(errno.ENOENT, f"it links to {root.readlink()}, which is not there")
            if with_set_aside and not own and root.exists():
                aside = [path.name for path in root.iterdir() if path.name.startswith(ASIDE)]
        except OSError as error:
            failure = f"{root}: cannot be read: {error.strerror or error}", error.errno in PASSING
    answers = engine.gather((own, aside, failure))
    for _, _, problem in answers:
        if problem is not None:
            raise (TrainingError if problem[1] else UserError)(problem[0])
    passed: list[Unusable] = []
    for name in sorted({name for found, _, _ in answers for name in found}, key=manifests.step_number, reverse=True):
        problem, manifest = _agreed(engine, root / name)
        if manifest is not None:
            return Checkpoint(root / name, manifest), passed
        passed.append(Unusable(root / name, problem))
    if not passed:
        names = sorted({name for _, found, _ in answers for name in found})
        passed = [Unusable(root / name, "it was set aside when it could not be used") for name in names]
    return None, passed


def _may_be_checkpoint(path: Path) -> bool:
    """Return whether `path` holds a manifest, or that cannot be seen."""
    try:
        return (path / manifests.NAME).is_file()
    except OSError:
        return True


def _agreed(engine: Engine, path: Path) -> tuple[str, Manifest | None]:
    """Return what is wrong with a checkpoint, or its manifest if all its files are there, on any node, and unchanged.

    Raises `UserError` for one of a newer version.
    """
    problem: str | None = None
    manifest: Manifest | None = None
    present: set[str] = set()
    refused: str | None = None
    if engine.is_local_main:
        try:
            if path.is_dir():
                manifest = Manifest.read(path)
                problem = damage(path, manifest, may_be_missing=True)
                present = {name for name in manifest.files if (path / name).is_file()}
        except DamagedError as error:
            problem = str(error)
        except UserError as error:
            refused = str(error)
        except OSError as error:
            problem = f"{error.filename or path} cannot be read: {error.strerror or error}"
    answers = engine.gather((problem, manifest, present, refused))
    for _, _, _, text in answers:
        if text is not None:
            raise UserError(text)
    for text, *_ in answers:
        if text is not None:
            return text, None
    seen = [found for _, found, _, _ in answers if found is not None]
    if not seen:
        return "it is not there", None
    if any(found.files != seen[0].files for found in seen):
        return "the nodes have different ones", None
    missing = sorted(set(seen[0].files) - set().union(*(names for _, _, names, _ in answers)))
    return (f"{listing(missing)} is missing", None) if missing else ("", seen[0])


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Make weights and moments those of `checkpoint`. A step has to have been done before. Raises `UserError` when
    they are not those of this model."""
    specs = tensor_specs(engine.strategy.plain_model())
    expected = {key: tuple(spec.shape) for key, spec in specs.items()}
    problem, shards = None, None
    try:
        shards = Shards(checkpoint.path, checkpoint.manifest)
    except DamagedError as error:
        problem = str(error)
    own = {key: tuple(pieces) for key, pieces in shards.pieces.items()} if shards else {}
    answers = engine.gather((problem, own, bool(shards and shards.missing)))
    for text, *_ in answers:
        if text is not None:
            raise UserError(f"{checkpoint.path}: {text}")
    assert shards is not None
    _require_same(checkpoint.path, shards, specs)
    holders: dict[str, dict[tuple[int, int, str, str], int]] = {}  # tensor -> piece -> the first rank that has it
    for rank, (_, pieces_of, _) in enumerate(answers):
        for key, pieces in pieces_of.items():
            for piece in pieces:
                holders.setdefault(key, {}).setdefault(piece, rank)
    incomplete = gap(shards.shapes, {key: [piece[:2] for piece in pieces] for key, pieces in holders.items()})
    if incomplete:
        raise UserError(f"{checkpoint.path}: its shards do not make up {incomplete}")
    if not any(lacks for _, _, lacks in answers):
        restore(engine.strategy, shards.read)
        return

    def from_all_nodes(key: str) -> Tensor:
        """Each piece from a rank whose node has it."""
        parts = []
        for (_, count, file, stored), rank in sorted(holders[key].items()):
            if rank == engine.rank:
                part = shards.piece(file, stored).flatten().to(engine.device, torch.float32)
            else:
                part = torch.empty(count, device=engine.device)  # float32, as all but a few small buffers are
            dist.broadcast(part, rank)
            parts.append(part)
        return torch.cat(parts).view(expected[key]).cpu()

    restore(engine.strategy, from_all_nodes)


def _require_same(path: Path, shards: Shards, expected: dict[str, TensorSpec]) -> None:
    """Raise `UserError` unless the tensors of the checkpoint are those of the model."""
    stored = shards.shapes
    missing, other = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    differing = [
        f"{key} {stored[key]}"
        for key in sorted(stored.keys() & expected.keys())
        if stored[key] != tuple(expected[key].shape)
    ]
    differing += [
        f"{key} {dtype} instead of {expected[key].dtype}"
        for key, dtype in sorted(shards.dtypes.items())
        if key in expected and dtype != expected[key].dtype
    ]
    if missing or other or differing:
        found = [
            f"{what} ({listing(names)})"
            for what, names in (
                ("tensors missing", missing),
                ("unknown ones", other),
                ("other shapes or types", differing),
            )
            if names
        ]
        raise UserError(f"{path}: is of another model: {', '.join(found)}")
