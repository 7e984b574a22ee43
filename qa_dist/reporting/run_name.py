"""Names of runs, and thereby their directories in runs/, where the user gives none."""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qa_dist.config import DataConfig, RunConfig
from qa_dist.config_sources import ConfigError, Source, resolve

LONGEST_PART = 40
"""Characters of a model's or a data file's name that are kept."""
DATA_SUFFIX = re.compile(r"(\.(json|jsonl|csv|tsv|parquet|conll|bio|iob|iob2|txt|gz))+$", re.IGNORECASE)


def default_name(command: str, config_file: str | None, sources: Sequence[Source]) -> Source:
    """Return the default of run.name: the last part of run.output_dir, or else the name of the config file.

    `evaluate` and `predict` without run.output_dir are named after the model and the data, since many of them may be
    made with one config file: the same ones have the same name, others another.
    """
    source, name = Source(), Path(config_file).stem if config_file else "train"
    output_dirs = [given for one in sources if isinstance(given := _section(one, "run").get("output_dir"), str)]
    if output_dirs:
        name = Path(output_dirs[-1]).resolve().name or name
    elif command in ("evaluate", "predict"):
        try:
            name = f"{command}-{_model_and_data(resolve(sources))}"
        except ConfigError:  # reported later, with everything else that is wrong
            name = command
    source.put("run.name", name, "the default of run.name")
    return source


def model_directory(name: str) -> str:
    """Return the directory of the trained model, where `name` is a run directory; else `name`."""
    path = Path(name)
    with contextlib.suppress(OSError):  # a name too long for a file, which is refused where the model is loaded
        if (path / "model/config.json").is_file() and not (path / "config.json").exists():
            return str(path / "model")
    return name


def _section(source: Source, name: str) -> dict[str, Any]:
    section = source.values.get(name)
    return section if isinstance(section, dict) else {}


def _model_and_data(config: RunConfig) -> str:
    """Return a name in safe characters: the model's, the data's, and a digest of all that the results depend on."""
    model = model_directory(config.model.name or "none")
    path = Path(model)
    label = Path(_located(model)).parent.name if path.name == "model" else path.name
    data = config.data.model_dump(mode="json", exclude_defaults=True, exclude=_unused(config.data))
    data |= {key: [str(Path(file).absolute()) for file in data[key]] for key in data if key.endswith("_file")}
    content = [
        config.task,
        [_located(model), config.model.tokenizer],
        data | {"dataset": _located(config.data.dataset or "")},
        config.evaluation.model_dump(mode="json", exclude_defaults=True, exclude={"batch_size", "at_start"}),
    ]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return f"{_safe(label, 'model')}-{_safe(_data_label(config.data), 'data')}-{digest}"


def _located(name: str) -> str:
    """Return the absolute path of what is here; else `name`, which is an id on the Hub."""
    with contextlib.suppress(OSError):
        return str(Path(name).resolve()) if name and Path(name).exists() else name
    return name


def _unused(data: DataConfig) -> set[str]:
    """Return the settings of the data on which an evaluation does not depend."""
    unused = {"cache_dir"}
    return unused if data.validation_share else unused | {"train_file", "train_split", "max_train_samples"}


def _data_label(data: DataConfig) -> str:
    if data.synthetic is not None:
        return "synthetic"
    if data.dataset is not None:
        return Path(data.dataset).name
    files = data.train_file if data.validation_share else data.validation_file
    return DATA_SUFFIX.sub("", Path(files[0]).name) if files else ""


def _safe(name: str, otherwise: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)[:LONGEST_PART].strip("-.") or otherwise
