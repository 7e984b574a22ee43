"""Question answering behind the seam that the training system knows."""

import math
import string
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering

from qa_dist.config import RunConfig
from qa_dist.tasks.model_config import is_causal
from qa_dist.tasks.question_answering import characters, data, features, layout, synthetic, trial
from qa_dist.tasks.question_answering import review as reviewing
from qa_dist.tasks.question_answering.answers import Texts, find_answers
from qa_dist.tasks.question_answering.decoding import candidates
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures
from qa_dist.tasks.question_answering.layout import PairTemplate
from qa_dist.tasks.question_answering.metric import best_threshold, score_each, score_predictions
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
        self.causal = is_causal(config.model)
        """Whether the model's tokens see only those before them."""
        if config.model.name or config.model.tokenizer:
            self.tokenizer = load_tokenizer(config.model)
        else:
            texts = synthetic.texts(self.train_examples.loaded.items)
            self.tokenizer = train_tokenizer(texts, config.model.vocab_size, config.model.config or {})
        if self.causal:  # the question comes first, and padding that no token sees changes no position
            self.tokenizer.padding_side = "right"

    @classmethod
    def usage(cls, repo_id: str, config: RunConfig) -> str:
        v2, threshold = config.data.unanswerable == "allow", config.evaluation.null_score_diff_threshold
        return USAGE.substitute(
            repo_id=repo_id,
            max_length=config.data.max_length,
            stride=config.data.stride,
            max_answer_length=config.evaluation.max_answer_length,
            threshold=f", threshold={threshold}" if v2 else "",
            stored=STORED.format(threshold) if v2 else "",
            what=', or "" for none' if v2 else "",
            no_answer=NO_ANSWER if v2 else "",
            where=WHERE_NO_ANSWER if v2 else "",
        )

    def features(self, split: str) -> FeatureSet | None:
        sources = (self.train_examples, self.validation_examples, self.unlabelled_examples)
        source = next(source for source in sources if source.name == split)
        if not source.exists:
            return None
        settings = self.config.data

        def build() -> Any:
            return self._table(source.loaded.items)

        template = PairTemplate.of(self.tokenizer, causal=self.causal)
        modules = (characters, features, layout)
        table, key = cached_windows(source, self.tokenizer, settings, modules, build, template)
        return self._features(table, key, lambda: source.loaded, labelled=source.is_labelled)

    def windows(self, examples: list[data.Example], *, whole_words: bool = False) -> QuestionAnsweringFeatures:
        """Those of `examples`, in memory; with `whole_words` their tokens have the characters of whole words.

        Raises `NoRoomError` when a question leaves no room for its context.
        """
        table = self._table(examples, whole_words=whole_words).combine_chunks()
        return self._features(table, "", lambda: data.Examples(examples), labelled=False)

    def _table(self, examples: list[data.Example], *, whole_words: bool = False) -> pa.Table:
        sizes = {"max_length": self.config.data.max_length, "stride": self.config.data.stride}
        return features.build_features(examples, self.tokenizer, **sizes, whole_words=whole_words, causal=self.causal)

    def _features(
        self, table: pa.Table, key: str, examples: Callable[[], data.Examples[data.Example]], *, labelled: bool
    ) -> QuestionAnsweringFeatures:
        padding, side = padding_of(self.tokenizer), self.tokenizer.padding_side
        return QuestionAnsweringFeatures(
            table, key, padding, examples, side, self.config.data.max_length, labelled=labelled
        )

    def try_out(self, model: nn.Module) -> list[str]:
        template = PairTemplate.of(self.tokenizer, causal=self.causal)
        return trial.try_out(model, self.tokenizer, template, self.config.data.max_length)

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
        v2 = self.config.data.unanswerable == "allow"
        threshold = settings.null_score_diff_threshold if v2 else None
        texts = find_answers(
            outputs, features, n_best=settings.n_best, max_answer_length=settings.max_answer_length, threshold=threshold
        )
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


USAGE = string.Template('''With qa_dist:

```python
from qa_dist import QuestionAnswerer

answerer = QuestionAnswerer.from_pretrained("$repo_id")
print(answerer("Where was Ada born?", "Ada was born in London and studied in Paris.")["answer"])
```

These are the answers that the evaluation above scored$stored. `decoding="pipeline"` gives the answers and scores of the
question answering pipeline that transformers 5 removed, which may be others.

With transformers alone, the answers that the evaluation scored$where:

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
STORED = """, but for the threshold of "no answer": the stored one, which gave the highest F1, is used
(`no_answer_threshold={}` is the evaluation's)"""
WHERE_NO_ANSWER = """; for models whose windows hold a classification token, which stands for "no answer". In those of
models that read from left to right, and of tokenizers without such a token, the last token does: ask these
with qa_dist"""
NO_ANSWER = """\
    cls = (windows["input_ids"] == tokenizer.cls_token_id).int().argmax(dim=1, keepdim=True)
    no_answer = output.start_logits.float().gather(1, cls) + output.end_logits.float().gather(1, cls)
    if no_answer.min() - scores.max() > threshold:
        return ""
"""


def _summary(texts: Texts, references: dict[str, tuple[str, ...]], labelled: bool) -> dict[str, Any]:
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


def _tuned_threshold(texts: Texts, references: list[tuple[str, ...]]) -> float:
    """The null_score_diff_threshold that would have given the highest F1. Unlike the official search, it sees the
    answers that the present threshold suppresses."""
    _, overlap = score_each(texts.best, references, v2=True)
    has_answer = np.array([bool(answers) for answers in references])
    odds = np.array(list(texts.null_odds.values()))
    return best_threshold(overlap, odds, has_answer, np.array([not text for text in texts.best]))[1]
