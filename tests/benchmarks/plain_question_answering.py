"""The plain way of question answering, as the well-known tutorials go about it: Python loops over windows, offsets,
candidates and predictions. Written to be compared with."""

import argparse
import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

N_BEST = 20
MAX_ANSWER_LENGTH = 30
Columns = dict[str, list[Any]]
Logits = npt.NDArray[np.float32]


def plain_windows(tokenizer: PreTrainedTokenizerBase, batch: Columns, settings: argparse.Namespace) -> Any:
    """The tokenizer's own windows of a batch of pairs."""
    return tokenizer(
        batch["question"],
        batch["context"],
        truncation="only_second",
        max_length=settings.max_length,
        stride=settings.stride,
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def plain_training_batch(tokenizer: PreTrainedTokenizerBase, batch: Columns, settings: argparse.Namespace) -> Columns:
    """Windows with the first and last token of the answer, found by walking over the offsets."""
    encoded = plain_windows(tokenizer, batch, settings)
    owners, all_offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    starts, ends = [], []
    for window, offsets in enumerate(all_offsets):
        cls = encoded["input_ids"][window].index(tokenizer.cls_token_id)
        answers = batch["answers"][owners[window]]
        start_token = end_token = cls
        if answers["text"]:
            start_char = answers["answer_start"][0]
            end_char = start_char + len(answers["text"][0])
            sequence = encoded.sequence_ids(window)
            first = 0
            while sequence[first] != 1:
                first += 1
            last = len(sequence) - 1
            while sequence[last] != 1:
                last -= 1
            if offsets[first][0] <= start_char and offsets[last][1] >= end_char:
                start_token, end_token = first, last
                while start_token < last and offsets[start_token + 1][0] <= start_char:
                    start_token += 1
                while end_token > first and offsets[end_token - 1][1] >= end_char:
                    end_token -= 1
        starts.append(start_token)
        ends.append(end_token)
    return {**encoded, "start_positions": starts, "end_positions": ends}


def plain_evaluation_batch(tokenizer: PreTrainedTokenizerBase, batch: Columns, settings: argparse.Namespace) -> Columns:
    """Windows with their example's id, and with no offset but those of the context."""
    encoded = plain_windows(tokenizer, batch, settings)
    owners, all_offsets = encoded.pop("overflow_to_sample_mapping"), encoded["offset_mapping"]
    ids = []
    for window in range(len(owners)):
        sequence = encoded.sequence_ids(window)
        ids.append(batch["id"][owners[window]])
        all_offsets[window] = [
            offset if sequence[place] == 1 else None for place, offset in enumerate(all_offsets[window])
        ]
    return {**encoded, "example_id": ids}


def plain_features(
    one_batch: Callable[[PreTrainedTokenizerBase, Columns, argparse.Namespace], Columns],
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    settings: argparse.Namespace,
) -> Columns:
    features: Columns = collections.defaultdict(list)
    for at in range(0, len(columns["id"]), 1000):
        batch = {name: values[at : at + 1000] for name, values in columns.items()}
        for name, values in one_batch(tokenizer, batch, settings).items():
            features[name] += values
    return features


def plain_answers(examples: Any, features: Any, all_starts: Logits, all_ends: Logits) -> tuple[Columns, dict[str, str]]:
    """Each example's n-best answers and prediction, from the best starts and ends of each of its windows.

    `examples` and `features` are sequences of rows: data sets, as in the tutorials, or lists of dictionaries.
    """
    windows_of = collections.defaultdict(list)
    for window, feature in enumerate(features):
        windows_of[feature["example_id"]].append(window)
    n_best: Columns = {}
    predictions: dict[str, str] = {}
    for example in examples:
        example_id, context = example["id"], example["context"]
        null_score = float("inf")
        found = []
        for window in windows_of[example_id]:
            start_logits, end_logits = all_starts[window], all_ends[window]
            offsets = features[window]["offset_mapping"]
            null_score = min(null_score, start_logits[0] + end_logits[0])
            starts = np.argsort(start_logits)[: -N_BEST - 1 : -1].tolist()
            ends = np.argsort(end_logits)[: -N_BEST - 1 : -1].tolist()
            for start in starts:
                for end in ends:
                    if start >= len(offsets) or end >= len(offsets):
                        continue
                    if offsets[start] is None or offsets[end] is None:
                        continue
                    if end < start or end - start + 1 > MAX_ANSWER_LENGTH:
                        continue
                    found.append(
                        {
                            "span": (offsets[start][0], offsets[end][1]),
                            "score": start_logits[start] + end_logits[end],
                            "start_logit": start_logits[start],
                            "end_logit": end_logits[end],
                        }
                    )
        found.append({"span": (0, 0), "score": null_score})
        found = sorted(found, key=lambda answer: answer["score"], reverse=True)[:N_BEST]
        for answer in found:
            begin, stop = answer.pop("span")
            answer["text"] = context[begin:stop]
        scores = np.array([answer["score"] for answer in found])
        exponentials = np.exp(scores - scores.max())
        for answer, probability in zip(found, exponentials / exponentials.sum(), strict=True):
            answer["probability"] = probability
        best = next((answer for answer in found if answer["text"]), {"text": "", "score": -float("inf")})
        predictions[example_id] = "" if null_score - best["score"] > 0 else best["text"]
        n_best[example_id] = [
            {name: float(value) if isinstance(value, np.floating) else value for name, value in answer.items()}
            for answer in found
        ]
    return n_best, predictions


def plain_normalize(text: str) -> str:
    punctuation = set(string.punctuation)
    text = "".join(character for character in text.lower() if character not in punctuation)
    text = re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)
    return " ".join(text.split())


def plain_tokens(text: str) -> list[str]:
    return plain_normalize(text).split() if text else []


def plain_exact(answer: str, prediction: str) -> int:
    return int(plain_normalize(answer) == plain_normalize(prediction))


def plain_f1(answer: str, prediction: str) -> float:
    expected, given = plain_tokens(answer), plain_tokens(prediction)
    same = sum((collections.Counter(expected) & collections.Counter(given)).values())
    if not expected or not given:
        return int(expected == given)
    if same == 0:
        return 0
    precision, recall = same / len(given), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def plain_score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of SQuAD 2.0, in percent: the best over all answers that are not empty."""
    exact, f1 = [], []
    for prediction, answers in zip(predictions, references, strict=True):
        answers = [answer for answer in answers if plain_normalize(answer)] or [""]
        exact.append(max(plain_exact(answer, prediction) for answer in answers))
        f1.append(max(plain_f1(answer, prediction) for answer in answers))
    return {"exact_match": 100.0 * sum(exact) / len(exact), "f1": 100.0 * sum(f1) / len(f1)}


class PlainMetric(evaluate.Metric):
    """The plain way behind `evaluate`, with the columns of its metric for SQuAD 2.0."""

    def _info(self) -> evaluate.MetricInfo:
        text, number = datasets.Value("string"), datasets.Value("float32")
        answers = datasets.Features(
            {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
        )
        features = datasets.Features(
            {
                "predictions": {"id": text, "prediction_text": text, "no_answer_probability": number},
                "references": {"id": text, "answers": answers},
            }
        )
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:  # pyright: ignore
        texts = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        answers = [reference["answers"]["text"] for reference in references]
        return plain_score([texts[reference["id"]] for reference in references], answers)
