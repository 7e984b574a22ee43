"""Question answering behind the seam that the training system knows."""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from qa_dist.tasks.question_answering import characters, data, features, synthetic
from qa_dist.tasks.question_answering.characters import spans_of_whole_characters
from qa_dist.tasks.question_answering.decoding import Answers, candidates, decode, repeated
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures
from qa_dist.tasks.question_answering.metric import best_threshold, score_each, score_predictions
from qa_dist.tasks.question_answering.splits import Split
from qa_dist.tasks.task import Batch, FeatureSet, Score, Task
from qa_dist.tasks.tokenizer import load_tokenizer, train_tokenizer


class QuestionAnswering(Task):
    """Predict the first and the last token of the answer (Devlin et al. 2019, section 4.2)."""

    name: ClassVar[str] = "question_answering"
    auto_model: ClassVar[Any] = AutoModelForQuestionAnswering
    best_metric: ClassVar[str] = "f1"
    headline: ClassVar[dict[str, str]] = {"exact_match": "EM", "f1": "F1", "loss": "validation loss"}

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
            *(Path(inspect.getfile(module)) for module in (characters, features)),
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
        return features.QuestionAnsweringFeatures(table, key, padding, lambda: source.loaded, side, settings.max_length)

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
        references = {example.id: example.answers for example in examples}
        files: dict[str, Any] = {"predictions.json": texts.predictions, "nbest_predictions.json": texts.n_best}
        if not v2:
            return Score(score_predictions(texts.predictions, references, v2=False), files)
        files["null_odds.json"] = texts.null_odds
        # What exceeds the threshold is already predicted to be empty.
        metrics = score_predictions(
            texts.predictions, references, v2=True, null_odds=texts.null_odds, na_prob_thresh=math.inf
        )
        headline = {"exact_match": metrics["exact"], "f1": metrics["f1"]}
        threshold = _tuned_threshold(texts, list(references.values()))
        return Score(headline | metrics, files, {"no_answer_threshold": threshold})


class _Texts(NamedTuple):
    predictions: dict[str, str]
    """Id -> answer."""
    n_best: "NBestAnswers"
    """Id -> best answers first, with probabilities over the list."""
    best: list[str]
    """The best answer of each example, whatever the score of "no answer"."""
    null_odds: dict[str, float]
    """Id -> score of "no answer" less that of the best answer."""


def _tuned_threshold(texts: _Texts, references: list[tuple[str, ...]]) -> float:
    """The null_score_diff_threshold that would have given the highest F1. Unlike the official search, it sees the
    answers that the present threshold suppresses."""
    _, overlap = score_each(texts.best, references, v2=True)
    has_answer = np.array([bool(answers) for answers in references])
    odds = np.array(list(texts.null_odds.values()))
    return best_threshold(overlap, odds, has_answer, np.array([not text for text in texts.best]))[1]


def _texts(
    answers: Answers, features: QuestionAnsweringFeatures, examples: list[data.Example], v2: bool, threshold: float
) -> _Texts:
    contexts = [example.context for example in examples]
    starts, ends = spans_of_whole_characters(contexts, answers.example, answers.start_char, answers.end_char)
    # two spans of tokens may be the same characters once blanks at their edges are left out
    double = repeated(answers.example, starts, ends)
    kept = np.delete(np.arange(len(starts)), double)
    owner, score, starts, ends = answers.example[kept], answers.score[kept], starts[kept], ends[kept]
    counts = np.bincount(owner, minlength=len(examples))
    bounds = np.concatenate([[0], np.cumsum(counts)])
    has_any = counts > 0
    first = bounds[:-1][has_any]
    highest = np.full(len(examples), -np.inf)
    highest[has_any] = score[first]
    null = answers.null_score.astype(np.float64)
    odds = np.where(has_any, null - highest, NO_ANSWER_ODDS)
    best = [""] * len(examples)
    for i, start, end in zip(
        np.flatnonzero(has_any).tolist(), starts[first].tolist(), ends[first].tolist(), strict=True
    ):
        best[i] = contexts[i][start:end]
    ids = [example.id for example in examples]
    suppressed = (odds > threshold).tolist() if v2 else [False] * len(examples)
    predictions = {name: "" if none else text for name, text, none in zip(ids, best, suppressed, strict=True)}

    # softmax over the answers of each example and, in SQuAD 2.0, "no answer"
    top = np.maximum(highest, null) if v2 else highest
    weights = np.exp(score - top[owner])
    null_weights = np.exp(null - top) if v2 else np.zeros(len(examples))
    total = np.bincount(owner, weights, minlength=len(examples)) + null_weights
    columns = {
        "start": starts,
        "end": ends,
        "score": score,
        "start_logit": answers.start_logit[kept],
        "end_logit": answers.end_logit[kept],
        "window": answers.feature[kept] - np.searchsorted(features.example, owner),
        "probability": weights / total[owner],
    }
    no_answer = None
    if v2:  # behind the answers of the same score
        ahead = np.bincount(owner[score >= null[owner]], minlength=len(examples))
        shares = null_weights / np.where(total > 0, total, 1)
        no_answer = list(zip(ahead.tolist(), null.tolist(), shares.tolist(), strict=True))
    n_best = NBestAnswers(dict(zip(ids, range(len(ids)), strict=True)), contexts, bounds, columns, no_answer)
    null_odds = dict(zip(ids, odds.tolist(), strict=True)) if v2 else {}
    return _Texts(predictions, n_best, best, null_odds)


NO_ANSWER_ODDS = 1e6
"""Null odds of an example whose windows hold no token that could be an answer."""


@dataclass(frozen=True)
class NBestAnswers(Mapping[str, list[dict[str, Any]]]):
    """Id -> best answers first, with probabilities over the list.

    The lists are made when they are asked for: those of all examples at once are a hundred times as large as what
    they are made of.
    """

    rows: dict[str, int]
    contexts: list[str]
    bounds: npt.NDArray[np.int64]
    """The answers of example i are `bounds[i]` to `bounds[i + 1]` of the columns."""
    columns: dict[str, npt.NDArray[Any]]
    no_answer: list[tuple[int, float, float]] | None
    """For each example the place, the score and the probability of "no answer"."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __getitem__(self, key: str) -> list[dict[str, Any]]:
        i = self.rows[key]
        context, own = self.contexts[i], slice(self.bounds[i], self.bounds[i + 1])
        entries: list[dict[str, Any]] = [
            {
                "text": context[start:end],
                "score": score,
                "start_logit": start_logit,
                "end_logit": end_logit,
                "start": start,
                "end": end,
                "window": window,
                "probability": probability,
            }
            for start, end, score, start_logit, end_logit, window, probability in zip(
                *(column[own].tolist() for column in self.columns.values()), strict=True
            )
        ]
        if self.no_answer is not None:
            place, score, probability = self.no_answer[i]
            entries.insert(place, {"text": "", "score": score, "probability": probability})
        return entries
