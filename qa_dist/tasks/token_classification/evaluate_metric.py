"""Precision, recall and F1 of entities in the form of the `evaluate` library."""

from collections.abc import Sequence

import datasets
import evaluate

from qa_dist.tasks.token_classification.metric import score_labels
from qa_dist.tasks.token_classification.scheme import is_label


class EntityMetric(evaluate.Metric):
    """`evaluate`'s form of these figures; needs no network.

    `compute(predictions=[[label, …], …], references=[[label, …], …])`, the labels in IOB2. Raises `ValueError` for
    others.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {name: datasets.List(datasets.Value("string")) for name in ("predictions", "references")}
        )
        return evaluate.MetricInfo(
            description="Precision, recall and F1 of entities.",
            citation="Tjong Kim Sang and De Meulder 2003, aclanthology.org/W03-0419",
            features=features,
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride] -- only ever called with both
        self, *, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        strange = {label for part in (predictions, references) for row in part for label in row if not is_label(label)}
        if strange:
            raise ValueError(f"not labels of IOB2: {', '.join(sorted(strange))}")
        return score_labels(predictions, references)
