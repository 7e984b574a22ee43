"""What may differ between a checkpoint and the run that resumes it: settings, data, the model and the batches."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from qa_dist.checkpoint.manifest import SCHEMA_VERSION, Launch, Manifest
from qa_dist.checkpoint.progress import Progress
from qa_dist.checkpoint.store import checkpoints
from qa_dist.config import BATCHING, FREE_TO_CHANGE, RunConfig
from qa_dist.errors import UserError, listing
from qa_dist.reporting.status import read_status
from qa_dist.training.engine import Engine

ORIGIN = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Keys of a model's config that say where the model comes from, not what it computes."""


def is_same_run(config: RunConfig) -> bool:
    """Return whether the run directory holds an unfinished attempt at this very run, which may be started again."""
    try:
        before = yaml.safe_load((config.output_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(before, dict) or read_status(config.output_dir).get("state") == "completed":
        return False
    return not _changes(before, config.model_dump(mode="json"))[1]


def check_settings(
    manifest: Manifest, config: RunConfig, allowed: Iterable[str], beside: Path | None = None
) -> list[str]:
    """Return notes on the settings that have changed since the checkpoint.

    `beside` is the directory with the run's other checkpoints. Raises `UserError` for a change that would alter the
    training and is not in `allowed`, and for one that is not possible in the middle of an epoch.
    """
    values = config.model_dump(mode="json")
    before, now = _leaves(manifest.config), _leaves(values)
    changed, refused = _changes(manifest.config, values, allowed)
    # with a bound on tokens, the number of batches depends on the order of the examples
    batching = (*BATCHING, "train.seed") if config.train.tokens_per_batch else BATCHING
    require_whole_epoch(manifest, [key for key in changed if key in batching], beside)
    if "train.epochs" in changed and config.train.epochs < manifest.epoch and not is_end_of_epoch(manifest.progress):
        raise UserError(
            f"train.epochs: is {config.train.epochs}, and the checkpoint of step {manifest.step} lies in epoch "
            f"{manifest.epoch}; set it to at least {manifest.epoch}{_whole_epoch_beside(beside)}"
        )
    if refused:
        lines = "\n".join(f"  - {key}: {before.get(key)} then, {now.get(key)} now" for key in refused)
        raise UserError(
            f"the checkpoint of step {manifest.step} was trained with other settings:\n{lines}\nSet them back, or say "
            f"that it is meant: --allow_changed {','.join(refused)}"
        )
    notable = [key for key in changed if key.split(".")[0] not in ("run", "checkpoint")]
    return [f"{key}: {before.get(key)} before, {now.get(key)} now" for key in notable]


def schema_notes(manifest: Manifest) -> list[str]:
    """Return a note for the user where the manifest is of an earlier schema."""
    if manifest.schema_version == SCHEMA_VERSION:
        return []
    return [
        f"the checkpoint of step {manifest.step} was written by an earlier version of qa_dist (schema "
        f"{manifest.schema_version}), whose manifest is not protected against changes"
    ]


def launch_notes(manifest: Manifest, launch: Launch) -> list[str]:
    """Return notes on what of strategy, precision, processes and device has changed since the checkpoint."""
    before, now = manifest.launch.model_dump(), launch.model_dump()
    return [f"{key.replace('_', ' ')}: {before[key]} before, {now[key]} now" for key in now if before[key] != now[key]]


def is_end_of_epoch(progress: Progress) -> bool:
    """Return whether a checkpoint with these counters has no batch of its epoch left to do."""
    return progress.batches_done in (0, progress.batches_in_epoch)


def require_whole_epoch(manifest: Manifest, changed: list[str], beside: Path | None = None) -> None:
    """Raise `UserError` if the batches of the epoch have `changed` and a part of them is done: which examples are left
    could not be told. The message names a checkpoint among those in `beside` that can be resumed instead."""
    if not changed or is_end_of_epoch(manifest.progress):
        return
    done, total = manifest.progress.batches_done, manifest.progress.batches_in_epoch
    raise UserError(
        f"{listing(changed)}: changed, but batches can only change at the end of an epoch. The checkpoint of step "
        f"{manifest.step} was written after {done}{f' of the {total}' if total else ''} batches of epoch "
        f"{manifest.epoch}. Undo the change{_whole_epoch_beside(beside)}"
    )


def _whole_epoch_beside(root: Path | None) -> str:
    """Return the end of a message: how to resume from the end of an epoch instead."""
    found = checkpoints(root) if root is not None else []
    whole = next((one for one in found if one.manifest and is_end_of_epoch(one.manifest.progress)), None)
    if whole is None:
        return ", or train to the end of the epoch first (checkpoint.every '1 epoch' writes a checkpoint there)"
    return f", or resume from the end of an epoch in another run.output_dir: --resume {whole.path}"


def _changes(before: dict[str, Any], now: dict[str, Any], allowed: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Return the settings that differ: all of them, and those that may not."""
    then, today = _leaves(before), _leaves(now)
    changed = [key for key in sorted(then.keys() | today.keys()) if then.get(key) != today.get(key)]
    free = (*FREE_TO_CHANGE, *allowed)
    return changed, [key for key in changed if not any(key == name or key.startswith(f"{name}.") for name in free)]


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in ("model.config", "data.columns"):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def check_model(
    engine: Engine,
    directory: Path,
    manifest: Manifest,
    model_config: PretrainedConfig,
    config: RunConfig,
    allowed: Iterable[str],
) -> None:
    """Raise `UserError` unless the model's own config is that of the checkpoint: tensors of the same shapes may belong
    to another dropout or activation."""
    now = json.loads(model_config.to_json_string(use_diff=False))
    before = next((found for found in engine.gather(_json(directory / "config.json")) if found is not None), now)
    differing = [
        f"{key}: {before[key]} then, {now[key]} now"
        for key in sorted(before.keys() & now.keys())
        if key not in ORIGIN and before[key] != now[key]
    ]
    # the config that is written in the settings is the model's own config
    words = {"model", "model.config"} if config.model.config is not None else {"model"}
    if differing and words.isdisjoint(allowed):
        raise UserError(
            f"the checkpoint of step {manifest.step} is of another model: {listing(differing)}. Name the same one, or "
            "say that it is meant: --allow_changed model"
        )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def check_data(manifest: Manifest, digest: str, allowed: Iterable[str], beside: Path | None = None) -> None:
    """Raise `UserError` unless the training data are those of the checkpoint, or may have changed and the checkpoint
    lies at the end of an epoch."""
    if manifest.data == digest:
        return
    if "data" not in allowed:
        raise UserError(
            f"the checkpoint of step {manifest.step} was trained on other data: the windows, their tokens or their "
            "labels differ. Name the same files, or say that it is meant: --allow_changed data"
        )
    require_whole_epoch(manifest, ["the training data"], beside)


def check_validation(manifest: Manifest, digest: str | None, config: RunConfig, allowed: Iterable[str]) -> bool:
    """Return whether scores of this run compare with those found before the checkpoint: whether validation data and
    the settings of the evaluation are the same.

    `digest` is that of the validation data; None where there are none. Raises `UserError` for other validation data
    that `allowed` does not name.
    """
    if manifest.validation is not None and manifest.validation != digest:
        if {"data", "data.validation_file"}.isdisjoint(allowed):
            what = "there are no validation data now" if digest is None else "their content has changed"
            raise UserError(
                f"the checkpoint of step {manifest.step} was evaluated on other validation data ({what}), so later "
                "scores would not compare with earlier ones. Name the same data, or say that it is meant: "
                "--allow_changed data.validation_file"
            )
        return False
    changed, _ = _changes(manifest.config, config.model_dump(mode="json"))
    return not any(key.startswith("evaluation.") and key not in FREE_TO_CHANGE for key in changed)
