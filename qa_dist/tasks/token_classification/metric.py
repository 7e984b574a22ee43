"""Precision, recall and F1 of whole entities, as the CoNLL shared tasks define them.

Tjong Kim Sang and De Meulder 2003: an entity is right if its first word, its last word and its type are.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from qa_dist.tasks.token_classification.scheme import entities_of


def score_labels(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], types: Iterable[str] = ()
) -> dict[str, float]:
    """Figures in percent: `precision`, `recall` and `f1` over all entities, `accuracy` over the words' labels; then,
    for `types` and all others that there are, `TYPE_precision`, `TYPE_recall`, `TYPE_f1` and, no percentage,
    `TYPE_number` of expected entities. A ratio of nothing to nothing is 0, as in conlleval.

    Each sentence is a list of labels; a prediction has as many as its reference.
    """
    found, expected, right = Counter[str](), Counter[str](), Counter[str]()
    words = equal = 0
    for predicted, reference in zip(predictions, references, strict=True):
        equal += sum(a == b for a, b in zip(predicted, reference, strict=True))
        words += len(reference)
        own, wanted = set(entities_of(predicted)), set(entities_of(reference))
        for counter, entities in ((found, own), (expected, wanted), (right, own & wanted)):
            counter.update(entity.type for entity in entities)
    figures = score_entities(right.total(), found.total(), expected.total())
    figures["accuracy"] = _percent(equal, words)
    for name in dict.fromkeys((*types, *sorted({*found, *expected}))):
        own_figures = score_entities(right[name], found[name], expected[name])
        figures |= {f"{name}_{figure}": value for figure, value in own_figures.items()}
        figures[f"{name}_number"] = expected[name]
    return figures


def score_entities(right: int, found: int, expected: int) -> dict[str, float]:
    """Precision, recall and F1, in percent, of so many entities; 0 where there are none."""
    precision, recall = _percent(right, found), _percent(right, expected)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0
