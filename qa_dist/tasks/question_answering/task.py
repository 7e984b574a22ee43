"""Question answering behind the seam that the training system knows."""

import inspect
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from qa_dist.config import RunConfig
from qa_dist.tasks.cache import cached_table, fingerprint
from qa_dist.tasks.question_answering import data, features, synthetic
from qa_dist.tasks.question_answering.decoding import Answers, candidates, decode, span_of_whole_characters
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures
from qa_dist.tasks.question_answering.metric import (
    ExtractiveAnswerMetric,
    best_threshold,
    by_answerability,
    percent,
    score_each,
)
from qa_dist.tasks.question_answering.splits import Split
from qa_dist.tasks.task import Batch, FeatureSet, Score, Task
from qa_dist.tasks.tokenizer import load_tokenizer, train_tokenizer


class QuestionAnswering(Task):
    """Predict the first and the last token of the answer (Devlin et al. 2019, section 4.2)."""

    name: ClassVar[str] = "question_answering"
    auto_model: ClassVar[Any] = AutoModelForQuestionAnswering
    best_metric: ClassVar[str] = "f1"
    headline: ClassVar[dict[str, str]] = {"exact_match": "EM", "f1": "F1", "loss": "loss"}

    def __init__(self, config: RunConfig):
        self.config = config
        self.train_examples = Split(config.data, "train")
        self.validation_examples = Split(config.data, "validation")
        if config.model.name or config.model.tokenizer:
            self.tokenizer = load_tokenizer(config.model)
        else:
            texts = synthetic.texts(self.train_examples.loaded.items)
            self.tokenizer = train_tokenizer(texts, config.model.vocab_size, config.model.config or {})

    def features(self, split: str) -> FeatureSet | None:
        source = self.train_examples if split == "train" else self.validation_examples
        if not source.exists:
            return None
        settings = self.config.data
        backend: Any = self.tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        key = fingerprint(
            source.fingerprint,
            backend.to_str(),
            self.tokenizer.model_input_names,
            self.tokenizer.padding_side,
            tokenizers.__version__,
            settings.max_length,
            settings.stride,
            Path(inspect.getfile(features)),
        )

        def build() -> Any:
            return features.build_features(
                source.loaded.items, self.tokenizer, max_length=settings.max_length, stride=settings.stride
            )

        table = cached_table(settings.cache_dir, key, build)
        padding = {
            "input_ids": int(self.tokenizer.pad_token_id or 0),  # pyright: ignore[reportArgumentType]
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        side = self.tokenizer.padding_side
        return features.QuestionAnsweringFeatures(table, key, padding, lambda: source.loaded, side)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Mean of the cross-entropies of the start and of the end position."""
        padding = batch.inputs["attention_mask"] == 0
        # Padding takes no part in the softmax: the loss does not depend on what a window is batched with.
        start = output.start_logits.float().masked_fill(padding, -torch.inf)
        end = output.end_logits.float().masked_fill(padding, -torch.inf)
        start_loss = F.cross_entropy(start, batch.targets["start_position"], reduction="none")
        return (start_loss + F.cross_entropy(end, batch.targets["end_position"], reduction="none")) / 2

    def outputs(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        targets = batch.targets
        spans = (targets["context_begin"], targets["context_end"], targets["cls"])
        n_best = self.config.evaluation.n_best
        return candidates(output.start_logits, output.end_logits, *spans, n_best=n_best)

    def score(self, outputs: dict[str, npt.NDArray[Any]], features: FeatureSet) -> Score:
        examples = self.validation_examples.loaded.items
        settings = self.config.evaluation
        answers = decode(
            outputs,
            features,  # pyright: ignore[reportArgumentType] -- what self.features made
            len(examples),
            n_best=settings.n_best,
            max_answer_length=settings.max_answer_length,
        )
        v2 = self.config.data.unanswerable == "allow"
        texts = _texts(answers, features, examples, v2, settings.null_score_diff_threshold)  # pyright: ignore[reportArgumentType]
        references = [list(example.answers) for example in examples]
        files: dict[str, Any] = {"predictions.json": texts.predictions, "nbest_predictions.json": texts.n_best}
        metric = ExtractiveAnswerMetric("squad_v2" if v2 else "squad", keep_in_memory=True)
        predictions = list(texts.predictions.values())
        metrics = metric.compute(predictions=predictions, references=references)
        assert metrics is not None
        if not v2:
            return Score(metrics, files)
        files["null_odds.json"] = texts.null_odds
        no_answer = _no_answer_figures(texts, references)
        return Score(metrics | no_answer, files, {"no_answer_threshold": _tuned_threshold(texts, references)})


class _Texts(NamedTuple):
    predictions: dict[str, str]
    """Id -> answer."""
    n_best: dict[str, list[dict[str, Any]]]
    """Id -> best answers first, with probabilities over the list."""
    best: list[str]
    """The best answer of each example, whatever the score of "no answer"."""
    null_odds: dict[str, float]
    """Id -> score of "no answer" less that of the best answer."""


def _no_answer_figures(texts: _Texts, references: list[list[str]]) -> dict[str, float]:
    """What SQuAD 2.0's official script says of predictions.json and null_odds.json beside the headline figures."""
    predictions = list(texts.predictions.values())
    exact, overlap = score_each(predictions, references, v2=True)
    has_answer = np.array([bool(answers) for answers in references])
    odds, is_empty = np.array(list(texts.null_odds.values())), np.array([not text for text in predictions])
    result = {"exact": percent(exact)} | by_answerability(exact, overlap, has_answer)
    for name, scores in (("exact", exact), ("f1", overlap)):
        best, threshold = best_threshold(scores, odds, has_answer, is_empty)
        result |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return result


def _tuned_threshold(texts: _Texts, references: list[list[str]]) -> float:
    """The null_score_diff_threshold that would have given the highest F1. Unlike the official search, it sees the
    answers that the present threshold suppresses."""
    _, overlap = score_each(texts.best, references, v2=True)
    has_answer = np.array([bool(answers) for answers in references])
    odds = np.array(list(texts.null_odds.values()))
    return best_threshold(overlap, odds, has_answer, np.array([not text for text in texts.best]))[1]


def _texts(
    answers: Answers, features: QuestionAnsweringFeatures, examples: list[data.Example], v2: bool, threshold: float
) -> _Texts:
    bounds = np.searchsorted(answers.example, np.arange(len(examples) + 1))
    window = answers.feature - np.searchsorted(features.example, answers.example)
    result = _Texts({}, {}, [], {})
    for i, example in enumerate(examples):
        # two spans of tokens may be the same characters once blanks at their edges are left out
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for j in range(bounds[i], bounds[i + 1]):
            entry = _entry(example, answers, int(window[j]), j)
            found.setdefault((entry["start"], entry["end"]), entry)
        entries = list(found.values())
        best = entries[0]["text"] if entries else ""
        result.best.append(best)
        if v2:
            null = float(answers.null_score[i])
            odds = null - entries[0]["score"] if entries else NO_ANSWER_ODDS
            result.null_odds[example.id] = odds
            best = "" if odds > threshold else best
            entries.append({"text": "", "score": null})
            entries.sort(key=lambda entry: -entry["score"])
        scores = np.array([entry["score"] for entry in entries], dtype=np.float64)
        exponentials = np.exp(scores - scores.max()) if len(scores) else scores
        for entry, probability in zip(entries, (exponentials / exponentials.sum()).tolist(), strict=True):
            entry["probability"] = probability
        result.predictions[example.id] = best
        result.n_best[example.id] = entries
    return result


NO_ANSWER_ODDS = 1e6
"""Null odds of an example whose windows hold no token that could be an answer."""


def _entry(example: data.Example, answers: Answers, window: int, j: int) -> dict[str, Any]:
    start, end = span_of_whole_characters(example.context, int(answers.start_char[j]), int(answers.end_char[j]))
    return {
        "text": example.context[start:end],
        "score": float(answers.score[j]),
        "start_logit": float(answers.start_logit[j]),
        "end_logit": float(answers.end_logit[j]),
        "start": start,
        "end": end,
        "window": window,
    }
