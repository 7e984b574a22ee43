"""`qa-dist hub check` and `qa-dist hub push`: the Hub without training."""

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from qa_dist.checkpoint.hub import MAIN, Repository
from qa_dist.checkpoint.hub_client import HubError
from qa_dist.checkpoint.manifest import DamagedError, damage
from qa_dist.checkpoint.publication import Identity, read_pointer
from qa_dist.checkpoint.pull import states
from qa_dist.checkpoint.store import Found, checkpoints
from qa_dist.config import RunConfig
from qa_dist.errors import NotPushedError, UserError
from qa_dist.reporting.run_directory import METRICS, RunDirectory
from qa_dist.reporting.run_lock import require_ended
from qa_dist.reporting.status import read_status
from qa_dist.training.hub_view import patiently
from qa_dist.training.publishing import Publisher
from qa_dist.training.resume import DIRECTORY

SILENT_MINUTES = 10
Say = Callable[[str], None]


def check(config: RunConfig, say: Say) -> int:
    """Tell what a run would find, and create nothing. Returns the exit code: 2 where it could not push.

    Raises `UserError` where that cannot be found out.
    """
    repo_id = _repo_id(config)
    repository = Repository(repo_id)
    try:
        access = patiently(repository.access)
        say(f"Hub: {repository.url}, as {access.user}")
        if access.head is None:
            kind = "private" if config.hub.private else "public"
            say(f"repository: is not there; a run would make a {kind} one")
        else:
            say(f"repository: is there, {'private' if access.is_private else 'public'}")
            model = read_pointer(repository, access.head)
            say(f"{MAIN}: {f'model of step {model.step}, run {model.run}' if model else 'no model of a run yet'}")
            found = states(repository, config.hub.branch)
            names = ", ".join(found.names) if found and found.names else "no state of training yet"
            say(f"{config.hub.branch}: {names}")
    except (HubError, DamagedError) as error:
        raise UserError(f"hub.repo_id: {repo_id}: {error}") from None
    say("nothing is wrong" if access.problem is None else f"problem: {access.problem}")
    return 0 if access.problem is None else 2


def push(path: Path, config: RunConfig, say: Say) -> int:
    """Push the newest checkpoint and the model of the run directory `path`, and wait until they are there.

    Raises `UserError` for what is not a finished run's directory, and `NotPushedError`.
    """
    repo_id = _repo_id(config)
    require_ended(path, say)
    _require_silent(path)
    status = read_status(path)
    if not isinstance(status.get("run"), str) or not status["run"]:
        raise UserError(f"{path}: its status.json names no run, so it cannot be told whose it is; nothing is pushed")
    repository = Repository(repo_id)
    try:
        if problem := patiently(repository.access).problem:
            raise UserError(f"hub.repo_id: {repo_id}: {problem}")
        patiently(lambda: repository.create(private=config.hub.private))
    except HubError as error:
        raise NotPushedError(f"{repo_id}: {error}") from None
    run = RunDirectory(path, is_main=True)
    newest = next((one for one in checkpoints(path / DIRECTORY) if one.manifest is not None), None)
    step = newest.step if newest else 0
    identity = Identity(status["run"], step=step, is_settled=False)
    with contextlib.closing(Publisher(config.hub, run, identity)) as publisher:
        publisher.publication.skips_unchanged = True

        def tell() -> None:
            for text in [*(str(event) for event in publisher.events()), *publisher.notes()]:
                say(text)

        missing = _offer(path, newest, publisher)
        started = time.monotonic()
        summary = publisher.finish(config.hub.drain_timeout, lambda: False, tell)
        tell()
    assert summary is not None
    missing += [f"{name}: {why}" for name, why in summary.missing.items()]
    if missing:
        raise NotPushedError(f"{repo_id}: {'; '.join(missing)}")
    say(f"{summary} to {repository.url} in {math.ceil(time.monotonic() - started)} s")
    if status.get("exit_code") == NotPushedError.exit_code:
        run.write_json("status.json", status | {"exit_code": 0, "reason": "", "hub": run.hub})
    return 0


def _require_silent(path: Path) -> None:
    """Raise `UserError` for a run that seems to go on on another machine, where one cannot see whether it is alive."""
    if read_status(path).get("state") != "running":
        return
    times = [file.stat().st_mtime for name in (METRICS, "status.json") if (file := path / name).is_file()]
    minutes = (time.time() - max(times)) / 60
    if minutes < SILENT_MINUTES:
        raise UserError(
            f"{path}: its run was at work {minutes:.0f} minutes ago on {read_status(path).get('host')}; stop it first, "
            f"or wait until it has been silent for {SILENT_MINUTES} minutes"
        )


def _offer(path: Path, newest: Found | None, publisher: Publisher) -> list[str]:
    """Hand over what the run directory ends with. Returns what of it cannot be pushed from here, and why."""
    missing = []
    has_model = (path / "model" / "config.json").is_file()
    if newest is None and not has_model:
        raise UserError(f"{path}: holds neither a checkpoint nor a model; name a run directory")
    if newest is not None and newest.manifest is not None:
        if problem := damage(newest.path, newest.manifest, may_be_missing=True):
            raise UserError(f"{newest.path}: {problem}; nothing is pushed")
        if any(not (newest.path / name).is_file() for name in newest.manifest.files):
            missing.append(
                f"state of step {newest.step}: its shards lie on several nodes; start the training command again, on "
                "all of them, with --resume auto"
            )
        else:
            publisher.offer_state(newest.path, newest.manifest)
    if has_model:
        try:
            metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
            row = next(row for row in metrics["history"] if row["epoch"] == metrics["epoch"])
            publisher.offer_model(int(row["step"]), int(row["epoch"]))
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            missing.append("the model: metrics.json does not say of which step it is")
    return missing


def _repo_id(config: RunConfig) -> str:
    if config.hub.repo_id is None:
        raise UserError("hub.repo_id: is not set; name a repository (--hub.repo_id user/name)")
    return config.hub.repo_id
