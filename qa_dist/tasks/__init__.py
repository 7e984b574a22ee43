"""The tasks that can be trained, by the name they have in the config."""

import importlib
from typing import Any

from qa_dist.config import RunConfig
from qa_dist.errors import UserError
from qa_dist.tasks.task import Batch, FeatureSet, Score, Task

__all__ = ["TASKS", "Batch", "FeatureSet", "Score", "Task", "load_task", "task_class"]

TASKS = {
    "question_answering": ("qa_dist.tasks.question_answering.task", "QuestionAnswering"),
    "token_classification": ("qa_dist.tasks.token_classification.task", "TokenClassification"),
}
"""Name -> module and class, which are imported when they are asked for."""


def task_class(name: str) -> type[Task]:
    """The class of the task that is called `name` in configs. Raises `UserError` where there is none."""
    if name not in TASKS:
        raise UserError(f"task: there is no task {name!r}; there are {', '.join(TASKS)}")
    module, attribute = TASKS[name]
    return getattr(importlib.import_module(module), attribute)


def load_task(config: RunConfig) -> Task:
    """The task that `config.task` names, with its tokenizer loaded (or trained on the training texts).

    Raises `UserError` when the tokenizer or the data it is trained on cannot be used.
    """
    make: Any = task_class(config.task)
    return make(config)
