"""The tasks that can be trained, by the name they have in the config."""

from typing import Any

from qa_dist.config import RunConfig
from qa_dist.errors import UserError
from qa_dist.tasks.task import Batch, FeatureSet, Score, Task

__all__ = ["Batch", "FeatureSet", "Score", "Task", "load_task", "task_class"]


def task_class(name: str) -> type[Task]:
    """The class of the task that is called `name` in configs. Raises `UserError` where there is none."""
    from qa_dist.tasks.question_answering.task import QuestionAnswering

    known: dict[str, type[Task]] = {QuestionAnswering.name: QuestionAnswering}
    if name not in known:
        raise UserError(f"task: there is no task {name!r}; there are {', '.join(known)}")
    return known[name]


def load_task(config: RunConfig) -> Task:
    """The task that `config.task` names, with its tokenizer loaded (or trained on the training texts).

    Raises `UserError` when the tokenizer or the data it is trained on cannot be used.
    """
    make: Any = task_class(config.task)
    return make(config)
