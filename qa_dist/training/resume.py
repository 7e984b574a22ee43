"""Going on where an earlier run was: which checkpoint, whether it fits, and how its tensors come back."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from qa_dist.checkpoint import manifest as manifests
from qa_dist.checkpoint.manifest import DamagedError, Manifest, TensorSpec, damage
from qa_dist.checkpoint.pull import RemoteStates
from qa_dist.checkpoint.state import restore, tensor_specs
from qa_dist.checkpoint.store import Shards, gap, step_directories
from qa_dist.config import RunConfig
from qa_dist.errors import UserError, listing
from qa_dist.reporting.run_directory import require_free
from qa_dist.reporting.status import read_status
from qa_dist.training.changes import check_settings, is_same_run
from qa_dist.training.engine import Engine
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


def find(
    engine: Engine, config: RunConfig, resume: Resume, view: HubView = NOTHING_THERE
) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of what `resume` names, and why newer ones are not used; the same on all ranks.

    One that lies on the Hub (`view`) is fetched into the run directory. None where there is nothing to resume. Raises
    `UserError` for a path or a repository that holds no checkpoint that can be used.
    """
    if resume.source == "none":
        return None, []
    if resume.is_in_place:
        return _find_own(engine, config, resume, view)
    path = Path(resume.source).expanduser()
    if any(engine.gather((path / manifests.NAME).is_file())):
        problem, manifest = _agreed(engine, path)
        if manifest is None:
            raise UserError(f"--resume: {path} cannot be used: {problem}")
        return Checkpoint(path, manifest), []
    for root in (path / DIRECTORY, path):
        found, notes = _newest(engine, root)
        if found is not None:
            return found, notes
    raise UserError(
        f"--resume: {path} holds no complete checkpoint{': ' + '; '.join(notes) if notes else ''}. Name a run "
        f"directory, or a directory step_… in its {DIRECTORY}/"
    )


def _find_own(engine: Engine, config: RunConfig, resume: Resume, view: HubView) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of the run directory or of the Hub, whichever is newer."""
    root = config.output_dir / DIRECTORY
    local, notes = _newest(engine, root)
    here = local.manifest.step if local else -1
    remote = view.states
    if resume.is_from_hub and view.states_problem:
        raise UserError(f"--resume {resume.source}: {view.states_problem}")
    if remote is None or not remote.names:
        if resume.is_from_hub:
            raise UserError(f"--resume {resume.source}: there is no state of training on that branch")
        if view.states_problem and local is None:
            notes.append("the Hub could not be asked whether it holds states of this run, so the run starts anew")
        return local, notes
    if resume.is_from_hub and here > remote.newest_step:
        raise UserError(
            f"--resume {resume.source}: {root} has a newer checkpoint (step {here}) than {remote.repo_id} (step "
            f"{remote.newest_step}): go on with that one (--resume auto), or set --run.output_dir to another directory"
        )
    if resume.is_auto and here >= remote.newest_step:
        return local, notes
    if not _is_of_same_run(engine, config, local, remote):
        if resume.is_auto:
            notes.append(f"the states in {remote.repo_id} are another run's, and not used")
            return local, notes
        raise UserError(
            f"--resume {resume.source}: {config.output_dir} holds another run than {remote.repo_id}, and nothing is "
            "overwritten: go on with it (--resume auto), or set --run.output_dir to another directory"
        )

    def check(manifest: Manifest) -> None:
        check_settings(manifest, config, resume.allow_changed)

    path, more = fetch(engine, remote, root, here if resume.is_auto else here - 1, check)
    if path is None and local is None:
        raise UserError(f"--resume {resume.source}: no state of training can be used: {'; '.join(more)}")
    if path is None:
        return local, notes + more
    problem, manifest = _agreed(engine, path)
    if manifest is None:
        raise UserError(f"--resume {resume.source}: {path} cannot be used: {problem}")
    return Checkpoint(path, manifest), notes + more


def _is_of_same_run(engine: Engine, config: RunConfig, local: Checkpoint | None, remote: RemoteStates) -> bool:
    """Whether states of `remote` may be put into the run directory."""
    same = True

    def on_main() -> None:
        nonlocal same
        if local is None:
            if not is_same_run(config):
                require_free(config.output_dir)
            return
        theirs = run_of(remote)
        same = theirs is not None and theirs in (
            local.manifest.run_id,
            read_status(config.output_dir).get("run"),
        )

    engine.on_main(on_main)
    return engine.broadcast(same)


def _newest(engine: Engine, root: Path) -> tuple[Checkpoint | None, list[str]]:
    notes: list[str] = []
    own: list[str] = []
    problem: str | None = None
    if engine.is_local_main:
        try:
            own = step_directories(root)
        except OSError as error:
            problem = f"{root}: cannot be read: {error.strerror}"
    answers = engine.gather((own, problem))
    for _, text in answers:
        if text is not None:
            raise UserError(text)
    names = sorted({name for found, _ in answers for name in found}, reverse=True)
    for name in names:
        problem, manifest = _agreed(engine, root / name)
        if manifest is not None:
            return Checkpoint(root / name, manifest), notes
        notes.append(f"{root / name} is not used: {problem}")
    return None, notes


def _agreed(engine: Engine, path: Path) -> tuple[str, Manifest | None]:
    """What is wrong with a checkpoint, or its manifest if all its files are there, on any node, and unchanged."""
    problem: str | None = None
    manifest: Manifest | None = None
    present: set[str] = set()
    refused: str | None = None
    if engine.is_local_main and path.is_dir():
        try:
            manifest = Manifest.read(path)
            problem = damage(path, manifest, may_be_missing=True)
            present = {name for name in manifest.files if (path / name).is_file()}
        except DamagedError as error:
            problem = str(error)
        except UserError as error:
            refused = str(error)
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
