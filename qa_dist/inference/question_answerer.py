"""`QuestionAnswerer`: answers from a trained question answering model."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, TypedDict, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qa_dist.errors import InputError
from qa_dist.inference.loading import TrainedModel, load_trained
from qa_dist.inference.reader import Reader, chunks, require_numbers, require_whole_number, until
from qa_dist.tasks.question_answering.answers import find_answers
from qa_dist.tasks.question_answering.data import Example
from qa_dist.tasks.question_answering.features import NoRoomError, QuestionAnsweringFeatures
from qa_dist.tasks.question_answering.probabilities import answers_of, best_spans
from qa_dist.tasks.question_answering.task import QuestionAnswering
from qa_dist.tasks.reading import is_unicode
from qa_dist.tasks.task import Batch

MOST_ANSWERS = 1000
"""Largest `top_k`."""
PIPELINE_DEFAULTS = {"data.max_length": 384, "data.stride": 128, "evaluation.max_answer_length": 15}
"""Settings of the removed pipeline; for its decoding, with models that carry no settings of their own."""

Decoding = Literal["evaluated", "pipeline"]
"""How answers are found from logits: as evaluation does, or as transformers' removed pipeline did."""
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
    """Probability that the context does not answer the question; of use only if the model was trained on such
    questions."""
    windows: list[tuple[int, int]]
    """The parts of the context that the model read, as first and one past the last character."""


class QuestionAnswerer:
    """Answers questions from contexts of any length, with a model for extractive question answering.

    ```python
    answerer = QuestionAnswerer.from_pretrained("runs/my_run/model")
    answerer("Where was Ada born?", "Ada was born in London.")
    # {"score": 0.97, "start": 16, "end": 22, "answer": "London", …}
    ```

    By default (`decoding="evaluated"`) answers are those of `qa-dist evaluate` and `qa-dist predict`: the texts of
    predictions.json, with the list of nbest_predictions.json behind them. `score` is the softmax over that list, which
    for models with a no-answer threshold (SQuAD 2.0) includes "no answer"; the answer is "" where the score of "no
    answer" exceeds the best span's by more than the threshold. A list holds at most `evaluation.n_best` answers.

    `decoding="pipeline"` gives the answers and scores of `pipeline("question-answering")`, which transformers 5
    removed: in each window, the product of the softmax over the allowed positions (the context and the classification
    token) at the answer's start and at its end; spans with the same text, whatever its case, count as one answer, with
    the sum of their scores (at most 1: windows overlap). Answers are whole words unless `align_to_words` is false, here
    also where a window's edge cuts a word. "No answer" competes by its probability; the threshold plays no part.

    `max_length`, `stride`, `n_best`, `max_answer_length` (tokens) and the no-answer threshold that an evaluation found
    to be the best are stored with models that were trained here. For other models they are the defaults of
    `qa-dist evaluate`, and with `decoding="pipeline"` those of the pipeline: 384, 128 and answers of 15 tokens.

    An answerer may be used from several threads at once.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        decoding: Decoding = "evaluated",
        no_answer_threshold: float | None = None,
        max_answer_length: int | None = None,
        align_to_words: bool | None = None,
        batch_size: int | None = None,
        compile: bool = False,
    ):
        """`no_answer_threshold` (in logits): instead of the stored one; a model without one then may answer "".
        `align_to_words`: only with `decoding="pipeline"`, there true by default. `batch_size`: windows that the model
        reads at once. `compile`: use torch.compile; worth it from some thousand questions on."""
        task = trained.task
        assert isinstance(task, QuestionAnswering)
        _require_decoding(decoding, no_answer_threshold=no_answer_threshold, align_to_words=align_to_words)
        require_whole_number("max_answer_length", max_answer_length)
        if no_answer_threshold is not None and not -math.inf <= no_answer_threshold <= math.inf:
            raise InputError(f"no_answer_threshold: {no_answer_threshold!r} is not a number")
        self.task = task
        self.reader = Reader(trained, batch_size, compile)
        self.decoding = decoding
        self.max_answer_length = max_answer_length or task.config.evaluation.max_answer_length
        self.align_to_words = decoding == "pipeline" and align_to_words is not False
        self.no_answer_threshold = no_answer_threshold
        """In logits; None for a model that always answers."""
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
        decoding: Decoding = "evaluated",
        **settings: Any,
    ) -> Self:
        """Load a model: a directory, a run directory, or a repository on the Hugging Face Hub.

        `device` is by default the accelerator, if there is one, and `dtype` float32; bfloat16 and float16 take half of
        the memory. `decoding` and `settings` are those of the constructor. Raises `UserError` for what is no model for
        question answering, or cannot be loaded.
        """
        _require_decoding(decoding)
        trained = load_trained(
            name,
            QuestionAnswering.name,
            revision=revision,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            defaults=PIPELINE_DEFAULTS if decoding == "pipeline" else {},
        )
        return cls(trained, decoding=decoding, **settings)

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
        and for a stream an iterator over them, in the same order. The first of a list is the answer, the others follow
        by their scores. `handle_impossible_answer`: whether "" may be the answer; by default if the model has a
        threshold for it. With `decoding="pipeline"` a larger `top_k` means that more spans are merged, so scores may be
        a little higher.

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
        decode = self._as_pipeline if self.decoding == "pipeline" else self._as_evaluated
        answers = decode(windows, [context for _, context in pairs], top_k, impossible, meanwhile)
        return [own[0] if top_k == 1 else own[:top_k] for own in answers]

    def _as_evaluated(
        self,
        windows: QuestionAnsweringFeatures,
        contexts: list[str],
        top_k: int,
        impossible: bool,
        meanwhile: Callable[[], None],
    ) -> list[list[Answer]]:
        """Return the best answers to each question, decoded as evaluation does: the predicted one, then the others."""
        outputs = self._outputs(windows, self.task.outputs, meanwhile)
        require_numbers(outputs["null_score"])
        require_numbers(np.maximum(outputs["start_logit"] + outputs["end_logit"], 0))  # -inf stands for no token
        meanwhile()
        threshold = 0.0 if self.no_answer_threshold is None and impossible else self.no_answer_threshold
        found = find_answers(
            outputs,
            windows,
            n_best=self.task.config.evaluation.n_best,
            max_answer_length=self.max_answer_length,
            threshold=threshold,
        )
        results = []
        rows = zip(contexts, found.n_best.items(), found.null_probabilities.tolist(), _read(windows), strict=True)
        for context, (name, entries), none, read in rows:
            if impossible:  # the threshold, not the score, decides whether "no answer" or the best span is first
                is_none = found.null_odds[name] > (threshold or 0.0)
                first = next((i for i, entry in enumerate(entries) if ("start" not in entry) == is_none), 0)
                entries.insert(0, entries.pop(first))
            else:
                entries = [entry for entry in entries if "start" in entry] or [{"probability": none}]
            results.append(
                [
                    _answer(context, entry["probability"], entry.get("start", 0), entry.get("end", 0), none, read)
                    for entry in entries
                ]
            )
        return results

    def _as_pipeline(
        self,
        windows: QuestionAnsweringFeatures,
        contexts: list[str],
        top_k: int,
        impossible: bool,
        meanwhile: Callable[[], None],
    ) -> list[list[Answer]]:
        """Return all answers to each question by the removed pipeline's rule, best first."""
        count = 2 * top_k + 10 if self.align_to_words else top_k  # some of the spans become one answer

        def pick(output: Any, batch: Batch) -> dict[str, Tensor]:
            places = (batch.targets[name] for name in ("context_begin", "context_end", "cls"))
            sizes = {"count": count, "max_answer_length": self.max_answer_length}
            return best_spans(output.start_logits, output.end_logits, *places, **sizes)

        outputs = self._outputs(windows, pick, meanwhile)
        require_numbers(outputs["null_probability"])
        results = []
        found = answers_of(outputs, windows, contexts, meanwhile)
        for context, own, read in zip(contexts, found, _read(windows), strict=True):
            none = own.no_answer_probability
            answers = [_answer(context, score, start, end, none, read) for score, start, end in own.answers]
            if impossible or not answers:
                place = sum(answer["score"] >= none for answer in answers)
                answers.insert(place, _answer(context, none, 0, 0, none, read))
            results.append(answers)
        return results

    def _outputs(
        self,
        windows: QuestionAnsweringFeatures,
        pick: Callable[[Any, Batch], dict[str, Tensor]],
        meanwhile: Callable[[], None],
    ) -> dict[str, npt.NDArray[Any]]:
        """Return what `pick` takes of the model's output for all windows, in the order of the windows."""
        indices, parts = zip(*self.reader.read(windows, pick, meanwhile), strict=True)
        order = np.argsort(np.concatenate(indices))
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def _require_decoding(decoding: Any, *, no_answer_threshold: Any = None, align_to_words: Any = None) -> None:
    """Raise `InputError` for an unknown decoding, and for settings that it has no use for."""
    if decoding not in get_args(Decoding):
        raise InputError(f"decoding: {decoding!r} is not one of {', '.join(get_args(Decoding))}")
    if decoding == "pipeline" and no_answer_threshold is not None:
        raise InputError(
            "no_answer_threshold: decoding pipeline compares probabilities and has no threshold; leave it out"
        )
    if decoding == "evaluated" and align_to_words is not None:
        raise InputError("align_to_words: is for decoding pipeline; leave it out, or set decoding to pipeline")


def _answer(
    context: str, score: float, start: int, end: int, no_answer_probability: float, windows: list[tuple[int, int]]
) -> Answer:
    return Answer(
        score=score,
        start=start,
        end=end,
        answer=context[start:end],
        no_answer_probability=no_answer_probability,
        windows=windows,
    )


def _read(features: QuestionAnsweringFeatures) -> list[list[tuple[int, int]]]:
    """Return the windows of each example, as first and one past the last character of its context."""
    windows: list[list[tuple[int, int]]] = [[] for _ in features.examples().items]
    for i, example in enumerate(features.example.tolist()):
        starts, ends = features.char_starts[i], features.char_ends[i]
        if len(starts):
            windows[example].append((int(starts[0]), int(ends[-1])))
    return windows


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
