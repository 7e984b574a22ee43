"""Which examples are trained on and which are held out, wherever they come from and whatever they are."""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from qa_dist.config import DataConfig, SyntheticConfig
from qa_dist.errors import UserError, listing
from qa_dist.tasks import reading
from qa_dist.tasks.cache import fingerprint
from qa_dist.tasks.reading import Record

if TYPE_CHECKING:
    from datasets import Dataset

Item = TypeVar("Item")


@dataclass
class Examples(Generic[Item]):
    """The examples of one split, with what was noticed while reading them."""

    items: list[Item]
    notes: list[str] = field(default_factory=list)
    """Counted remarks for the user: what was left out, moved or numbered."""


class ExampleSplit(ABC, Generic[Item]):
    """The examples of one split, read when first needed: where features are cached, most processes never do."""

    modules: ClassVar[Sequence[ModuleType]]
    """The task's own code that the examples depend on."""

    def __init__(self, config: DataConfig, name: str):
        self.config = config
        self.name = name
        """train, validation, or unlabelled: validation examples whose labels, if they have any, are not looked at."""
        self.is_training = name == "train"
        self.is_labelled = name != "unlabelled"

    @property
    @abstractmethod
    def settings(self) -> list[Any]:
        """Of `config`, those that the task's examples depend on beside the ones of every task."""

    @abstractmethod
    def generate(self, config: SyntheticConfig, split: str) -> list[Item]:
        """The built-in corpus."""

    @abstractmethod
    def read(self, path: Path) -> list[Record]:
        """The records of a file. Raises `UserError` for one that cannot be read."""

    @abstractmethod
    def named(self, records: list[Record], name: str) -> list[Record]:
        """The rows of the data set `name` with our names for their fields. Raises `UserError` where one is missing."""

    @abstractmethod
    def text_of(self, record: Record) -> Hashable:
        """What is either trained on or held out, with all of its examples; None where there is nothing."""

    @abstractmethod
    def check(self, records: list[Record], name: str) -> Examples[Item]:
        """The examples that `records` are. Raises one `UserError` with all that is wrong; `name` is for it."""

    @property
    def description(self) -> str:
        """How people call it."""
        return {"train": "the training examples", "validation": "the validation examples"}.get(self.name, "the data")

    @property
    def exists(self) -> bool:
        """Whether the config names such data."""
        config = self.config
        if config.synthetic is not None or (config.validation_share and not self.is_training):
            return True
        return bool(self._files) or (config.dataset is not None and self._dataset_split is not None)

    @property
    def _is_cut(self) -> bool:
        """Whether the validation examples are a share of the training data."""
        return self.config.validation_share > 0

    @property
    def _files(self) -> tuple[str, ...]:
        return self.config.train_file if self.is_training or self._is_cut else self.config.validation_file

    @property
    def _files_key(self) -> str:
        return "data.train_file" if self.is_training or self._is_cut else "data.validation_file"

    @property
    def _dataset_split(self) -> str | None:
        return self.config.train_split if self.is_training or self._is_cut else self.config.validation_split

    @property
    def _limit(self) -> int | None:
        return self.config.max_train_samples if self.is_training else self.config.max_validation_samples

    @cached_property
    def fingerprint(self) -> str:
        """Key of everything the examples depend on."""
        config = self.config
        code = [Path(inspect.getfile(module)) for module in (*self.modules, reading)]
        code.append(Path(__file__))
        settings = [self.name, self._limit, config.validation_share, sorted(config.columns.items()), *self.settings]
        if config.synthetic is not None:
            return fingerprint(config.synthetic, *settings, *code)
        if self._files:
            files = reading.expand(self._files, self._files_key)
            return fingerprint(*files, *settings, *code)
        return fingerprint(self.dataset._fingerprint, *settings, *code)

    @cached_property
    def whole(self) -> Examples[Item]:
        """All examples, checked, however many of them are asked for. Raises `UserError` for what cannot be read."""
        config = self.config
        if config.synthetic is not None:
            return Examples(self.generate(config.synthetic, "train" if self.is_training else "validation"))
        records = self._records()
        if self._is_cut:
            texts = [self.text_of(record) for record in records]
            held_out = held_out_texts(texts, config.validation_share)
            records = [r for r, text in zip(records, texts, strict=True) if (text in held_out) != self.is_training]
        return self.check(records, self.description)

    @cached_property
    def loaded(self) -> Examples[Item]:
        """The examples that are asked for, checked. Raises `UserError` for what cannot be read or used."""
        examples = self.whole
        if self._limit is None:
            return examples
        notes = list(examples.notes)
        if self._limit > len(examples.items):
            notes.append(f"{self._limit:,} examples were asked for, there are {len(examples.items):,}")
        return Examples(examples.items[: self._limit], notes)

    @property
    def notes(self) -> list[str]:
        return self.loaded.notes

    def _records(self) -> list[Record]:
        if self._files:
            files = reading.expand(self._files, self._files_key)
            return [record for file in files for record in self.read(file)]
        name = f"{self.config.dataset} ({self._dataset_split})"
        return self.named([Record(row, f"{name}, row {i + 1}") for i, row in enumerate(self.dataset.to_list())], name)

    @cached_property
    def dataset(self) -> "Dataset":
        return load_dataset(self.config.dataset or "", self.config.dataset_config, self._dataset_split or "")


def load_dataset(name: str, config_name: str | None, split: str) -> "Dataset":
    """A split of a data set: an id on the Hugging Face Hub, or a directory that `datasets` has written or can read.

    Raises `UserError` when there is none, or the Hub cannot be reached.
    """
    import datasets

    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(str(path))
            if split not in loaded:
                raise UserError(f"data.dataset: {name} has no split {split!r}; it has {listing(list(loaded))}")
            return loaded[split]
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))  # pyright: ignore[reportReturnType] -- one split
        return datasets.load_dataset(name, config_name, split=split)  # pyright: ignore[reportReturnType]
    except UserError:
        raise
    except Exception as error:  # `datasets` passes on whatever its readers and the network raise
        raise UserError(
            f"data.dataset: {name!r} (split {split!r}) cannot be loaded: {_first_line(error)}. It was looked for as a "
            f"directory here, in the cache ({datasets.config.HF_DATASETS_CACHE}) and on the Hub; without a network, "  # pyright: ignore[reportAttributeAccessIssue]
            "point data.train_file and data.validation_file at files"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")


def held_out_texts(texts: Sequence[Hashable], share: float) -> set[Any]:
    """Texts whose examples are about `share` of all; the same ones every time. A text is either wholly held out or not
    at all, so that none is both trained on and scored. `texts` are those of the examples, None for one without."""
    counts = Counter(text for text in texts if text is not None)
    order = sorted(counts, key=lambda text: hashlib.sha256(str(text).encode("utf-8", "replace")).digest())
    chosen: set[Any] = set()
    held_out = 0
    for text in order:
        if held_out >= share * len(texts):
            break
        chosen.add(text)
        held_out += counts[text]
    if len(chosen) == len(order):
        raise UserError(
            f"data.validation_share: {share} of {len(texts):,} examples on {len(order):,} texts leaves none to "
            "train on; lower it, or name a validation_file"
        )
    return chosen
