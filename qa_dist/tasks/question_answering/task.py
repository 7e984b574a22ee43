"""Question answering behind the seam that the training system knows."""

import math
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from qa_dist.config import RunConfig
from qa_dist.tasks.question_answering import characters, data, features, synthetic
from qa_dist.tasks.question_answering import review as reviewing
from qa_dist.tasks.question_answering.characters import spans_of_whole_characters
from qa_dist.tasks.question_answering.decoding import Answers, candidates, decode, repeated
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures
from qa_dist.tasks.question_answering.metric import NO_ANSWER_ODDS, best_threshold, score_each, score_predictions
from qa_dist.tasks.question_answering.splits import Split
from qa_dist.tasks.task import Batch, CardWords, FeatureSet, Review, Score, Task
from qa_dist.tasks.tokenizer import load_tokenizer, train_tokenizer
from qa_dist.tasks.windows import cached_windows, padding_of


class QuestionAnswering(Task):
    """Predict the first and the last token of the answer (Devlin et al. 2019, section 4.2)."""

    name: ClassVar[str] = "question_answering"
    auto_model: ClassVar[Any] = AutoModelForQuestionAnswering
    texts: ClassVar[int] = 2
    best_metric: ClassVar[str] = "f1"
    headline: ClassVar[dict[str, str]] = {"exact_match": "EM", "f1": "F1", "loss": "validation loss"}
    card: ClassVar[CardWords] = CardWords(
        pipeline_tag="question-answering",
        tags=("extractive-qa",),
        metrics={"exact_match": "exact_match", "f1": "f1"},
        unit="percent",
        summary="Extractive question answering: given a question and a text, the model marks the part of the text that "
        "answers the question.",
        limits="An answer is always a part of the text that is given; the model knows nothing else. Unless it was "
        "trained on questions without an answer (`data.unanswerable` is `allow`), it gives one to every question, "
        "whether the text answers it or not. On other kinds of texts and questions than those it was trained on, "
        "expect it to be right less often than the figures above say.",
    )

    evaluation_files: ClassVar[tuple[str, ...]] = (reviewing.PREDICTIONS, reviewing.N_BEST, reviewing.NULL_ODDS)

    found_settings: ClassVar[dict[str, str]] = {
        "no_answer_threshold": "evaluation.null_score_diff_threshold",
    }

    def __init__(self, config: RunConfig):
        self.config = config
        self.train_examples = Split(config.data, "train")
        self.validation_examples = Split(config.data, "validation")
        self.unlabelled_examples = Split(config.data, "unlabelled")
        if config.model.name or config.model.tokenizer:
            self.tokenizer = load_tokenizer(config.model)
        else:
            texts = synthetic.texts(self.train_examples.loaded.items)
            self.tokenizer = train_tokenizer(texts, config.model.vocab_size, config.model.config or {})

    @classmethod
    def usage(cls, repo_id: str, config: RunConfig) -> str:
        v2 = config.data.unanswerable == "allow"
        return USAGE.substitute(
            repo_id=repo_id,
            max_length=config.data.max_length,
            stride=config.data.stride,
            max_answer_length=config.evaluation.max_answer_length,
            threshold=f", threshold={config.evaluation.null_score_diff_threshold}" if v2 else "",
            what=', or "" for none' if v2 else "",
            no_answer=NO_ANSWER if v2 else "",
        )

    def features(self, split: str) -> FeatureSet | None:
        sources = (self.train_examples, self.validation_examples, self.unlabelled_examples)
        source = next(source for source in sources if source.name == split)
        if not source.exists:
            return None
        settings = self.config.data

        def build() -> Any:
            return features.build_features(
                source.loaded.items, self.tokenizer, max_length=settings.max_length, stride=settings.stride
            )

        table, key = cached_windows(source, self.tokenizer, settings, (characters, features), build)
        return self._features(table, key, lambda: source.loaded, labelled=source.is_labelled)

    def windows(self, examples: list[data.Example], *, whole_words: bool = False) -> QuestionAnsweringFeatures:
        """Those of `examples`, in memory; with `whole_words` their tokens have the characters of whole words.

        Raises `NoRoomError` when a question leaves no room for its context.
        """
        sizes = {"max_length": self.config.data.max_length, "stride": self.config.data.stride}
        table = features.build_features(examples, self.tokenizer, **sizes, whole_words=whole_words)
        return self._features(table.combine_chunks(), "", lambda: data.Examples(examples), labelled=False)

    def _features(
        self, table: pa.Table, key: str, examples: Callable[[], data.Examples[data.Example]], *, labelled: bool
    ) -> QuestionAnsweringFeatures:
        padding, side = padding_of(self.tokenizer), self.tokenizer.padding_side
        return QuestionAnsweringFeatures(
            table, key, padding, examples, side, self.config.data.max_length, labelled=labelled
        )

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
        assert isinstance(features, QuestionAnsweringFeatures)  # what self.features made
        examples = features.examples().items
        settings = self.config.evaluation
        answers = decode(
            outputs,
            features,
            len(examples),
            n_best=settings.n_best,
            max_answer_length=settings.max_answer_length,
        )
        v2 = self.config.data.unanswerable == "allow"
        texts = _texts(answers, features, examples, v2, settings.null_score_diff_threshold)
        references = {example.id: example.answers for example in examples}
        files: dict[str, Any] = {
            "predictions.json": texts.predictions,
            "predictions_summary.json": _summary(texts, references, features.labelled),
            "nbest_predictions.json": texts.n_best,
        }
        if v2:
            files["null_odds.json"] = texts.null_odds
        if not features.labelled:
            return Score({}, files)
        if not v2:
            return Score(score_predictions(texts.predictions, references, v2=False), files)
        # What exceeds the threshold is already predicted to be empty.
        metrics = score_predictions(
            texts.predictions, references, v2=True, null_odds=texts.null_odds, na_prob_thresh=math.inf
        )
        headline = {"exact_match": metrics["exact"], "f1": metrics["f1"]}
        threshold = _tuned_threshold(texts, list(references.values()))
        return Score(headline | metrics, files, {"no_answer_threshold": threshold})

    def review(self, files: Mapping[str, Any], features: FeatureSet) -> Review:
        assert isinstance(features, QuestionAnsweringFeatures)  # what self.features made
        examples = features.examples().items
        windows = np.bincount(features.example, minlength=len(examples))
        v2 = self.config.data.unanswerable == "allow"
        threshold = self.config.evaluation.null_score_diff_threshold if v2 else None
        return reviewing.review(examples, windows, files, threshold)


USAGE = string.Template('''With transformers (5 and newer have no pipeline for question answering):

```python
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

model = AutoModelForQuestionAnswering.from_pretrained("$repo_id")
tokenizer = AutoTokenizer.from_pretrained("$repo_id")


def answer(question, context, max_length=$max_length, stride=$stride, longest=$max_answer_length$threshold):
    """The best span of at most `longest` tokens over all windows of the context$what."""
    right = tokenizer.padding_side == "right"  # models that are padded on the left read the context first
    windows = tokenizer(
        *((question, context) if right else (context, question)),
        truncation="only_second" if right else "only_first",
        max_length=max_length,
        stride=stride,
        padding=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    windows.pop("overflow_to_sample_mapping")
    offsets = windows.pop("offset_mapping")
    parts = [windows.sequence_ids(i) for i in range(len(offsets))]
    outside = torch.tensor([[part != int(right) for part in row] for row in parts])
    with torch.no_grad():
        output = model(**windows)
    start = output.start_logits.float().masked_fill(outside, -torch.inf)
    end = output.end_logits.float().masked_fill(outside, -torch.inf)
    scores = start[:, :, None] + end[:, None, :]  # [windows, first token, last token]
    spans = torch.ones(scores.shape[1:], dtype=torch.bool).triu().tril(longest - 1)
    scores = scores.masked_fill(~spans, -torch.inf)
$no_answer    window, first, last = torch.unravel_index(scores.argmax(), scores.shape)
    return context[offsets[window, first, 0] : offsets[window, last, 1]].strip()


print(answer("Where was Ada born?", "Ada was born in London and studied in Paris."))
```''')
NO_ANSWER = """\
    cls = (windows["input_ids"] == tokenizer.cls_token_id).int().argmax(dim=1, keepdim=True)
    no_answer = output.start_logits.float().gather(1, cls) + output.end_logits.float().gather(1, cls)
    if no_answer.min() - scores.max() > threshold:
        return ""
"""


class _Texts(NamedTuple):
    predictions: dict[str, str]
    """Id -> answer."""
    n_best: "NBestAnswers"
    """Id -> best answers first, with probabilities over the list."""
    best: list[str]
    """The best answer of each example, whatever the score of "no answer"."""
    null_odds: dict[str, float]
    """Id -> score of "no answer" less that of the best answer."""


def _summary(texts: "_Texts", references: dict[str, tuple[str, ...]], labelled: bool) -> dict[str, Any]:
    """What the predictions are like, without any of their texts."""
    words = np.array([len(text.split()) for text in texts.predictions.values() if text])
    probabilities = texts.n_best.highest_probabilities()
    return {
        "examples": len(references),
        **({"examples_without_answer": sum(not answers for answers in references.values())} if labelled else {}),
        "predicted_no_answer": len(texts.predictions) - len(words),
        "answer_words": {
            "mean": float(words.mean()) if len(words) else None,
            "longest": int(words.max()) if len(words) else None,
        },
        "probability_of_best_answer": {
            f"percentile_{share}": float(np.percentile(probabilities, share)) if len(probabilities) else None
            for share in (10, 50, 90)
        },
    }


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

    def highest_probabilities(self) -> npt.NDArray[np.float64]:
        """Of the best answer of each example that has any."""
        return self.columns["probability"][self.bounds[:-1][np.diff(self.bounds) > 0]]

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
