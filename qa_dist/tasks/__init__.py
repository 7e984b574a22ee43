"""The tasks that can be trained, by the name they have in the config."""

from qa_dist.config import RunConfig
from qa_dist.tasks.task import Batch, FeatureSet, Score, Task

__all__ = ["Batch", "FeatureSet", "Score", "Task", "load_task"]


def load_task(config: RunConfig) -> Task:
    """The task that `config.task` names, with its tokenizer loaded (or trained on the training texts).

    Raises `UserError` when the tokenizer or the data it is trained on cannot be used.
    """
    from qa_dist.tasks.question_answering.task import QuestionAnswering

    return {QuestionAnswering.name: QuestionAnswering}[config.task](config)
