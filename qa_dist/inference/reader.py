"""What all kinds of trained models have in common when they are used: windows are read in batches of similar length,
from several threads if need be, and within a time limit."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qa_dist.errors import InputError, UserError
from qa_dist.inference.loading import TrainedModel
from qa_dist.tasks.task import Batch, FeatureSet
from qa_dist.training.batching import Indices, evaluation_batches

TEXTS_PER_CHUNK = 1024
"""Texts whose windows are sorted by length together."""
CHARACTERS_PER_CHUNK = 8_000_000
"""Of them, so that the windows of long ones do not fill the memory."""
WINDOWS_ON_CPU, WINDOWS_ON_ACCELERATOR = 4, 32
"""That the model reads at once by default. On a CPU more of them fall out of the caches: 32 take a quarter longer."""
COMPILED_MULTIPLE = 64
"""Lengths are multiples of this where the model is compiled, so that there are few shapes to compile for."""

Item = TypeVar("Item")
Features = TypeVar("Features", bound=FeatureSet)


class Reader:
    """A trained model that reads windows. It may be used from several threads at once."""

    def __init__(self, trained: TrainedModel, batch_size: int | None, compile: bool):
        """`batch_size`: windows that the model reads at once. `compile`: with torch.compile."""
        require_whole_number("batch_size", batch_size)
        self.device = trained.device
        self.batch_size = batch_size or (WINDOWS_ON_CPU if self.device.type == "cpu" else WINDOWS_ON_ACCELERATOR)
        self.model: Any = torch.compile(trained.model) if compile else trained.model
        self._multiple = COMPILED_MULTIPLE if compile else 8
        # Tokenizers that are asked by two threads at once raise "Already borrowed", and torch.compile compiles twice.
        self._tokenizer_lock = threading.Lock()
        self._model_lock = threading.Lock() if compile else contextlib.nullcontext()

    def windows(self, make: Callable[[], Features]) -> Features:
        """What `make` makes with the tokenizer."""
        with self._tokenizer_lock:
            return make()

    def read(
        self, windows: FeatureSet, pick: Callable[[Any, Batch], dict[str, Tensor]], meanwhile: Callable[[], None]
    ) -> Iterator[tuple[Indices, dict[str, npt.NDArray[Any]]]]:
        """What `pick` takes of the model's output for each batch, and the windows of which it is. `meanwhile` is called
        before each."""
        for indices in evaluation_batches(windows.lengths, self.batch_size):
            meanwhile()
            batch = windows.collate(indices, self._multiple).to(self.device)
            with torch.inference_mode(), self._model_lock:
                picked = pick(self.model(**batch.inputs), batch)
                found = {name: tensor.cpu().numpy() for name, tensor in picked.items()}
            yield indices, found


def until(timeout: float | None) -> Callable[[], None]:
    """What raises `TimeoutError` once so many seconds are over. Raises `InputError` for what is no number of them."""
    if timeout is not None and not (isinstance(timeout, int | float) and timeout >= 0):
        raise InputError(f"timeout: {timeout!r} is not a number of seconds")
    deadline = None if timeout is None else time.monotonic() + timeout

    def look_at_the_clock() -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError("the time is up")

    return look_at_the_clock


def chunks(items: Iterator[Item], characters: Callable[[Item], int]) -> Iterator[list[Item]]:
    """`items` in parts that are read together. Where their source raises an error, what came before is read first."""
    chunk: list[Item] = []
    total = 0
    while True:
        try:
            item = next(items)
        except StopIteration:
            break
        except Exception:
            if chunk:
                yield chunk
            raise
        chunk.append(item)
        total += characters(item)
        if len(chunk) == TEXTS_PER_CHUNK or total > CHARACTERS_PER_CHUNK:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def require_numbers(values: npt.NDArray[Any]) -> None:
    """Raise `UserError` unless all that the model said are finite numbers."""
    if not np.isfinite(values).all():
        raise UserError(
            "the model's logits are not numbers: its weights are damaged, or they overflow in float16; use bfloat16 or "
            "float32"
        )


def require_whole_number(name: str, value: Any, most: int | None = None) -> None:
    """Raise `InputError` unless `value` is None or a whole number from 1 to `most`."""
    if value is not None and (type(value) is not int or value < 1 or (most is not None and value > most)):
        range_ = "above 0" if most is None else f"from 1 to {most:,}"
        raise InputError(f"{name}: {value!r} is not a whole number {range_}")
