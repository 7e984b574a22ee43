"""The seam between the training system and what is being learned.

The training loop, the evaluation, the checkpoints and the reports know a task by these classes alone.
"""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qa_dist.config import RunConfig
from qa_dist.errors import UserError


@dataclass
class Batch:
    """Features padded to one length."""

    inputs: dict[str, Tensor]
    """Arguments of the model's forward pass, each [features, length]."""
    targets: dict[str, Tensor]
    """What loss and outputs need beside the model's output, each [features] or [features, length]."""
    index: Tensor
    """Positions of the features in their set, int64, [features]."""

    @property
    def positions(self) -> int:
        """Tokens and padding that the model is given."""
        return next(iter(self.inputs.values())).numel()

    def pinned(self) -> Self:
        """In memory from which a GPU can copy by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return {name: changed(part) for name, part in value.items()} if isinstance(value, dict) else value

        return type(self)(**{part.name: changed(getattr(self, part.name)) for part in dataclasses.fields(self)})


class FeatureSet(ABC):
    """The model-ready windows of one split."""

    lengths: npt.NDArray[np.int64]
    """Tokens of each feature, without padding, [num_features]."""
    fingerprint: str = ""
    """Key of everything the features depend on; all ranks must have the same. Empty: their digest is."""
    labelled: bool = True
    """Whether the data say what is right; else there is neither loss nor score, only predictions."""

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def collate(self, indices: npt.NDArray[np.integer], multiple: int = 8) -> Batch:
        """The features at `indices` as one batch, in that order, padded to a multiple of `multiple` tokens."""

    @property
    def notes(self) -> list[str]:
        """Remarks for the user on how the examples were read. Reads them, if no one has yet."""
        return []

    def digest(self) -> str:
        """Of what a model is trained on, wherever it comes from: the same for the same tokens and targets."""
        found = hashlib.sha256()
        for part in np.array_split(np.arange(len(self)), -(-len(self) // 256)):
            batch = self.collate(part)
            for name, tensor in sorted((batch.inputs | batch.targets).items()):
                found.update(f"{name} {tuple(tensor.shape)}".encode())
                found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()

    def evaluation_digest(self) -> str:
        """Return a digest of everything that an evaluation depends on: the features, and what their predictions are
        compared with, wherever they come from. Reads the examples, if no one has yet."""
        return self.digest()

    def summary(self) -> dict[str, str]:
        """Figures of the split for people, by their names. Reads the examples, if no one has yet."""
        return {"windows": f"{len(self):,}", "tokens: longest": f"{self.lengths.max()}"}

    def names(self, indices: npt.NDArray[np.integer]) -> list[str]:
        """How a person finds the features at `indices` in the data, such as the ids of their examples."""
        return [str(i) for i in indices.tolist()]


@dataclass
class Score:
    """What an evaluation found."""

    metrics: dict[str, float]
    """Name -> value; the first ones are the task's headline figures."""
    files: dict[str, Any] = field(default_factory=dict)
    """File name -> JSON content for the run directory, such as the predictions."""
    findings: dict[str, float] = field(default_factory=dict)
    """What the evaluation found out for users of the model; stored with it."""


@dataclass(frozen=True)
class Mark:
    """A part of an example's text, `text[start:end]`, that is expected to be found, or was."""

    kind: Literal["gold", "predicted"]
    start: int
    end: int
    label: str = ""
    """What the part is, such as the type of an entity; empty where a task has but one kind."""


@dataclass(frozen=True)
class Alternative:
    """One of the outputs that the model weighed for an example."""

    text: str
    """Empty for "nothing"."""
    probability: float
    span: tuple[int, int] | None = None
    """Where it stands in the example's text, if it does: first character and one past the last."""


@dataclass(frozen=True)
class ReviewedExample:
    """An example, what the model made of it, and how good that is."""

    id: str
    heading: str
    """What is shown of it in a list, such as the question."""
    text: str
    """What it was to be found in, such as the context."""
    expected: tuple[str, ...]
    """The accepted outputs, as texts; none where nothing was to be found."""
    predicted: str
    """The output, as a text; empty for "nothing"."""
    is_right: bool
    """Whether the output is an accepted one."""
    figures: Mapping[str, float]
    """Figure -> its value for this example, in percent; the same figures for all."""
    groups: Mapping[str, str]
    """Grouping -> the group that the example belongs to."""
    outcomes: tuple[str, ...] = ()
    """What it can be filtered by, beside being right or wrong; names in `Review.outcomes`."""
    marks: tuple[Mark, ...] = ()
    """They may overlap."""
    confidence: float | None = None
    """The probability that the model gives to its output, 0 to 1."""
    alternatives: tuple[Alternative, ...] = ()
    """The likeliest first; the output is among them."""


@dataclass(frozen=True)
class ReviewCurve:
    """Figures as functions of something, such as of a threshold."""

    title: str
    x: str
    """What the horizontal axis is."""
    series: Mapping[str, Sequence[tuple[float, float]]]
    """Name -> (x, y), in the order of x."""
    marked: Mapping[str, float] = field(default_factory=dict)
    """Name -> the x that is marked with it."""


@dataclass(frozen=True)
class ReviewTable:
    """Figures that are no means over groups of examples, such as a confusion matrix."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str | float, ...]]
    """The first cell of each is its name."""


@dataclass
class Review:
    """An evaluation, example by example, for people who want to know where a model is wrong."""

    examples: list[ReviewedExample]
    """Those that there are predictions for, in the order of the data."""
    names: tuple[str, str]
    """What the examples' headings and texts are, such as question and context."""
    nothing: str
    """How an empty output is called, such as no answer."""
    figures: Mapping[str, str]
    """Figure -> how it is called; where the task has a metric of that name, it is the mean of the examples'."""
    groupings: Mapping[str, Sequence[str]]
    """Grouping -> all of its groups, in the order in which they are shown."""
    outcomes: Mapping[str, str] = field(default_factory=dict)
    """Outcome -> how it is called."""
    curves: list[ReviewCurve] = field(default_factory=list)
    tables: list[ReviewTable] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Remarks for the user, such as on examples without a prediction."""


@dataclass(frozen=True)
class CardWords:
    """What the model card of a task's models says, and how the Hugging Face Hub calls it."""

    pipeline_tag: str = "other"
    """The Hub's name of the task."""
    tags: tuple[str, ...] = ()
    """By which the Hub's users find such models."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Metric -> the Hub's name of its type; metrics of the task's headline."""
    unit: str = ""
    """Of those metrics."""
    summary: str = ""
    """What a model of this task does, in a sentence."""
    limits: str = ""
    """What it cannot do."""


class Task(ABC):
    """One kind of problem: its data, its loss, its outputs and its score.

    What has no default here is all that it takes to train and to evaluate.
    """

    name: ClassVar[str]
    auto_model: ClassVar[Any]
    """The transformers Auto class whose models have the right head."""
    best_metric: ClassVar[str]
    """The metric by which epochs are compared; higher is better."""
    headline: ClassVar[dict[str, str]]
    """Metric -> how the console calls it, for the table of epochs."""
    texts: ClassVar[int] = 1
    """How many texts the tokenizer lays out in a window: 2 for pairs."""
    per_token: ClassVar[dict[str, int]] = {}
    """Those of the outputs that have a value for every token, and what fills them up behind a window's last one."""
    card: ClassVar[CardWords] = CardWords()
    found_settings: ClassVar[dict[str, str]] = {}
    """Finding of an evaluation -> the setting for which it is the best value."""
    evaluation_files: ClassVar[tuple[str, ...]] = ()
    """Names of those of `Score.files` that `review` reads."""

    tokenizer: PreTrainedTokenizerBase

    @abstractmethod
    def features(self, split: str) -> FeatureSet | None:
        """The features of "train", "validation" or "unlabelled" (the validation data, without their labels), from the
        cache where they are there; None where the config names no such data. Raises `UserError` for data that cannot
        be used."""

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The loss of every feature, float32, [features]; independent of padding and of the other features."""

    @abstractmethod
    def outputs(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """What evaluation keeps of the model's output: each [features, …], the same shape for every batch; but those
        `per_token` are [features, length], counted from each window's first token wherever it is padded."""

    @abstractmethod
    def score(self, outputs: dict[str, npt.NDArray[Any]], features: FeatureSet) -> Score:
        """Score the `outputs` of all features, in the order of `features`, those `per_token` with the tokens of all of
        them in a row, [lengths.sum()]. Called on the main process only."""

    def fit_head(self, model_config: PretrainedConfig) -> None:
        """Before the model is made: tell its config what the head has to be, such as the names of its labels. Raises
        `UserError` where it is a trained one that cannot be used."""
        return

    def try_out(self, model: nn.Module) -> list[str]:
        """Return remarks for the user on how a new model, on the CPU, treats the task's windows. Raises `UserError` for
        one that cannot learn the task."""
        return []

    @classmethod
    def usage(cls, repo_id: str, config: RunConfig) -> str:
        """Markdown: how to ask a model that was trained with `config` and lies in the Hub repository `repo_id`, also
        with transformers alone."""
        return ""

    def review(self, files: Mapping[str, Any], features: FeatureSet) -> Review:
        """What an evaluation of `features` found, example by example.

        `files` are those of `evaluation_files` that could be read: name -> JSON content, which anyone may have changed.
        Raises `UserError` where they are not of an evaluation of these examples.
        """
        raise UserError(f"{self.name} has no view of single examples")
