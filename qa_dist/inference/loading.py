"""A trained model with its tokenizer, and the settings and findings that were stored with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from qa_dist.config import RunConfig
from qa_dist.config_sources import Source, resolve
from qa_dist.errors import UserError
from qa_dist.reporting.run_name import model_directory
from qa_dist.tasks import TASKS, load_task
from qa_dist.tasks.model_config import pretrained_config
from qa_dist.tasks.task import Task
from qa_dist.tasks.tokenizer import load_tokenizer
from qa_dist.training.export import DTYPES, exported_settings
from qa_dist.training.models import build_model, longest_window

SAFE_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
"""What is fetched of a revision on the Hub: nothing that could be code."""


@dataclass(frozen=True)
class TrainedModel:
    """A model that is ready to be asked."""

    task: Task
    """With the tokenizer, and the settings in `task.config`."""
    model: nn.Module
    """On its device, in evaluation mode, without gradients."""
    device: torch.device


def load_trained(
    name: str,
    task: str,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    defaults: dict[str, Any] | None = None,
    given: dict[str, Any] | None = None,
) -> TrainedModel:
    """Load a model for `task` from a directory, a run directory or the Hub, checked as for training.

    `device`: by default the accelerator, if there is one. `dtype`: float32 by default. `defaults` are the settings of
    models that were trained elsewhere; each is lowered to what the model can take; `given` ones hold for all. Raises
    `UserError` for what cannot be loaded or has no head for the task.
    """
    name = _located(name, revision)
    exported = exported_settings(name, with_findings=True)
    settings = Source()
    settings.put("task", task, "task")
    settings.put("model.name", name, "model.name")
    settings.put("model.trust_remote_code", trust_remote_code, "trust_remote_code")
    for key, value in (given or {}).items():
        settings.put(key, value, key)
    other = exported.values.get("task", task)
    if other != task:
        raise UserError(f"{name}: is a model for {_words(other)}, not for {_words(task)}")
    if not exported.values:
        for key, value in (defaults or {}).items():
            settings.put(key, value, "default")
        _lower(settings, resolve([settings]))
    config = resolve([exported, settings])
    loaded = load_task(config)
    model, _ = build_model(config, loaded, trained=True)
    place = _device(device)
    model = model.requires_grad_(False).eval().to(place, _dtype(dtype))
    return TrainedModel(loaded, model, place)


def task_of(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> str | None:
    """The task of a trained model: what was stored with it, or what its config's architecture says; None where neither
    tells."""
    name = _located(name, revision)
    stored = exported_settings(name).values.get("task")
    if stored is not None:
        return str(stored)
    model = RunConfig.model_validate({"model": {"name": name, "trust_remote_code": trust_remote_code}}).model
    config = pretrained_config(model)
    found = [kind for kind in TASKS if any(_is_for(kind, one) for one in getattr(config, "architectures", None) or ())]
    return found[0] if found else None


def _is_for(task: str, architecture: str) -> bool:
    """Whether transformers' name of an architecture, such as BertForTokenClassification, is of the task."""
    return f"For{task.title().replace('_', '')}" in architecture


def _located(name: str, revision: str | None) -> str:
    """The model directory of a run directory; the fetched files of a revision on the Hub; else `name`."""
    return model_directory(name) if revision is None or Path(name).is_dir() else _fetched(name, revision)


def _lower(settings: Source, config: RunConfig) -> None:
    """Lower the windows to what the model and its tokenizer can take."""
    longest = [config.data.max_length, load_tokenizer(config.model).model_max_length]
    limit = longest_window(pretrained_config(config.model))
    max_length = min([*longest, limit] if limit else longest)
    settings.put("data.max_length", max_length, "the model")
    settings.put("data.stride", min(config.data.stride, max_length // 2), "the model")


def _fetched(name: str, revision: str) -> str:
    try:
        return snapshot_download(name, revision=revision, allow_patterns=SAFE_FILES)
    except (OSError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: the revision {revision!r} cannot be fetched: {first_line}") from None


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"device: {str(device)!r} cannot be used: {first_line.partition('. ')[0]}") from None
    return found


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    return DTYPES[dtype or "float32"]


def _words(task: str) -> str:
    return str(task).replace("_", " ")
