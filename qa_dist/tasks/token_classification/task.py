"""Token classification behind the seam that the training system knows."""

import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PretrainedConfig

from qa_dist.config import RunConfig
from qa_dist.errors import TrainingError, UserError
from qa_dist.tasks.splits import Examples
from qa_dist.tasks.task import Batch, CardWords, FeatureSet, Review, Score, Task
from qa_dist.tasks.token_classification import features, scheme
from qa_dist.tasks.token_classification import review as reviewing
from qa_dist.tasks.token_classification.data import Example
from qa_dist.tasks.token_classification.decoding import decode, found_entities
from qa_dist.tasks.token_classification.features import IGNORED, TokenClassificationFeatures
from qa_dist.tasks.token_classification.labels import (
    found_labels,
    given_labels,
    head_labels,
    is_trained,
    require_same_labels,
)
from qa_dist.tasks.token_classification.metric import score_labels
from qa_dist.tasks.token_classification.scheme import entities_of, types_of
from qa_dist.tasks.token_classification.splits import Split
from qa_dist.tasks.tokenizer import load_tokenizer, train_tokenizer
from qa_dist.tasks.trial import TRIAL_TOKENS, padding_notes, trial_tokens
from qa_dist.tasks.windows import cached_windows, padding_of


class TokenClassification(Task):
    """Predict a label for the first token of every word (Devlin et al. 2019, section 5.3)."""

    name: ClassVar[str] = "token_classification"
    auto_model: ClassVar[Any] = AutoModelForTokenClassification
    best_metric: ClassVar[str] = "f1"
    headline: ClassVar[dict[str, str]] = {
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
        "accuracy": "accuracy",
        "loss": "validation loss",
    }
    per_token: ClassVar[dict[str, int]] = {"label": IGNORED, "score": 0}
    card: ClassVar[CardWords] = CardWords(
        pipeline_tag="token-classification",
        tags=("named-entity-recognition",),
        metrics={"f1": "f1", "precision": "precision", "recall": "recall", "accuracy": "accuracy"},
        unit="percent",
        summary="Named entity recognition: the model marks the parts of a text that are entities, and says of which "
        "type each is.",
        limits="The model knows the types of entities that it was trained on and no others; entities never overlap. On "
        "other kinds of texts than those it was trained on, expect it to be right less often than the figures above "
        "say.",
    )
    evaluation_files: ClassVar[tuple[str, ...]] = (reviewing.PREDICTIONS,)

    def __init__(self, config: RunConfig):
        self.config = config
        self.sources = {name: Split(config.data, name) for name in ("train", "validation", "unlabelled")}
        self.given = given_labels(config.data)
        if config.model.name or config.model.tokenizer:
            self.tokenizer = load_tokenizer(config.model)
        else:
            texts = [" ".join(example.words) for example in self.sources["train"].loaded.items]
            self.tokenizer = train_tokenizer(texts, config.model.vocab_size, config.model.config or {})
        features.words_apart(self.tokenizer)

    @cached_property
    def head(self) -> tuple[str, ...] | None:
        """The labels of the model's head, where it has one already."""
        train, cache = self.sources["train"], self.config.data.cache_dir
        return head_labels(
            self.config.model,
            self.given,
            lambda: len(found_labels(train, cache)) if train.exists else None,
            expected=not train.exists,
        )

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the order of the head's outputs: a trained head's own; else the given ones, or those of the
        training examples."""
        if self.head is not None:
            return self.head
        train = self.sources["train"]
        if self.given or train.exists:
            return self.given or found_labels(train, self.config.data.cache_dir)
        raise UserError(
            f"model.name: {self.config.model.name!r} has not been trained for token classification, or has lost the "
            "names of its labels (id2label in config.json); these can be given, in the order of its head (data.labels)"
        )

    def fit_head(self, model_config: PretrainedConfig) -> None:
        if self.head is None and not self.given and not self.sources["train"].exists:
            return  # so it is not to be trained, and that it has no head is told when it is loaded
        described = (self.config.model.config or {}).get("num_labels")
        if described is not None and described != len(self.labels):
            raise UserError(
                f"model.config: num_labels is {described}, and there are {len(self.labels)} labels; leave it out"
            )
        if is_trained(model_config) and model_config.num_labels != len(self.labels):
            raise UserError(
                f"model.name: the head has {model_config.num_labels} labels, and there are {len(self.labels)} names"
            )
        model_config.id2label = dict(enumerate(self.labels))
        model_config.label2id = {label: i for i, label in enumerate(self.labels)}

    @classmethod
    def usage(cls, repo_id: str, config: RunConfig) -> str:
        return USAGE.substitute(repo_id=repo_id, max_length=config.data.max_length, stride=config.data.stride)

    def features(self, split: str) -> FeatureSet | None:
        source = self.sources[split]
        if not source.exists:
            return None
        settings = self.config.data
        if source.is_training and self.head is not None and not self.given:
            found = found_labels(source, settings.cache_dir)
            require_same_labels(str(self.config.model.name), self.head, found, "the training examples have")
        labels = self.labels if source.is_labelled else None

        def build() -> Any:
            sizes: Any = {"max_length": settings.max_length, "stride": settings.stride}
            examples = source.loaded.items
            lenient = not source.is_training  # what a model cannot find counts as missed
            try:
                return features.build_features(examples, self.tokenizer, labels, lenient=lenient, **sizes)
            except UserError as error:
                raise UserError(f"{source.description}: {error}") from None

        table, key = cached_windows(source, self.tokenizer, settings, (features, scheme), build, labels)
        return self._features(table, key, lambda: source.loaded, labels, labelled=source.is_labelled)

    def windows(self, examples: list[Example]) -> TokenClassificationFeatures:
        """Those of `examples`, in memory and without labels."""
        sizes: dict[str, Any] = {"max_length": self.config.data.max_length, "stride": self.config.data.stride}
        table = features.build_features(examples, self.tokenizer, None, **sizes).combine_chunks()
        return self._features(table, "", lambda: Examples(examples), None, labelled=False)

    def _features(
        self,
        table: pa.Table,
        key: str,
        examples: Callable[[], Examples[Example]],
        labels: Sequence[str] | None,
        *,
        labelled: bool,
    ) -> TokenClassificationFeatures:
        side, longest = self.tokenizer.padding_side, self.config.data.max_length
        padding = padding_of(self.tokenizer)
        return TokenClassificationFeatures(table, key, padding, examples, side, longest, labelled, labels=labels)

    def try_out(self, model: nn.Module) -> list[str]:
        template = features.TextTemplate.of(self.tokenizer)
        max_length = self.config.data.max_length
        size = min(TRIAL_TOKENS, 2 * max_length // 3) - template.num_special
        if size < 1:
            return []
        text = [(token, template.text_type) for token in trial_tokens(self.tokenizer, size)]
        return padding_notes(model, self.tokenizer, [*template.before, *text, *template.behind], max_length)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Mean of the cross-entropies of the window's words; 0 where no word begins in it.

        Every window of a batch counts alike, as everywhere in this package. The loss inside transformers' models is the
        mean over all words of a batch, in which long sentences count for more, and each for more or less by what it is
        batched with.
        """
        labels = batch.targets["label"]
        losses = F.cross_entropy(output.logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return losses.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)

    def outputs(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """The likeliest label of each token, int32, and its probability."""
        score, label = output.logits.float().softmax(dim=2).max(dim=2)
        mask = batch.inputs["attention_mask"]
        place = torch.arange(mask.shape[1], device=mask.device)
        # windows that are padded on the left are moved there
        own = (place + mask.argmax(dim=1, keepdim=True)).clamp(max=mask.shape[1] - 1)
        is_token = place < mask.sum(dim=1, keepdim=True)
        return {
            "label": torch.where(is_token, label.gather(1, own), IGNORED).int(),
            "score": torch.where(is_token, score.gather(1, own), 0.0),
        }

    def score(self, outputs: dict[str, npt.NDArray[Any]], features: FeatureSet) -> Score:
        assert isinstance(features, TokenClassificationFeatures)  # what self.features made
        examples = features.examples().items
        if not np.isfinite(outputs["score"]).all():  # which the loss of data without labels does not show
            raise TrainingError("the model's outputs are not numbers: its weights are not usable")
        tagged = decode(outputs, features, list(self.labels))
        found = [found_entities(example, one) for example, one in zip(examples, tagged, strict=True)]
        files: dict[str, Any] = {
            reviewing.PREDICTIONS: {example.id: one for example, one in zip(examples, found, strict=True)},
            "predictions_summary.json": _summary(found),
        }
        if not features.labelled:
            return Score({}, files)
        predictions, references = [labels for labels, _ in tagged], [example.labels for example in examples]
        metrics = score_labels(predictions, references, types_of(self.labels))
        right = [entities_of(a) == entities_of(b) for a, b in zip(predictions, references, strict=True)]
        headline = {name: metrics.pop(name) for name in self.headline if name in metrics}
        return Score(headline | {"sentence_accuracy": 100.0 * sum(right) / len(right)} | metrics, files)

    def review(self, files: Mapping[str, Any], features: FeatureSet) -> Review:
        assert isinstance(features, TokenClassificationFeatures)  # what self.features made
        examples = features.examples().items
        windows = np.bincount(features.example, minlength=len(examples))
        return reviewing.review(examples, windows.tolist(), files)


def _summary(found: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """What the predictions are like, without any of their texts."""
    entities = [entity for one in found for entity in one]
    scores = [entity["score"] for entity in entities]
    return {
        "examples": len(found),
        "examples_without_entities": sum(not one for one in found),
        "entities": dict(Counter(entity["type"] for entity in entities).most_common()),
        "probability_of_entity": {
            f"percentile_{share}": float(np.percentile(scores, share)) if scores else None for share in (10, 50, 90)
        },
    }


USAGE = string.Template("""With qa_dist, in texts as they are:

```python
from qa_dist import TokenClassifier

classifier = TokenClassifier.from_pretrained("$repo_id")
for entity in classifier("Ada Lovelace was born in London."):
    print(entity["entity_group"], entity["word"], entity["start"], entity["end"])
```

With transformers alone, whose pipeline may take all that stands between two blanks for a word, so best in texts with
blanks around punctuation:

```python
from transformers import AutoTokenizer, pipeline

# a word's label is that of its first token; a long text is cut into windows that share $stride tokens
tokenizer = AutoTokenizer.from_pretrained("$repo_id", model_max_length=$max_length)
tag = pipeline(
    "token-classification", model="$repo_id", tokenizer=tokenizer, aggregation_strategy="first", stride=$stride
)
for entity in tag("Ada Lovelace was born in London ."):
    print(entity["entity_group"], entity["word"], entity["start"], entity["end"])
```""")
