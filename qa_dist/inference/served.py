"""The requests that a server takes, and how a model replies to them, for each kind of model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qa_dist.errors import InputError, listing
from qa_dist.inference.question_answerer import QuestionAnswerer
from qa_dist.inference.token_classifier import TokenClassifier

MOST_OF_A_REQUEST = 50
"""Answers that a request may ask for."""


@dataclass(frozen=True)
class Served:
    """A model behind a page."""

    about: dict[str, Any]
    """What the page is told: name, task, and whether "no answer" may be the answer."""
    texts: Callable[[dict[str, Any]], tuple[str, ...]]
    """The texts of a request, whose length is limited. Raises `InputError` where there are none."""
    ask: Callable[[dict[str, Any], float], dict[str, Any]]
    """The reply to a request, in so many seconds. Raises `InputError` and `TimeoutError`."""


def questions(answerer: QuestionAnswerer, name: str) -> Served:
    def texts(values: dict[str, Any]) -> tuple[str, ...]:
        question, context = values.get("question"), values.get("context")
        if not isinstance(question, str) or not isinstance(context, str):
            raise InputError("question and context are needed, both texts")
        _require_known(values, ("question", "context", "top_k"))
        return question, context

    def ask(values: dict[str, Any], seconds: float) -> dict[str, Any]:
        top_k = values.get("top_k", 1)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MOST_OF_A_REQUEST:
            raise InputError(f"top_k is a number from 1 to {MOST_OF_A_REQUEST}")
        result = answerer(*texts(values), top_k=top_k, timeout=seconds)
        return {"answers": result if isinstance(result, list) else [result]}

    may_refuse = answerer.no_answer_threshold is not None
    return Served({"name": name, "task": "question_answering", "may_refuse": may_refuse}, texts, ask)


def _require_known(values: dict[str, Any], known: Sequence[str]) -> None:
    """Raise `InputError` if a request has other keys than the `known` ones: what they ask for would not be done."""
    if unknown := [f"{key!r:.60}" for key in values if key not in known]:
        raise InputError(f"the request has unknown keys: {listing(unknown)}; it takes {', '.join(known)}")


def entities(classifier: TokenClassifier, name: str) -> Served:
    def texts(values: dict[str, Any]) -> tuple[str, ...]:
        text = values.get("text")
        if not isinstance(text, str):
            raise InputError("text is needed, a text")
        _require_known(values, ("text",))
        return (text,)

    def ask(values: dict[str, Any], seconds: float) -> dict[str, Any]:
        return {"entities": classifier(*texts(values), timeout=seconds)}

    return Served({"name": name, "task": "token_classification", "may_refuse": False}, texts, ask)
