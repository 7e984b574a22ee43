"""A run from beginning to end: the processes joined, everything loaded, and the run directory that tells the story."""

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from qa_dist.checkpoint.publication import Identity, new_id
from qa_dist.checkpoint.store import recover, tidy
from qa_dist.config import RunConfig
from qa_dist.config_sources import to_yaml
from qa_dist.errors import TrainingError
from qa_dist.launch_directory import LaunchDirectory, conclude
from qa_dist.reporting.run_directory import RunDirectory
from qa_dist.reporting.status import read_status
from qa_dist.reporting.tracker import Tracker, announce, summary_table
from qa_dist.tasks import load_task
from qa_dist.tasks.task import FeatureSet, Task
from qa_dist.training.changes import (
    check_data,
    check_model,
    check_settings,
    check_validation,
    is_same_run,
    launch_notes,
    schema_notes,
)
from qa_dist.training.checkpointer import Digests
from qa_dist.training.engine import Engine, is_lost_connection, is_out_of_memory
from qa_dist.training.evaluation import evaluate
from qa_dist.training.health import FlopsPerWindow
from qa_dist.training.hub_view import HubView
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.loop import Training
from qa_dist.training.micro_batch import micro_batch_size
from qa_dist.training.models import build_model
from qa_dist.training.next_steps import after_completion, after_stop, command_of_this_process
from qa_dist.training.preemption import StopRequest, sources_for
from qa_dist.training.publishing import Publisher
from qa_dist.training.resume import DIRECTORY, Checkpoint, Resume, find
from qa_dist.training.watchdog import Watchdog

OTHERS_SECONDS = 3.0
"""How long the other processes of a machine wait with their report. The launcher ends them once the first process has
reported and ended, unless that one is frozen."""


def train(config: RunConfig, launch: LaunchEnvironment, resume: Resume) -> None:
    """Train and evaluate as `config` says, and leave the results in the run directory.

    Raises `UserError` for what the user can mend, and `StoppedError` after a signal.
    """
    with _session(config, launch, resume, trains=True) as session:
        engine, run, checkpoint = session.engine, session.run, session.checkpoint
        parts = _load(config, session, ("train", "validation"))
        digests = Digests(parts.sets["train"].digest(), _validation_digest(engine, parts.sets.get("validation")))
        compares = checkpoint is None or _check(checkpoint, config, session, parts, digests, resume.allow_changed)
        size, notes = micro_batch_size(config.train, engine, parts.task, parts.model, parts.sets["train"])
        for note in notes:
            parts.tracker.say(note)
        flops = FlopsPerWindow.of(parts.model)
        engine.prepare(parts.model, config, checkpoint.manifest.optimizer.fused if checkpoint else None)
        nodes = max(launch.world_size // max(launch.local_world_size, 1), 1)
        several = config.hub.repo_id is not None and engine.max(nodes) > 1
        store = engine.store if several else None
        with contextlib.closing(Publisher(config.hub, run, session.identity, store)) as publisher:
            training = Training(
                config,
                engine,
                parts.task,
                run,
                parts.tracker,
                session.stop,
                parts.sets,
                size,
                flops,
                digests,
                publisher,
            )
            if checkpoint is not None:
                engine.watchdog.phase(f"going on from {checkpoint.path}")
                in_place = _is_in(checkpoint, config)
                training.resume(checkpoint, in_place=in_place, compares=compares)
                kept = checkpoint.manifest.metrics_bytes if in_place else 0
                state = checkpoint.path if in_place else None
                engine.on_main(lambda: run.go_on(to_yaml(config), kept, state))
                if in_place:
                    training.catch_up(checkpoint, session.view)
            training.fit()


def _check(
    checkpoint: Checkpoint,
    config: RunConfig,
    session: "_Session",
    parts: "_Parts",
    digests: Digests,
    allowed: Sequence[str],
) -> bool:
    """Return whether scores of the checkpoint compare with later ones. Raises `UserError` unless data and model are
    those of the checkpoint, as far as they are not `allowed` to change."""
    path, manifest = checkpoint.path, checkpoint.manifest
    parts.tracker.say(f"going on from {path} (step {manifest.step})")
    check_data(manifest, digests.train, allowed, path.parent)
    compares = check_validation(manifest, digests.validation, config, allowed)
    if not compares:
        parts.tracker.say("changed: validation data or settings of the evaluation. Scores before are not compared")
    plain: Any = parts.model
    check_model(session.engine, path, manifest, plain.config, config, allowed)
    return compares


def _validation_digest(engine: Engine, features: FeatureSet | None) -> str | None:
    """Return the digest of the validation data, computed once and the same on all ranks."""
    digest: str | None = None

    def compute() -> None:
        nonlocal digest
        digest = features.evaluation_digest() if features is not None else None

    engine.on_main(compute)
    return engine.broadcast(digest)


def _is_in(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Whether the checkpoint lies in the run's own directory."""
    return checkpoint.path.absolute().parent == (config.output_dir / DIRECTORY).absolute()


def evaluate_only(config: RunConfig, launch: LaunchEnvironment, split: str = "validation") -> None:
    """Evaluate a trained model, and leave metrics and predictions in the run directory; of data without labels the
    predictions alone. Raises as `train` does."""
    with _session(config, launch, Resume()) as session:
        engine, run = session.engine, session.run
        parts = _load(config, session, (split,))
        engine.prepare_for_evaluation(parts.model, config)
        score = evaluate(engine, parts.task, parts.sets[split], config.evaluation.batch_size, session.stop)

        def write() -> None:
            if score.metrics:
                run.write_json("metrics.json", score.metrics)
            for name, content in score.files.items():
                run.write_json(name, content)

        engine.on_main(write)
        if score.metrics:
            parts.tracker.log_figures(score.metrics)
        parts.tracker.say("\n".join([f"done: {run.path}", *after_completion(run.path)]))


class _Session(NamedTuple):
    engine: Engine
    run: RunDirectory
    stop: StopRequest
    checkpoint: Checkpoint | None
    """What to go on from."""
    view: HubView
    identity: Identity | None
    """Who pushes; on the main process of a run that does."""
    notes: list[str]
    """What to say about that."""


@contextlib.contextmanager
def _session(
    config: RunConfig, launch: LaunchEnvironment, resume: Resume, *, trains: bool = False
) -> Iterator[_Session]:
    """The processes joined, signals listened to, a run directory that will tell how the run ends, what to resume."""
    run = RunDirectory(config.output_dir, launch.is_main)
    stop = StopRequest()
    limits = 60 * config.run.timeout_minutes, 60 * config.run.step_timeout_minutes
    watchdog = Watchdog(launch.rank, launch.world_size, *limits)
    listening = stop.listening(sources_for(config, launch.is_main))
    with (
        _explained(),
        contextlib.closing(run),
        listening,
        watchdog.watching(partial(_give_up, config, launch, run, trains)),
    ):
        engine = Engine(launch, config.run.timeout_minutes, watchdog)
        engine.require_same(engine.description, "engine and precision")
        engine.on_main(lambda: run.claim(announce))
        root = config.output_dir / DIRECTORY
        engine.on_ranks((lambda: recover(root)) if resume.is_in_place and engine.is_local_main else None)
        view = HubView()
        if trains and (config.hub.repo_id is not None or resume.is_from_hub):
            view = HubView.look(engine, config, *resume.repository)
        checkpoint, notes = find(engine, config, resume, view)
        if view.problem:
            notes.append(f"hub: {view.problem}. Training starts, and pushing is tried all the same")
        goes_on = checkpoint is not None and _is_in(checkpoint, config)
        if checkpoint is not None:
            manifest, beside = checkpoint.manifest, checkpoint.path.parent
            changes = check_settings(manifest, config, resume.allow_changed, beside)
            changes += launch_notes(manifest, engine.launch)
            notes += [f"changed: {note}" for note in changes]
            notes += schema_notes(manifest)
            run.step = checkpoint.manifest.step
        is_own = goes_on or (checkpoint is None and resume.is_in_place and is_same_run(config))
        is_fork = resume.repository[0] not in (None, config.hub.repo_id)
        run.id = engine.broadcast(_run_id(config, checkpoint, is_own, is_fork))
        identity: Identity | None = None

        def identify() -> None:
            nonlocal identity
            if trains and config.hub.repo_id is not None:
                identity = view.identity(config, run.id, checkpoint.manifest.step if checkpoint else 0)

        engine.on_main(identify)
        engine.on_main(lambda: run.open(to_yaml(config), engine.description, is_own=is_own, goes_on=goes_on))
        if engine.is_local_main:
            tidy(root)
        with run.recorded(), _explained():
            yield _Session(engine, run, stop, checkpoint, view, identity, notes)
    engine.close()


def _give_up(config: RunConfig, launch: LaunchEnvironment, run: RunDirectory, trains: bool, reason: str) -> None:
    """Record and report that the run hangs, before the process ends."""
    conclude(1, reason)
    run.fail(reason)
    if LaunchDirectory.of_this_process() is not None:  # the launcher reports it
        return
    if launch.local_rank != 0:
        time.sleep(OTHERS_SECONDS)
    for line in after_stop(config.output_dir, command_of_this_process()) if trains else ():
        announce(f"qa-dist: {line}")
    announce(f"[{socket.gethostname()}, rank {launch.rank}] {reason}")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Errors of libraries that say what has happened to a run, in its words: as `TrainingError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the memory of the GPU does not suffice: {str(error).split('. ')[0]}. Set train.micro_batch_size to auto "
            "or lower it, set train.gradient_checkpointing, or divide the model (such as with "
            "configs/accelerate/zero2.yaml)"
        ) from None
    except (RuntimeError, MemoryError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        if is_out_of_memory(error):
            raise TrainingError(
                f"the memory of this machine does not suffice ({first_line[:200]}). Give the job more, start fewer "
                "processes on a machine, or lower evaluation.batch_size or train.micro_batch_size"
            ) from None
        if isinstance(error, RuntimeError) and is_lost_connection(error):
            raise TrainingError(
                "another process of this run is gone: killed, out of memory, or failed; see what it or its node's log "
                f"says ({first_line})"
            ) from None
        raise


def _run_id(config: RunConfig, checkpoint: Checkpoint | None, is_own: bool, is_fork: bool) -> str:
    """That of the run that goes on, or a new one. `is_fork`: the state is of another repository than this run's."""
    if not is_own:
        return new_id()  # what goes on elsewhere from another run's state is another run
    before = [read_status(config.output_dir).get("run")]
    if checkpoint is not None and not is_fork:
        before.append(checkpoint.manifest.run_id)
    return next((name for name in before if isinstance(name, str) and name), new_id())


class _Parts(NamedTuple):
    task: Task
    sets: dict[str, FeatureSet]
    model: torch.nn.Module
    tracker: Tracker


def _load(config: RunConfig, session: _Session, splits: tuple[str, ...]) -> _Parts:
    """The task, the features of `splits` and the model, the same on all ranks."""
    engine, stop = session.engine, session.stop
    task = engine.local_main_first(lambda: load_task(config))
    sets: dict[str, FeatureSet] = {}
    for split in splits:
        engine.watchdog.phase(f"preparing the {split} data")
        stop.raise_if_any(engine)
        features = engine.local_main_first(lambda split=split: task.features(split))
        key = (features.fingerprint or features.digest()) if features is not None else ""
        engine.require_same(key, f"the {split} features")
        if features is not None:
            sets[split] = features
    engine.watchdog.phase("loading the model")
    model, notes = engine.local_main_first(lambda: build_model(config, task, trained="train" not in splits))
    if config.model.attention == "varlen":
        notes += engine.use_packed_attention(model)
    stop.raise_if_any(engine)
    tracker = Tracker(session.run, task.headline)
    if engine.is_main and LaunchDirectory.of_this_process() is None:  # else the launcher says it
        stop.say = tracker.say
    for note in session.notes:
        tracker.say(f"note: {note}")
    _introduce(tracker, engine, model, notes, sets)
    return _Parts(task, sets, model, tracker)


def _introduce(
    tracker: Tracker, engine: Engine, model: torch.nn.Module, notes: list[str], sets: dict[str, FeatureSet]
) -> None:
    if not engine.is_main:
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tracker.say(f"{engine.description}; {parameters / 1e6:.1f} M parameters")
    for note in notes:
        tracker.say(f"model: {note}")
    tracker.console.print(summary_table(sets))
    for split, features in sets.items():
        for note in features.notes:
            tracker.say(f"{split}: note: {note}")
