"""Windows of examples in memory (mapped from the cache): their tokens, and how they are padded, whatever the task."""

import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tokenizers
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qa_dist.config import DataConfig
from qa_dist.tasks.cache import cached_table, fingerprint
from qa_dist.tasks.ragged import Ragged, ranges
from qa_dist.tasks.splits import Examples, ExampleSplit
from qa_dist.tasks.task import FeatureSet

Item = TypeVar("Item")


class Windows(FeatureSet, Generic[Item]):
    """The windows of one split; what is to be learned of them is the subclass's."""

    def __init__(
        self,
        columns: pa.Table,
        fingerprint: str,
        padding: dict[str, int],
        examples: Callable[[], Examples[Item]],
        padding_side: str = "right",
        max_length: int | None = None,
        labelled: bool = True,
    ):
        """`columns`, in one chunk each, are `example` and lists of tokens. `padding` has the value that fills up each
        of these lists, on `padding_side`. Nothing is padded to more than `max_length`, for which alone the model is
        known to have positions."""
        self.fingerprint = fingerprint
        self.examples = examples
        """What the windows were cut from; read when first called."""
        self.labelled = labelled
        self._padding = padding
        self._pad_left = padding_side == "left"
        self.tokens = {
            name: Ragged.from_arrow(columns.column(name)) for name in padding if name in columns.column_names
        }
        """`input_ids` and, where the model reads them, `token_type_ids`."""
        self.lengths = self.tokens["input_ids"].lengths
        self._widest = max(max_length, int(self.lengths.max(initial=0))) if max_length else None
        self.example = columns.column("example").to_numpy()
        """Position of each window's example, [num_features]."""

    @abstractmethod
    def target_arrays(self) -> list[npt.NDArray[Any]]:
        """All that the windows are labelled with."""

    @abstractmethod
    def example_id(self, example: Item) -> str: ...

    @abstractmethod
    def expected(self, example: Item) -> tuple[str, tuple[str, ...]]:
        """Return the example's text, and what its prediction is compared with."""

    @property
    def notes(self) -> list[str]:
        return self.examples().notes

    def digest(self) -> str:
        """Of tokens and labels."""
        found = hashlib.sha256()
        arrays = [part for rows in self.tokens.values() for part in (rows.values, rows.offsets)]
        for array in (*arrays, *self.target_arrays()):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def evaluation_digest(self) -> str:
        found = hashlib.sha256(self.digest().encode())
        for example in self.examples().items:
            content = (self.example_id(example), *self.expected(example))
            found.update(repr(content).encode("utf-8", "surrogatepass"))
        return found.hexdigest()

    def names(self, indices: npt.NDArray[np.integer]) -> list[str]:
        """The ids of the windows' examples."""
        examples = self.examples().items
        return [self.example_id(examples[i]) for i in self.example[indices].tolist()]

    def token_summary(self) -> dict[str, str]:
        padded = len(self) * int(self.lengths.max())
        return {
            "windows": f"{len(self):,}",
            "tokens: mean": f"{self.lengths.mean():.0f}",
            "tokens: 95th percentile": f"{np.percentile(self.lengths, 95):.0f}",
            "tokens: longest": f"{self.lengths.max()}",
            "padding, were all as long": f"{1 - self.lengths.sum() / padded:.0%}",
        }

    def padded(
        self, indices: npt.NDArray[np.integer], multiple: int
    ) -> tuple[dict[str, Tensor], npt.NDArray[np.int64]]:
        """The model's inputs for the windows at `indices`, each [features, length], and where each window begins in
        its row, [features]."""
        lengths = self.lengths[indices]
        width = -(-int(lengths.max()) // multiple) * multiple
        width = width if self._widest is None else min(width, self._widest)
        begin = width - lengths if self._pad_left else np.zeros_like(lengths)
        inputs = {
            name: torch.from_numpy(rows.padded(indices, begin, width, self._padding[name]))
            for name, rows in self.tokens.items()
        }
        place = np.arange(width) - begin[:, None]
        inputs["attention_mask"] = torch.from_numpy(((place >= 0) & (place < lengths[:, None])).astype(np.int64))
        return inputs, begin


def padding_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """What fills up each list of tokens."""
    return {
        "input_ids": int(tokenizer.pad_token_id or 0),  # pyright: ignore[reportArgumentType]
        "token_type_ids": tokenizer.pad_token_type_id,
    }


def cut_windows(
    lengths: npt.NDArray[np.int64], room: npt.NDArray[np.int64], stride: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The windows of texts of `lengths` tokens, of which `room` fit into each: whose it is, and its first token and one
    past its last, each [windows]. A window starts every (room - stride) tokens until one reaches the text's end."""
    step = np.where(lengths > room, room - stride, 1)
    windows = np.where(lengths > room, 1 + -(-(lengths - room) // step), 1)
    owner = np.repeat(np.arange(len(lengths)), windows)
    begin = ranges(np.zeros(len(lengths), dtype=np.int64), windows) * step[owner]
    return owner, begin, np.minimum(begin + room[owner], lengths[owner])


def cached_windows(
    source: ExampleSplit[Any],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataConfig,
    modules: tuple[ModuleType, ...],
    build: Callable[[], pa.Table],
    *more: object,
) -> tuple[pa.Table, str]:
    """The windows of `source`, from the cache where they are there, and their key, which changes with the examples, the
    tokenizer, the windows' sizes, the code here and in `modules`, and `more`."""
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    key = fingerprint(
        source.fingerprint,
        backend.to_str(),
        tokenizer.model_input_names,
        tokenizer.padding_side,
        tokenizers.__version__,
        settings.max_length,
        settings.stride,
        *more,
        *(Path(inspect.getfile(module)) for module in modules),
        Path(__file__),
    )
    return cached_table(settings.cache_dir, key, build), key
