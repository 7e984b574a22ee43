"""The trained model as a directory that transformers loads, with what this package needs to use it again."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qa_dist.checkpoint.store import publish_directory
from qa_dist.config import CARRIED_SETTINGS, RunConfig
from qa_dist.config_sources import Source
from qa_dist.errors import UserError
from qa_dist.tasks.task import Task

SETTINGS_FILE = "qa_dist.json"
SCHEMA_VERSION = 1


def export_model(
    target: Path, model: Any, weights: dict[str, Tensor], task: Task, config: RunConfig, findings: dict[str, float]
) -> None:
    """Put weights, model config, tokenizer, the `CARRIED_SETTINGS` and what the evaluation found into `target`,
    replacing it as a whole."""
    values: Any = config.model_dump(mode="json")
    carried = {key: functools.reduce(lambda node, part: node[part], key.split("."), values) for key in CARRIED_SETTINGS}

    def write(directory: Path) -> None:
        model.config.dtype = torch.float32
        model.save_pretrained(directory, state_dict=weights)
        task.tokenizer.save_pretrained(directory)
        content = {"schema_version": SCHEMA_VERSION, "settings": carried, "findings": findings}
        (directory / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    publish_directory(target, write)


def exported_settings(model: str) -> Source:
    """The settings that `model`, if it is a directory made by `export_model`, was trained with.

    The directory may come from anywhere, so nothing but `CARRIED_SETTINGS` is taken from it.
    """
    source = Source()
    path = Path(model) / SETTINGS_FILE
    if not path.is_file():
        return source
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, settings = content["schema_version"], content["settings"]
        if not isinstance(version, int) or not isinstance(settings, dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: cannot be read as the settings of a trained model; export it again") from None
    if version > SCHEMA_VERSION:
        raise UserError(f"{path}: was written by a newer version of qa_dist (schema {version}); update qa_dist")
    for key in CARRIED_SETTINGS:
        if key in settings:
            source.put(key, settings[key], str(path))
    return source
