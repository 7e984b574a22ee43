"""From the labels of tokens to those of words, and to entities."""

from typing import Any

import numpy as np
import numpy.typing as npt

from qa_dist.tasks.token_classification.data import Example
from qa_dist.tasks.token_classification.features import TokenClassificationFeatures
from qa_dist.tasks.token_classification.scheme import OUTSIDE, entities_of

Tagged = tuple[list[str], npt.NDArray[np.float64]]
"""The labels of a sentence's words, and their probabilities, [words]."""


def decode(
    outputs: dict[str, npt.NDArray[Any]], features: TokenClassificationFeatures, labels: list[str]
) -> list[Tagged]:
    """For each example the labels of its words, and their probabilities.

    `outputs` are `label` (a place in `labels`) and `score` of all windows' tokens, in a row. A word takes those of its
    first token, in the window that shows most of the text around it; one without a token is in no entity.
    """
    token = features.word_tokens
    known = token >= 0
    names = np.array([*labels, OUTSIDE], dtype=object)
    label, score = np.full(len(token), len(labels)), np.ones(len(token))
    label[known], score[known] = outputs["label"][token[known]], outputs["score"][token[known]]
    tags = names[label].tolist()
    ends = np.cumsum(features.word_counts()).tolist()
    return [(tags[begin:end], score[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def found_entities(example: Example, tagged: Tagged) -> list[dict[str, Any]]:
    """The entities in `example`, as predictions.json has them: `type`, `start` and `end` (the first word, and the one
    behind the last, counted from 0), `text` (the words with blanks between them) and `score` (the mean probability of
    the words' labels)."""
    labels, scores = tagged
    return [
        {
            "type": entity.type,
            "start": entity.start,
            "end": entity.end,
            "text": " ".join(example.words[entity.start : entity.end]),
            "score": float(scores[entity.start : entity.end].mean()),
        }
        for entity in entities_of(labels)
    ]
