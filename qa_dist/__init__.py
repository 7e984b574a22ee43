"""Fine-tune models for question answering and token classification on many accelerators, and use them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qa_dist.inference.question_answerer import QuestionAnswerer
    from qa_dist.inference.token_classifier import TokenClassifier

__version__ = "0.1.0"
__all__ = ["QuestionAnswerer", "TokenClassifier"]


def __getattr__(name: str) -> Any:
    if name == "QuestionAnswerer":  # imported when asked for: it brings torch and transformers along
        from qa_dist.inference.question_answerer import QuestionAnswerer

        return QuestionAnswerer
    if name == "TokenClassifier":
        from qa_dist.inference.token_classifier import TokenClassifier

        return TokenClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
