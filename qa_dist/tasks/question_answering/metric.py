"""Exact match and F1, as the official SQuAD evaluation scripts define them (Rajpurkar et al. 2016, 2018)."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = frozenset(string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if the two are equal after normalization, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str, empty_matches: bool) -> float:
    """Harmonic mean of precision and recall over the words of the two.

    `empty_matches`: whether two texts without words score 1, as they do in SQuAD 2.0's script, or 0, as in 1.1's.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if empty_matches and (not predicted or not expected):
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


class ExtractiveAnswerMetric(evaluate.Metric):
    """`evaluate`'s form of the two figures, in percent; needs no network.

    `compute(predictions=[text, …], references=[[accepted text, …], …])`. A question with no accepted text has no
    answer, and the right prediction for it is the empty text. The config "squad" scores as the script of SQuAD
    1.1 does, "squad_v2" as that of 2.0.
    """

    def __init__(self, config_name: str = "squad", **kwargs: Any):
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description="Exact match and F1 of extractive question answering.",
            citation="Rajpurkar et al. 2016, arXiv:1606.05250; Rajpurkar et al. 2018, arXiv:1806.03822",
            features=features,
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride] -- only ever called with both
        self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        v2 = self.config_name == "squad_v2"
        total_exact = total_f1 = 0.0
        for prediction, answers in zip(predictions, references, strict=True):
            if v2:
                answers = [answer for answer in answers if normalize_answer(answer)]
            answers = answers or [""]
            total_exact += max(exact_match(prediction, answer) for answer in answers)
            total_f1 += max(f1(prediction, answer, empty_matches=v2) for answer in answers)
        return {
            "exact_match": 100.0 * total_exact / len(predictions),
            "f1": 100.0 * total_f1 / len(predictions),
        }
