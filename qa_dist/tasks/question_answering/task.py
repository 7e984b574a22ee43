"""Question answering behind the seam that the training system knows."""

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

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
from qa_dist.tasks.question_answering.metric import ExtractiveAnswerMetric
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
        self.train_examples = _LazyExamples(config, "train")
        self.validation_examples = _LazyExamples(config, "validation")
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
        return features.QuestionAnsweringFeatures(table, key, padding, source)

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
        predictions, n_best = _texts(answers, examples, v2, settings.null_score_diff_threshold)
        metric = ExtractiveAnswerMetric("squad_v2" if v2 else "squad", keep_in_memory=True)
        metrics = metric.compute(
            predictions=list(predictions.values()), references=[list(example.answers) for example in examples]
        )
        assert metrics is not None
        return Score(metrics, {"predictions.json": predictions, "nbest_predictions.json": n_best})


class _LazyExamples:
    """The examples of one split, read when first needed: where features are cached, most processes never do."""

    def __init__(self, config: RunConfig, split: str):
        self.config = config.data
        self.split = split
        self.file = config.data.train_file if split == "train" else config.data.validation_file

    @property
    def exists(self) -> bool:
        return self.file is not None or self.config.synthetic is not None

    @cached_property
    def fingerprint(self) -> str:
        """Key of everything the examples depend on."""
        code = [Path(inspect.getfile(module)) for module in (data, synthetic)]
        if self.file is None:
            return fingerprint(self.config.synthetic, self.split, *code)
        data.require_readable(self.file)
        return fingerprint(self.file, self.config.on_misaligned, self.config.unanswerable, self.split, *code)

    @cached_property
    def loaded(self) -> data.Examples:
        if self.file is None:
            assert self.config.synthetic is not None
            return data.Examples(synthetic.generate(self.config.synthetic, self.split))
        records = data.read_records(self.file)
        return data.check_records(records, self.config, str(self.file), training=self.split == "train")

    @property
    def notes(self) -> list[str]:
        return self.loaded.notes


def _texts(
    answers: Answers, examples: list[data.Example], v2: bool, threshold: float
) -> tuple[dict[str, str], dict[str, list[dict[str, Any]]]]:
    """Predictions (id -> text) and n-best answers (id -> best first, with probabilities over the list)."""
    bounds = np.searchsorted(answers.example, np.arange(len(examples) + 1))
    predictions: dict[str, str] = {}
    n_best: dict[str, list[dict[str, Any]]] = {}
    for i, example in enumerate(examples):
        entries = [_entry(example, answers, j) for j in range(bounds[i], bounds[i + 1])]
        best = entries[0]["text"] if entries else ""
        if v2:
            null = float(answers.null_score[i])
            if not entries or null - entries[0]["score"] > threshold:
                best = ""
            entries.append({"text": "", "score": null})
            entries.sort(key=lambda entry: -entry["score"])
        scores = np.array([entry["score"] for entry in entries], dtype=np.float64)
        exponentials = np.exp(scores - scores.max()) if len(scores) else scores
        for entry, probability in zip(entries, exponentials / exponentials.sum(), strict=True):
            entry["probability"] = float(probability)
        predictions[example.id] = best
        n_best[example.id] = entries
    return predictions, n_best


def _entry(example: data.Example, answers: Answers, j: int) -> dict[str, Any]:
    start, end = span_of_whole_characters(example.context, int(answers.start_char[j]), int(answers.end_char[j]))
    return {
        "text": example.context[start:end],
        "score": float(answers.score[j]),
        "start_logit": float(answers.start_logit[j]),
        "end_logit": float(answers.end_logit[j]),
        "start": start,
        "end": end,
    }
