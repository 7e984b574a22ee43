"""Exact match and F1 in the form of the `evaluate` library."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from qa_dist.tasks.question_answering.metric import percent, score_each


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
        exact, overlap = score_each(predictions, references, v2=self.config_name == "squad_v2")
        return {"exact_match": percent(exact), "f1": percent(overlap)}
