"""The trained model as a directory that transformers loads, with what this package needs to use it again."""

import contextlib
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import AutoConfig

from qa_dist.checkpoint.manifest import DamagedError, Manifest, damage
from qa_dist.checkpoint.store import Shards, gap, publish_directory
from qa_dist.config import CARRIED_SETTINGS, OWN_SETTINGS, RunConfig
from qa_dist.config_sources import Source
from qa_dist.errors import UserError, listing
from qa_dist.tasks import task_class
from qa_dist.tasks.task import Task
from qa_dist.training.models import longest_window

SETTINGS_FILE = "qa_dist.json"
SCHEMA_VERSION = 1


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    target: Path,
    model: Any,
    weights: dict[str, Tensor],
    task: Task,
    config: RunConfig,
    findings: dict[str, float],
    step: int,
) -> None:
    """Put weights, model config, tokenizer, the `CARRIED_SETTINGS`, the step and what the evaluation found into
    `target`, replacing it as a whole. It is loaded back before it takes its place."""
    dtype = DTYPES[config.run.export_dtype]
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}

    def write(directory: Path) -> None:
        model.config.dtype = dtype
        model.save_pretrained(directory, state_dict=cast)
        write_companions(directory, model.config, task, config, findings, step)
        _require_loadable(directory, task.auto_model, cast)

    publish_directory(target, write)


def write_companions(
    directory: Path, model_config: Any, task: Task, config: RunConfig, findings: dict[str, float], step: int
) -> None:
    """What belongs to the weights of `step`: model config, tokenizer, `CARRIED_SETTINGS` and findings, in one flat
    directory."""
    values: Any = config.model_dump(mode="json")
    others = {key for name, keys in OWN_SETTINGS.items() if name != task.name for key in keys}
    carried = {
        key: functools.reduce(lambda node, part: node[part], key.split("."), values)
        for key in CARRIED_SETTINGS
        if key not in others
    }
    model_config.save_pretrained(directory)
    if (longest := longest_window(model_config)) and task.tokenizer.model_max_length > longest:
        task.tokenizer.model_max_length = longest  # by which transformers' pipelines cut texts; what is new has none
    task.tokenizer.save_pretrained(directory)
    content = {"schema_version": SCHEMA_VERSION, "settings": carried, "findings": findings, "step": step}
    (directory / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def exported_step(model: Path) -> int | None:
    """The step whose weights lie in a directory made by `export_model`; None where there is none."""
    try:
        step = json.loads((model / SETTINGS_FILE).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _require_loadable(directory: Path, auto_model: Any, weights: dict[str, Tensor]) -> None:
    """Raise `RuntimeError` unless transformers finds exactly `weights` in `directory`; a model that cannot be loaded
    is better noticed now."""
    loaded, info = auto_model.from_pretrained(directory, dtype="auto", output_loading_info=True)
    found = loaded.state_dict()
    wrong = [name for name, tensor in weights.items() if name not in found or not torch.equal(found[name], tensor)]
    wrong += [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise RuntimeError(f"the exported model in {directory} is not the trained one: {listing(wrong)}")


def export_checkpoint(directory: Path, target: Path, dtype: str) -> None:
    """Make a model that transformers loads of the weights in a checkpoint. Raises `UserError` where that cannot be."""
    if target.exists():
        raise UserError(f"{target}: is there already, and nothing is overwritten; name another directory")
    if dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    try:
        manifest = Manifest.read(directory)
        if problem := damage(directory, manifest):
            raise DamagedError(problem)
        shards = Shards(directory, manifest)
    except (DamagedError, OSError, ValueError) as error:
        raise UserError(f"{directory}: cannot be exported: {error}") from None
    if incomplete := gap(shards.shapes, {key: [piece[:2] for piece in found] for key, found in shards.pieces.items()}):
        raise UserError(f"{directory}: cannot be exported: its shards do not make up {incomplete}")
    parts = {key: key.partition("/")[::2] for key in shards.shapes}
    weights = {name: shards.read(key).to(DTYPES[dtype]) for key, (kind, name) in parts.items() if kind == "weight"}
    weights |= {name: shards.read(key) for key, (kind, name) in parts.items() if kind == "buffer"}
    auto_model = task_class(manifest.config.get("task", "")).auto_model
    try:
        model_config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model_config.dtype = DTYPES[dtype]
        model = auto_model.from_config(model_config)
    except Exception as error:  # whatever a config that came from elsewhere makes transformers raise
        raise UserError(f"{directory}: cannot be exported: {str(error).splitlines()[0]}") from None

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary, state_dict=weights)
        for name in manifest.files:
            if not name.endswith((".safetensors", ".jsonl")) and name != "config.json":
                shutil.copy(directory / name, temporary / name)
        _require_loadable(temporary, auto_model, weights)

    try:
        publish_directory(target, write)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None


def exported_settings(model: str, *, with_findings: bool = False) -> Source:
    """The settings that `model`, if it is a directory made by `export_model`, or a repository on the Hub that such a
    one was pushed to, was trained with; `with_findings` with those that its evaluation has found to be better.

    It may come from anywhere, so nothing but `CARRIED_SETTINGS` is taken from it. Raises `UserError` where the file
    cannot be read.
    """
    source = Source()
    path = Path(model) / SETTINGS_FILE
    if not Path(model).is_dir():
        with contextlib.suppress(OSError, ValueError):  # loading the model will tell what is wrong
            path = Path(hf_hub_download(model, SETTINGS_FILE))
    if not path.is_file():
        return source
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, settings, findings = content["schema_version"], content["settings"], content.get("findings", {})
        if not isinstance(version, int) or not isinstance(settings, dict) or not isinstance(findings, dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: cannot be read as the settings of a trained model; export it again") from None
    if version > SCHEMA_VERSION:
        raise UserError(f"{path}: was written by a newer version of qa_dist (schema {version}); update qa_dist")
    for key in CARRIED_SETTINGS:
        if key in settings:
            source.put(key, settings[key], str(path))
    found = task_class(str(settings.get("task"))).found_settings if with_findings else {}
    for name, key in found.items():
        if name in findings:
            source.put(key, findings[name], f"{path}, {name}")
    return source
