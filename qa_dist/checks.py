"""What single settings cannot say: whether they fit each other, the command, and the files that are there."""

import re
from collections.abc import Sequence

from qa_dist.config import OWN_SETTINGS, RunConfig, TrainConfig
from qa_dist.config_sources import Check, Problem, leaves
from qa_dist.errors import UserError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
BRANCH = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)


def paths(config: RunConfig, keys: Sequence[str] = ("data.train_file", "data.validation_file")) -> list[Problem]:
    """Files that are not there, of the settings `keys`."""
    from qa_dist.tasks.reading import expand

    problems = []
    for key in keys:
        try:
            expand(getattr(config.data, key.split(".")[1]), key)
        except UserError as error:
            problems.append(Problem((key,), str(error)))
    return problems


def validation_paths(config: RunConfig) -> list[Problem]:
    """The same of what is evaluated: a config file may name training data that are elsewhere."""
    return paths(config) if config.data.validation_share else paths(config, ["data.validation_file"])


def _is_any(config: RunConfig, *keys: str) -> bool:
    return any(getattr(config.data, key) for key in keys)


def _train_requirements(config: RunConfig) -> list[Problem]:
    problems = []
    if not _is_any(config, "train_file", "synthetic", "dataset"):
        problems.append(Problem(("data.train_file",), "data.train_file: is not set; name the training examples"))
    if config.model.name is None and config.model.config is None:
        problems.append(Problem(("model.name",), "model.name: is not set; name a pretrained model"))
    return problems


def needs_validation(config: RunConfig) -> list[Problem]:
    problems = []
    if not _is_any(config, "validation_file", "synthetic", "dataset", "validation_share"):
        problems.append(Problem(("data.validation_file",), "data.validation_file: is not set; name the examples"))
    elif config.data.dataset is not None and config.data.validation_split is None:
        problems.append(Problem(("data.validation_split",), "data.validation_split: is not set; name the split"))
    return problems


def _evaluate_requirements(config: RunConfig) -> list[Problem]:
    problems = needs_validation(config)
    if config.model.name is None:
        problems.append(Problem(("model.name",), "model.name: is not set; name a trained model (--model DIR)"))
    return problems


Rule = tuple[tuple[str, ...], bool, str]
"""The settings that it is about, whether it is broken, and what to say then."""


def combinations(config: RunConfig) -> list[Problem]:
    """Settings that are right by themselves, but not together."""
    rules = [*_task_rules(config), *_data_rules(config), *_training_rules(config)]
    return [Problem(keys, message) for keys, broken, message in rules if broken]


def _task_rules(config: RunConfig) -> list[Rule]:
    fields = dict(leaves())

    def is_set(key: str) -> bool:
        value: object = config
        for name in key.split("."):
            value = getattr(value, name, None)
        return value is not None and value != fields[key].get_default(call_default_factory=True)

    return [
        ((key, "task"), is_set(key), f"{key}: is for {task}, and the task is {config.task}; leave it out")
        for task, keys in OWN_SETTINGS.items()
        if task != config.task
        for key in keys
    ]


def _data_rules(config: RunConfig) -> list[Rule]:
    data, model = config.data, config.model
    return [
        (
            ("data.stride", "data.max_length"),
            data.stride >= data.max_length,
            f"data.stride: {data.stride} is not smaller than data.max_length ({data.max_length}), so windows would not "
            "advance; lower it",
        ),
        (
            ("data.synthetic", "data.train_file", "data.validation_file", "data.dataset"),
            data.synthetic is not None and _is_any(config, "train_file", "validation_file", "dataset"),
            "data.synthetic: generates both splits; leave out data.train_file, data.validation_file and data.dataset, "
            "or take data.synthetic out of the config file",
        ),
        (
            ("data.dataset", "data.train_file", "data.validation_file"),
            data.dataset is not None and _is_any(config, "train_file", "validation_file"),
            "data.dataset: names the data, and so do data.train_file or data.validation_file; keep one",
        ),
        (
            ("data.validation_share", "data.validation_file", "data.synthetic"),
            data.validation_share > 0 and _is_any(config, "validation_file", "synthetic"),
            "data.validation_share: holds out training examples, but there are validation data; keep one",
        ),
        (
            ("data.synthetic.unanswerable_share", "data.unanswerable"),
            data.synthetic is not None and data.synthetic.unanswerable_share > 0 and data.unanswerable != "allow",
            "data.synthetic.unanswerable_share: asks for questions without an answer; set data.unanswerable to allow",
        ),
        (
            ("model.config", "model.name"),
            model.config is not None and model.name is not None,
            "model.config: describes a new model, model.name a pretrained one; keep one of them",
        ),
        (
            ("model.config",),
            model.config is not None and not isinstance(model.config.get("model_type"), str),
            "model.config: has no model_type; add one, such as bert",
        ),
    ]


def _training_rules(config: RunConfig) -> list[Rule]:
    data, model, train = config.data, config.model, config.train
    return [
        (
            ("train.micro_batch_size", "train.global_batch_size"),
            isinstance(train.micro_batch_size, int)
            and train.tokens_per_batch is None
            and train.micro_batch_size > train.global_batch_size,
            f"train.micro_batch_size: {train.micro_batch_size} is more than train.global_batch_size "
            f"({train.global_batch_size}); lower it",
        ),
        (
            ("train.tokens_per_batch", "train.global_batch_size"),
            train.tokens_per_batch is not None
            and train.global_batch_size != TrainConfig.model_fields["global_batch_size"].default,
            "train.tokens_per_batch: says how large a step is, and so does train.global_batch_size; keep one",
        ),
        (
            ("train.compile", "train.tokens_per_batch"),
            train.compile and train.tokens_per_batch is not None,
            "train.compile: compiles a few shapes of batches, and with train.tokens_per_batch each batch has its own; "
            "keep one of them",
        ),
        (
            ("train.compile", "model.attention"),
            train.compile and model.attention == "varlen",
            "train.compile: compiles a few lengths of batches, and with model.attention varlen each batch has its own; "
            "keep one of them",
        ),
        (
            ("train.tokens_per_batch", "data.max_length"),
            train.tokens_per_batch is not None and train.tokens_per_batch < 2 * data.max_length,
            f"train.tokens_per_batch: {train.tokens_per_batch} is less than two windows of data.max_length "
            f"({data.max_length}); raise it",
        ),
    ]


def hub_rules(config: RunConfig) -> list[Problem]:
    """What about pushing is wrong, as far as it can be told without the Hub."""
    hub = config.hub
    if hub.repo_id is None:
        return []
    rules: list[Rule] = [
        (
            ("hub.repo_id",),
            not REPO_ID.fullmatch(hub.repo_id),
            f"hub.repo_id: {hub.repo_id!r} is not the name of a repository; write user/name",
        ),
        (
            ("hub.branch",),
            hub.branch == "main" or not BRANCH.fullmatch(hub.branch),
            f"hub.branch: {hub.branch!r} cannot be the branch of training states (main is the model's); name another",
        ),
        (
            ("hub.drain_timeout", "run.timeout_minutes"),
            hub.drain_timeout >= 60 * config.run.timeout_minutes,
            f"hub.drain_timeout: {hub.drain_timeout:g} s is not less than run.timeout_minutes "
            f"({config.run.timeout_minutes}), after which the other processes give up; lower it",
        ),
    ]
    return [Problem(keys, message) for keys, broken, message in rules if broken]


FOR_COMMAND: dict[str, list[Check]] = {
    "train": [_train_requirements, combinations, hub_rules],
    "evaluate": [_evaluate_requirements, combinations],
    "predict": [_evaluate_requirements, combinations],
}
"""Command -> what its settings must pass."""
