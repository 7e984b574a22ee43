"""Entities in texts, found by a trained model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qa_dist.errors import InputError
from qa_dist.inference.loading import TrainedModel, load_trained
from qa_dist.inference.reader import Reader, chunks, require_numbers, until
from qa_dist.tasks.ragged import ranges
from qa_dist.tasks.reading import is_unicode
from qa_dist.tasks.task import Batch
from qa_dist.tasks.token_classification.data import Example
from qa_dist.tasks.token_classification.decoding import decode, found_entities
from qa_dist.tasks.token_classification.features import TokenClassificationFeatures
from qa_dist.tasks.token_classification.task import TokenClassification
from qa_dist.tasks.token_classification.words import words_of

DEFAULTS = {"data.max_length": 384, "data.stride": 128}
"""For models that were not trained here and so carry no settings of their own."""

Text = str | Sequence[str]
"""A text, or the words of one."""


class Entity(TypedDict):
    """A part of a text; the fields are those of transformers' token classification pipeline with its groups."""

    entity_group: str
    """Type, such as PER."""
    score: float
    """Mean probability of the words' labels, 0 to 1."""
    word: str
    """The entity, as it stands in the text."""
    start: int
    """First character in the text; of a text that was given in words, the first word."""
    end: int
    """One past the last."""


class TokenClassifier:
    """Finds entities in texts of any length, with a model for token classification.

    ```python
    classifier = TokenClassifier.from_pretrained("runs/my_run")
    classifier("Ada Lovelace was born in London.")
    # [{"entity_group": "PER", "score": 0.99, "word": "Ada Lovelace", "start": 0, "end": 12}, …]
    ```

    A word's label is that of its first token, and entities are groups of words by IOB2, as in training and evaluation;
    transformers calls this the aggregation strategy "first". A text is cut into words, about as the corpora of named
    entities are; one that is given as a list of words is taken as it is. Long texts are read in windows, and a word in
    two of them is taken from the one that shows more around it.

    A classifier may be used from several threads at once.
    """

    task_name = TokenClassification.name

    def __init__(self, trained: TrainedModel, *, batch_size: int | None = None, compile: bool = False):
        """`batch_size`: windows that the model reads at once. `compile`: with torch.compile."""
        task = trained.task
        assert isinstance(task, TokenClassification)
        self.task = task
        self.reader = Reader(trained, batch_size, compile)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        labels: Sequence[str] = (),
        **settings: Any,
    ) -> Self:
        """Load a model: a directory, a run directory, or a repository on the Hugging Face Hub.

        `device` is by default the accelerator, if there is one, and `dtype` float32. `labels` are needed where the
        model has no names for its own, in the order of its head. `settings` are those of the constructor. Raises
        `UserError` for what is no model for token classification, or cannot be loaded.
        """
        trained = load_trained(
            name,
            TokenClassification.name,
            revision=revision,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            defaults=DEFAULTS,
            given={"data.labels": tuple(labels)} if labels else {},
        )
        return cls(trained, **settings)

    def __call__(self, text: Any, *, timeout: float | None = None) -> Any:
        """The entities of one text (a list of `Entity`), of several (a list of texts, or of lists of words: a list of
        such lists), or of a stream of them (any other iterable: an iterator, in the same order).

        Raises `InputError` (a `ValueError`) for an empty text, naming which, and `TimeoutError` if all this takes more
        than `timeout` seconds, as is seen before each batch of windows.
        """
        meanwhile = until(timeout)
        if isinstance(text, str):
            if problem := text_problem(text):
                raise InputError(problem)
            return self._entities([text], meanwhile)[0]
        if not isinstance(text, Iterable) or isinstance(text, Mapping | bytes | bytearray):
            raise InputError(f"text: is neither a text nor several of them, but {type(text).__name__}")
        found = self._stream(iter(text), meanwhile)
        return list(found) if isinstance(text, Sequence) else found

    def _stream(self, texts: Iterator[Text], meanwhile: Callable[[], None]) -> Iterator[list[Entity]]:
        for chunk in chunks(_checked(texts), lambda text: len(str(text))):
            yield from self._entities(chunk, meanwhile)

    def _entities(self, texts: list[Text], meanwhile: Callable[[], None]) -> list[list[Entity]]:
        spans = [words_of(text) if isinstance(text, str) else None for text in texts]
        words = [
            tuple(text) if own is None else tuple(str(text[start:end]) for start, end in own)
            for text, own in zip(texts, spans, strict=True)
        ]
        examples = [Example(str(i), own, (), f"text {i + 1}") for i, own in enumerate(words)]
        windows = self.reader.windows(lambda: self.task.windows(examples))
        tagged = decode(self._outputs(windows, meanwhile), windows, list(self.task.labels))
        return [
            [_entity(one, text, own) for one in found_entities(example, labels)]
            for example, labels, text, own in zip(examples, tagged, texts, spans, strict=True)
        ]

    def _outputs(
        self, windows: TokenClassificationFeatures, meanwhile: Callable[[], None]
    ) -> dict[str, npt.NDArray[Any]]:
        """The task's outputs for the tokens of all windows, in a row."""

        def pick(output: Any, batch: Batch) -> dict[str, Tensor]:
            return self.task.outputs(output, batch)

        offsets = np.concatenate([[0], np.cumsum(windows.lengths)])
        label, score = np.zeros(offsets[-1], dtype=np.int32), np.zeros(offsets[-1], dtype=np.float32)
        for indices, part in self.reader.read(windows, pick, meanwhile):
            places = ranges(offsets[indices], windows.lengths[indices])
            is_token = np.arange(part["label"].shape[1]) < windows.lengths[indices][:, None]
            label[places], score[places] = part["label"][is_token], part["score"][is_token]
        require_numbers(score)
        return {"label": label, "score": score}


def _checked(texts: Iterable[Any]) -> Iterator[Text]:
    for i, text in enumerate(texts):
        if problem := text_problem(text):
            raise InputError(f"text {i + 1:,}: {problem}")
        yield text


def text_problem(text: Any) -> str | None:
    """What is wrong with a text, or the words of one; None if nothing is."""
    if isinstance(text, str):
        if not text.strip():
            return "the text is empty" if not text else "the text holds nothing but blanks"
        return None if is_unicode(text) else "the text holds half of a surrogate pair, which is no character"
    if not isinstance(text, Sequence) or isinstance(text, bytes | bytearray):
        return f"is neither a text nor a list of words, but {type(text).__name__}"
    if not text:
        return "there are no words"
    for i, word in enumerate(text):
        if not isinstance(word, str):
            return f"word {i + 1:,} is not a text, but {type(word).__name__}"
        if not word.strip():
            return f"word {i + 1:,} is empty or blank"
    return None if is_unicode("".join(text)) else "a word holds half of a surrogate pair, which is no character"


def _entity(found: dict[str, Any], text: Text, spans: list[tuple[int, int]] | None) -> Entity:
    """`found` is by words; `spans` are those of the text's words, if it was not given in words."""
    start, end, word = found["start"], found["end"], found["text"]
    if spans is not None:
        start, end = spans[start][0], spans[end - 1][1]
        word = str(text[start:end])
    return Entity(entity_group=found["type"], score=found["score"], word=word, start=start, end=end)
