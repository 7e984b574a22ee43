"""Which labels there are, and in which order: those of a trained head, given ones, or those found in the data."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import AutoConfig, PretrainedConfig

from qa_dist.config import DataConfig, ModelConfig
from qa_dist.errors import UserError, listing
from qa_dist.tasks.cache import cached_table, fingerprint
from qa_dist.tasks.token_classification import scheme
from qa_dist.tasks.token_classification.scheme import OUTSIDE, in_order, is_label
from qa_dist.tasks.token_classification.splits import Split


def given_labels(config: DataConfig) -> tuple[str, ...]:
    """Those of data.labels. Raises `UserError` for names that cannot be labels."""
    labels = config.labels
    strange = [label for label in labels if not is_label(label)]
    double = sorted({label for label in labels if labels.count(label) > 1})
    if strange:
        raise UserError(f"data.labels: {listing(strange)}: a label is O, or B- or I- and a type (IOB2)")
    if double:
        raise UserError(f"data.labels: {listing(double)}: a label is named twice")
    if labels and OUTSIDE not in labels:
        raise UserError("data.labels: O is not among them, the label of words outside of all entities")
    return labels


def found_labels(source: Split, cache_dir: Path | None) -> tuple[str, ...]:
    """Return the labels of `source`: named by its data set, or found in all of its examples, however many of them are
    asked for, and then kept in the cache. Names that are no labels, such as that of padding, are not among them; if a
    word has one, reading the examples reports it.

    Raises `UserError` where there is but `O`.
    """
    if named := [name for name in source.names if is_label(name)]:
        return tuple(dict.fromkeys(named if OUTSIDE in named else [OUTSIDE, *named]))
    key = fingerprint("labels of all", source.fingerprint, Path(inspect.getfile(scheme)))

    def build() -> pa.Table:
        return pa.table({"label": in_order(label for example in source.whole.items for label in example.labels)})

    found = tuple(cached_table(cache_dir, key, build).column("label").to_pylist())
    if found == (OUTSIDE,):
        raise UserError(
            "the training examples hold no entity: all tags are O. If they stand in another column, say in which with "
            "data.columns"
        )
    return found


def is_trained(model_config: PretrainedConfig) -> bool:
    """Whether the model has a head for this task already."""
    return any("ForTokenClassification" in str(name) for name in model_config.architectures or ())


def labels_of(model_config: PretrainedConfig) -> tuple[str, ...]:
    """Of a model's head, in the order of its outputs."""
    names: dict[Any, Any] = model_config.id2label or {}
    return tuple(str(names[i]) for i in sorted(names))


def head_labels(
    model: ModelConfig, given: Sequence[str], count: Callable[[], int | None], *, expected: bool
) -> tuple[str, ...] | None:
    """The labels of the head that `model` has; None where it has none yet, or cannot be read.

    A head may have names that say nothing (LABEL_0, LABEL_1, …): then `given` ones, as many, are its names. `count` is
    that of the labels of the training examples, for the message. `expected`: the model is not to be trained, so that
    names tell of a head even where the config's architecture does not. Raises `UserError` for labels that this task
    does not know, and where `given` ones are others than the head's.
    """
    if model.name is None:
        return None
    try:
        model_config = AutoConfig.from_pretrained(model.name, trust_remote_code=model.trust_remote_code)
    except Exception:  # whatever a config that came from elsewhere makes transformers raise
        return None  # loading the model will tell what is wrong
    own = labels_of(model_config)
    is_nameless = list(own) == [f"LABEL_{i}" for i in range(len(own))]
    if not is_trained(model_config) and (is_nameless or not expected):
        return None
    if is_nameless:
        if not given:
            others = count()
            raise UserError(
                f"model.name: {model.name!r} has a head for {len(own)} labels"
                + (f", the training examples have {others}" if others not in (None, len(own)) else "")
                + f"; and no names for them ({listing(own, 3)}): name them, in the order of the head, with data.labels"
                + (" (to ask it: with labels)" if expected else "")
            )
        if len(given) == len(own):
            return tuple(given)
    if double := sorted({label for label in own if own.count(label) > 1}):
        raise UserError(f"model.name: {model.name!r} has more than one label of a name ({listing(double)})")
    if given:
        require_same_labels(model.name, own, given, "data.labels has")
    if strange := [label for label in own if not is_label(label)]:
        raise UserError(
            f"model.name: {model.name!r} tells labels apart that are no entities in IOB2 ({listing(strange)}), which "
            "has O, B-TYPE and I-TYPE, so it cannot be used here"
            + ("" if expected else ". Start from the model that it was made of")
        )
    return own


def require_same_labels(name: str, head: Sequence[str], others: Sequence[str], whose: str) -> None:
    """Raise `UserError` unless `head`, of the model called `name`, has the labels `others`, in any order."""
    if set(head) == set(others):
        return
    missing, unused = (sorted(set(a) - set(b)) for a, b in ((others, head), (head, others)))
    parts = [f"only the model has {listing(unused)}"] if unused else []
    parts += [f"it lacks {listing(missing)}"] if missing else []
    raise UserError(
        f"model.name: {name!r} has a head for {len(head)} labels, and {whose} {len(others)}: {'; '.join(parts)}. Name "
        "the model's labels with data.labels, if it has all that are needed; else start from the model that it was "
        "made of"
    )
