"""Rows of different lengths in one flat array, the form in which Arrow keeps lists."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

IntArray = npt.NDArray[np.integer]


def ranges(starts: IntArray, lengths: IntArray) -> npt.NDArray[np.int64]:
    """`starts[0], starts[0] + 1, …` for `lengths[0]` items, then the same for the next one, as one array.

    Shapes: starts [n], lengths [n], result [lengths.sum()].
    """
    lengths = lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


def distinct(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """For each text its row among the distinct ones, and the distinct ones."""
    rows: dict[str, int] = {}
    places = np.fromiter((rows.setdefault(text, len(rows)) for text in texts), np.int64, count=len(texts))
    return places, list(rows)


@dataclass(frozen=True)
class Ragged:
    """A list of rows: row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: npt.NDArray[np.integer]
    """Shape [total]."""
    offsets: npt.NDArray[np.int64]
    """Shape [rows + 1]."""

    @classmethod
    def from_lengths(cls, values: npt.NDArray[np.integer], lengths: IntArray) -> "Ragged":
        return cls(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray) -> "Ragged":
        """A view, without a copy: the column has to be one chunk, as it is in a file of one record batch."""
        (array,) = column.chunks
        offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(array.values.to_numpy(zero_copy_only=False), offsets)

    def to_arrow(self) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32)), pa.array(self.values))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.integer]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def padded(self, rows: IntArray, begin: IntArray, width: int, fill: int) -> npt.NDArray[np.int64]:
        """`rows` as a matrix [len(rows), width], each from its column `begin` on, filled up on both sides."""
        result = np.full((len(rows), width), fill, dtype=np.int64)
        lengths = self.lengths[rows]
        places = ranges(np.arange(len(rows), dtype=np.int64) * width + begin, lengths)
        result.reshape(-1)[places] = self.values[ranges(self.offsets[rows], lengths)]
        return result
