"""The published algorithm of transformers' question-answering pipeline as of version 4.57, the last with one.

Written anew from its description, one question and one window at a time, with the tokenizer's own windows, NumPy and
plain loops: nothing of it is shared with the package.
"""

from typing import Any

import numpy as np
import torch


def pipeline_answers(
    model: Any,
    tokenizer: Any,
    question: str,
    context: str,
    *,
    top_k: int,
    max_answer_length: int,
    max_length: int,
    stride: int,
    align_to_words: bool = True,
    handle_impossible_answer: bool = False,
) -> list[dict[str, Any]]:
    """For models that read the question first."""
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    answers: list[dict[str, Any]] = []
    null = 1e6
    for window in range(len(encoded["input_ids"])):
        ids, encoding = encoded["input_ids"][window], encoded[window]
        start, end, allowed = _probabilities(model, tokenizer, encoded, window)
        null = min(null, start[0] * end[0])
        start[0] = end[0] = 0.0
        table = np.tril(np.triu(np.outer(start, end)), max_answer_length - 1)
        candidates = 2 * top_k + 10 if align_to_words else top_k
        for place in np.argsort(-table, axis=None, kind="stable")[:candidates]:
            first, last = divmod(int(place), len(ids))
            if not (allowed[first] and allowed[last] and table[first, last] > 0):
                continue
            begin, stop = encoding.offsets[first][0], encoding.offsets[last][1]
            if align_to_words and None not in (encoding.word_ids[first], encoding.word_ids[last]):
                begin = encoding.word_to_chars(encoding.word_ids[first], 1)[0]
                stop = encoding.word_to_chars(encoding.word_ids[last], 1)[1]
            text = context[begin:stop]
            same = [answer for answer in answers if answer["answer"].lower() == text.lower()]
            if same:
                same[0]["score"] += table[first, last]
            else:
                answers.append({"score": table[first, last], "start": begin, "end": stop, "answer": text})
    if handle_impossible_answer:
        answers.append({"score": null, "start": 0, "end": 0, "answer": ""})
    return sorted(answers, key=lambda answer: -answer["score"])[:top_k]


def _probabilities(model: Any, tokenizer: Any, encoded: Any, window: int) -> tuple[Any, Any, Any]:
    """Of each token to be the start and the end, and whether it may be."""
    names = [name for name in tokenizer.model_input_names if name in encoded]
    with torch.no_grad():
        output = model(**{name: torch.tensor([encoded[name][window]]) for name in names})
    ids = np.array(encoded["input_ids"][window])
    allowed = np.array([part == 1 for part in encoded.sequence_ids(window)]) | (ids == tokenizer.cls_token_id)
    both = []
    for logits in (output.start_logits, output.end_logits):
        values = np.where(allowed, logits[0].double().numpy(), -10000.0)
        weights = np.exp(values - values.max())
        both.append(weights / weights.sum())
    return both[0], both[1], allowed
