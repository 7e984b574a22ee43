"""Questions to a trained model: `QuestionAnswerer`, in place of transformers' removed pipeline."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qa_dist.errors import InputError
from qa_dist.inference.loading import TrainedModel, load_trained
from qa_dist.inference.reader import Reader, chunks, require_numbers, require_whole_number, until
from qa_dist.tasks.question_answering.data import Example
from qa_dist.tasks.question_answering.features import NoRoomError, QuestionAnsweringFeatures
from qa_dist.tasks.question_answering.probabilities import Found, answers_of, best_spans
from qa_dist.tasks.question_answering.task import QuestionAnswering
from qa_dist.tasks.reading import is_unicode
from qa_dist.tasks.task import Batch

MOST_ANSWERS = 1000
"""That can be asked for."""
PIPELINE_DEFAULTS = {"data.max_length": 384, "data.stride": 128, "evaluation.max_answer_length": 15}
"""Of the removed pipeline; for models that were not trained here and so carry no settings of their own."""

Question = tuple[str, str] | Mapping[str, Any]
"""A pair of question and context, or a mapping that has both."""


class Answer(TypedDict):
    """An answer and its place; the first four fields are those of the removed pipeline."""

    score: float
    """Probability, 0 to 1."""
    start: int
    """First character in the context."""
    end: int
    """One past the last character: the answer is `context[start:end]`."""
    answer: str
    """Empty, with start and end 0, for "no answer"."""
    no_answer_probability: float
    """That the context does not answer the question, by the model; of use only if it was trained on such questions."""
    windows: list[tuple[int, int]]
    """What the model read at a time, as first and one past the last character of the context."""


class QuestionAnswerer:
    """Answers questions from contexts of any length, with a model for extractive question answering.

    ```python
    answerer = QuestionAnswerer.from_pretrained("runs/my_run/model")
    answerer("Where was Ada born?", "Ada was born in London.")
    # {"score": 0.97, "start": 16, "end": 22, "answer": "London", …}
    ```

    The score is that of transformers' `pipeline("question-answering")`, which transformers 5 removed: in each window,
    the product of the softmax over the allowed positions (the context and the classification token) at the answer's
    start and at its end; spans with the same text, whatever its case, count as one answer, with the sum of their
    scores (at most 1: windows overlap). Answers are whole words unless `align_to_words` is false, as they were there;
    here also those that the edge of a window cuts.

    A model that was trained here on questions without an answer (SQuAD 2.0) answers "" where the score of "no answer"
    exceeds the best span's by more than the threshold that was stored with it. `max_length`, `stride` (tokens) and
    `max_answer_length` (tokens) are the model's own, too; for models trained elsewhere they are the pipeline's 384,
    128 and 15.

    An answerer may be used from several threads at once.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        no_answer_threshold: float | None = None,
        max_answer_length: int | None = None,
        align_to_words: bool = True,
        batch_size: int | None = None,
        compile: bool = False,
    ):
        """`no_answer_threshold`: instead of the stored one. `batch_size`: windows that the model reads at once.
        `compile`: with torch.compile; worth its while from some thousand questions on."""
        task = trained.task
        assert isinstance(task, QuestionAnswering)
        require_whole_number("max_answer_length", max_answer_length)
        if no_answer_threshold is not None and not -math.inf <= no_answer_threshold <= math.inf:
            raise InputError(f"no_answer_threshold: {no_answer_threshold!r} is not a number")
        self.task = task
        self.reader = Reader(trained, batch_size, compile)
        self.max_answer_length = max_answer_length or task.config.evaluation.max_answer_length
        self.align_to_words = align_to_words
        self.no_answer_threshold = no_answer_threshold
        """Of SQuAD 2.0, in logits; None for a model that always answers."""
        if no_answer_threshold is None and task.config.data.unanswerable == "allow":
            self.no_answer_threshold = task.config.evaluation.null_score_diff_threshold

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> Self:
        """Load a model: a directory, a run directory, or a repository on the Hugging Face Hub.

        `device` is by default the accelerator, if there is one, and `dtype` float32; bfloat16 and float16 take half of
        the memory. `settings` are those of the constructor. Raises `UserError` for what is no model for question
        answering, or cannot be loaded.
        """
        trained = load_trained(
            name,
            QuestionAnswering.name,
            revision=revision,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            defaults=PIPELINE_DEFAULTS,
        )
        return cls(trained, **settings)

    def __call__(
        self,
        question: Any,
        context: str | Sequence[str] | None = None,
        *,
        top_k: int = 1,
        handle_impossible_answer: bool | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Answer one question (two texts, a pair or a mapping), several (a list of questions with a list of contexts
        or one for all, or a list of pairs or mappings), or a stream of them (any other iterable of pairs or mappings).

        Returns an `Answer` for a question, with `top_k` above 1 the list of its best ones; for a list a list of those,
        and for a stream an iterator over them, in the same order. With a larger `top_k` more spans are looked at, so
        scores may be a little higher, as those of the pipeline were. `handle_impossible_answer`: whether "" may be the
        answer: by default if the model has a threshold for it; where it has none, "" competes by its probability.

        A question with so many tokens that they leave no room for a context is an error for that question alone: in a
        list or a stream its place holds an `InputError` (a `ValueError`), which is not raised there.

        Raises `InputError` for an empty question or context, naming it, and for a single question that leaves no room,
        and `TimeoutError` if all this takes more than `timeout` seconds.
        """
        require_whole_number("top_k", top_k, MOST_ANSWERS)
        how = (top_k, handle_impossible_answer, until(timeout))
        if context is None:
            question, context = _alone(question)
        if isinstance(question, str):
            if not isinstance(context, str):
                raise InputError("context: is not a text; to one question belongs one context")
            _require_texts(question, context)
            (answer,) = self._answer([(question, context)], *how)
            if isinstance(answer, InputError):
                raise answer
            return answer
        if not isinstance(question, Iterable):
            raise InputError(f"question: is neither a text nor several of them, but {type(question).__name__}")
        if context is None and not isinstance(question, Sequence):
            return self._stream(iter(question), *how)
        pairs = list(question) if context is None else _paired(list(question), context)
        return list(self._stream(iter(pairs), *how))

    def _stream(self, questions: Iterator[Question], *how: Any) -> Iterator[Any]:
        """Answers, or the error of a question, in the order of `questions`, of which no more are taken than are
        answered together."""
        for chunk in chunks(_checked(questions), lambda pair: len(pair[1])):
            yield from self._answer(chunk, *how)

    def _answer(
        self, pairs: list[tuple[str, str]], top_k: int, impossible: bool | None, meanwhile: Callable[[], None]
    ) -> list[Any]:
        """For each pair its answers, or an `InputError` if the question leaves no room for a context."""
        if impossible is None:
            impossible = self.no_answer_threshold is not None
        examples = [Example(str(i), question, context, (), ()) for i, (question, context) in enumerate(pairs)]
        try:
            windows = self.reader.windows(lambda: self.task.windows(examples, whole_words=self.align_to_words))
        except NoRoomError as error:
            places = error.places.tolist()
            errors = {
                place: InputError(
                    f"the question has {length:,} tokens, and may have {error.longest} to leave room for its context; "
                    f"shorten it ({pairs[place][0]!r:.80})"
                )
                for place, length in zip(places, error.lengths.tolist(), strict=True)
            }
            rest = [pair for i, pair in enumerate(pairs) if i not in errors]
            answers = iter(self._answer(rest, top_k, impossible, meanwhile) if rest else [])
            return [errors[i] if i in errors else next(answers) for i in range(len(pairs))]
        # Some of the spans become one answer.
        count = 2 * top_k + 10 if self.align_to_words else top_k
        spans = self._spans(windows, count, meanwhile)
        found = answers_of(spans, windows, [context for _, context in pairs], meanwhile)
        results = []
        for (_, context), own in zip(pairs, found, strict=True):
            answers = self._ranked(own, context, impossible)[:top_k]
            results.append(answers[0] if top_k == 1 else answers)
        return results

    def _spans(
        self, windows: QuestionAnsweringFeatures, count: int, meanwhile: Callable[[], None]
    ) -> dict[str, npt.NDArray[Any]]:
        """The best spans of all windows, in their order. The model reads those of similar length together."""

        def pick(output: Any, batch: Batch) -> dict[str, Tensor]:
            places = (batch.targets[name] for name in ("context_begin", "context_end", "cls"))
            sizes = {"count": count, "max_answer_length": self.max_answer_length}
            return best_spans(output.start_logits, output.end_logits, *places, **sizes)

        indices, parts = zip(*self.reader.read(windows, pick, meanwhile), strict=True)
        order = np.argsort(np.concatenate(indices))
        joined = {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
        require_numbers(joined["null_probability"])
        return joined

    def _ranked(self, found: Found, context: str, impossible: bool) -> list[Answer]:
        """All answers, best first."""
        rest = {"no_answer_probability": found.no_answer_probability, "windows": found.windows}
        answers = [
            Answer(score=score, start=start, end=end, answer=context[start:end], **rest)
            for score, start, end in found.answers
        ]
        if not impossible and answers:
            return answers
        none = Answer(score=found.no_answer_probability, start=0, end=0, answer="", **rest)
        place = sum(answer["score"] >= none["score"] for answer in answers)
        if self.no_answer_threshold is not None:  # which is first is for the threshold to say
            place = 0 if found.null_odds > self.no_answer_threshold else max(place, 1)
        answers.insert(place, none)
        return answers


def _checked(questions: Iterable[Question]) -> Iterator[tuple[str, str]]:
    for i, question in enumerate(questions):
        pair = _pair(question, f"question {i + 1:,}")
        _require_texts(*pair, place=f"question {i + 1:,}: ")
        yield pair


def _require_texts(question: Any, context: Any, place: str = "") -> None:
    if problem := text_problem(question, context):
        raise InputError(f"{place}{problem} (question {question!r:.80})")


def text_problem(question: Any, context: Any) -> str | None:
    """What is wrong with a question and its context; None if nothing is."""
    for name, text in (("question", question), ("context", context)):
        if not isinstance(text, str):
            return f"the {name} is not a text"
        if not text.strip():
            return f"the {name} is empty" if not text else f"the {name} holds nothing but blanks"
        if not is_unicode(text):
            return f"the {name} holds half of a surrogate pair, which is no character"
    return None


def _alone(question: Any) -> tuple[Any, Any]:
    """Question and context of one pair or mapping, or the lists of a mapping of lists; else `question` and None."""
    if isinstance(question, Mapping):
        if not {"question", "context"} <= question.keys():
            raise InputError("question: is a mapping without question and context")
        return question["question"], question["context"]
    is_pair = isinstance(question, tuple) and len(question) == 2 and all(isinstance(text, str) for text in question)
    return question if is_pair else (question, None)


def _paired(questions: list[str], contexts: str | Iterable[str]) -> list[tuple[str, str]]:
    contexts = [contexts] * len(questions) if isinstance(contexts, str) else list(contexts)
    if len(questions) != len(contexts):
        raise InputError(f"there are {len(questions):,} questions and {len(contexts):,} contexts")
    return list(zip(questions, contexts, strict=True))


def _pair(question: Question, place: str) -> tuple[str, str]:
    try:
        pair = (question["question"], question["context"]) if isinstance(question, Mapping) else tuple(question)
    except (KeyError, TypeError):
        pair = ()
    if len(pair) != 2 or isinstance(question, str):
        raise InputError(
            f"{place}: is neither a pair of question and context nor a mapping that has both; of columns, pass the "
            "questions and the contexts"
        )
    return pair
