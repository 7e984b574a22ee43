"""The labels of a model's head and those of the data: the same, or told apart before anything runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from qa_dist.config import RunConfig
from qa_dist.errors import UserError
from qa_dist.tasks.task import FeatureSet
from qa_dist.tasks.token_classification.task import TokenClassification
from qa_dist.training.models import build_model
from tests.helpers import SIZES
from tests.tokenizers import wordpiece_tokenizer

TRAIN = "Ada B-PER\nlives O\nin O\nNew B-LOC\nYork I-LOC\n\nBo B-PER\nX I-PER\n"
LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
"""As they are ordered when they are found."""


def model_dir(path: Path, auto_model: Any = AutoModelForTokenClassification, labels: list[str] | int = 2) -> Path:
    tokenizer = wordpiece_tokenizer([TRAIN] * 5)
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else labels
    config = AutoConfig.for_model(
        "bert",
        **SIZES,
        vocab_size=len(tokenizer),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    auto_model.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run_config(tmp_path: Path, model: Path | None, *, validation: str = TRAIN, **data: Any) -> RunConfig:
    (tmp_path / "train.conll").write_text(TRAIN)
    (tmp_path / "dev.conll").write_text(validation)
    files = {"train_file": (str(tmp_path / "train.conll"),), "validation_file": (str(tmp_path / "dev.conll"),)}
    return RunConfig.model_validate(
        {
            "task": "token_classification",
            "data": {"max_length": 32, "stride": 8, "cache_dir": tmp_path / "cache", **files, **data},
            "model": {"name": str(model)} if model else {"config": {"model_type": "bert", **SIZES}, "vocab_size": 400},
        }
    )


def built(config: RunConfig, trained: bool = False) -> tuple[Any, FeatureSet]:
    task = TokenClassification(config)
    features = task.features("validation" if trained else "train")
    assert features is not None
    return build_model(config, task, trained=trained)[0], features


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_new_head_is_made_for_the_labels(tmp_path: Path, pretrained: bool):
    path = model_dir(tmp_path / "model", AutoModel) if pretrained else None
    model, _ = built(run_config(tmp_path, path))
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert model.num_labels == model.classifier.out_features == 5


def test_a_trained_head_with_the_same_labels_in_another_order_keeps_its_order(tmp_path: Path):
    order = ["I-PER", "O", "B-PER", "B-LOC", "I-LOC"]
    path = model_dir(tmp_path / "model", labels=order)
    model, features = built(run_config(tmp_path, path))
    assert list(model.config.id2label.values()) == order
    batch = features.collate(torch.arange(1).numpy())
    labels = [order[i] for i in batch.targets["label"][0].tolist() if i >= 0]
    assert labels == ["B-PER", "O", "O", "B-LOC", "I-LOC"]
    before = AutoModelForTokenClassification.from_pretrained(path).classifier.weight
    assert torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        (
            ["O", "B-PER", "I-PER"],
            (),
            "has a head for 3 labels, and the training examples have 5: it lacks B-LOC, I-LOC",
        ),
        (
            [*LABELS, "B-X", "I-X"],
            (),
            "a head for 7 labels, and the training examples have 5: only the model has B-X, I-X",
        ),
        ([*LABELS[:4], "I-X"], (), "only the model has I-X; it lacks I-PER"),
        (LABELS, tuple(LABELS[:3]), "has a head for 5 labels, and data.labels has 3"),
        (7, tuple(LABELS), "has a head for 7 labels, and data.labels has 5"),
        (
            7,
            (),
            "has a head for 7 labels, the training examples have 5; and no names for them (LABEL_0, LABEL_1, LABEL_2",
        ),
        (5, (), "has a head for 5 labels; and no names for them"),
        (["NOUN", "VERB"], (), "tells labels apart that are no entities in IOB2 (NOUN, VERB)"),
    ],
)
def test_a_head_for_other_labels_is_refused(tmp_path: Path, labels: Any, given: tuple[str, ...], expected: str):
    path = model_dir(tmp_path / "model", labels=labels)
    with pytest.raises(UserError) as error:
        built(run_config(tmp_path, path, labels=given))
    assert expected in str(error.value)


def test_a_head_with_labels_that_the_data_lack_is_trained_on_where_they_are_given(tmp_path: Path):
    labels = ["I-X", *LABELS, "B-X"]
    path = model_dir(tmp_path / "model", labels=labels)
    model, _ = built(run_config(tmp_path, path, labels=(*LABELS, "B-X", "I-X")))
    assert list(model.config.id2label.values()) == labels


def test_a_head_without_names_gets_those_that_are_given(tmp_path: Path):
    path = model_dir(tmp_path / "model", labels=5)
    model, _ = built(run_config(tmp_path, path, labels=tuple(reversed(LABELS))))
    assert list(model.config.id2label.values()) == LABELS[::-1]


def test_evaluation_takes_the_heads_labels_and_reads_no_training_data(tmp_path: Path):
    path = model_dir(tmp_path / "model", labels=[*LABELS, "B-X"])
    config = run_config(tmp_path, path, validation="Ada B-PER\nX B-X\n")
    (tmp_path / "train.conll").write_text("broken")
    model, features = built(config, trained=True)
    assert model.num_labels == 6
    assert features.collate(torch.arange(1).numpy()).targets["label"].max() == 5


def test_labels_that_training_lacks_count_as_missed(tmp_path: Path):
    config = run_config(tmp_path, None, validation="Ada B-PER\nX B-X\n\nY I-X\n\nZ B-X\n")
    task = TokenClassification(config)
    features: Any = task.features("validation")
    dev = tmp_path / "dev.conll"
    assert task.labels == tuple(LABELS)
    assert (
        "the model does not know these labels, so their entities count as missed: "
        f"'B-X' ({dev}:2, {dev}:6); 'I-X' ({dev}:4)" in features.notes
    )
    batch = features.collate(torch.arange(3).numpy())
    assert sorted(batch.targets["label"].unique().tolist()) == [-100, LABELS.index("B-PER")]
    output = SimpleNamespace(logits=torch.full((*batch.targets["label"].shape, 5), -9.0))
    output.logits[0, :, LABELS.index("B-PER")] = 9.0  # the other sentences: O, as all are equal
    outputs = task.outputs(output, batch)
    rows = [[name[i, : features.lengths[i]] for i in range(3)] for name in outputs.values()]
    joined = {name: torch.cat(parts).numpy() for name, parts in zip(outputs, rows, strict=True)}
    metrics = task.score(joined, features).metrics
    assert metrics["X_number"] == 3 and metrics["X_recall"] == 0 and metrics["recall"] == 25.0
    assert torch.isfinite(task.loss(output, batch)).all()
    fewer = run_config(tmp_path, None, validation="Ada B-PER\n")  # labels that only the training data have are fine
    assert TokenClassification(fewer).features("validation") is not None


def test_a_label_of_the_training_data_that_is_not_given_is_an_error(tmp_path: Path):
    config = run_config(tmp_path, None, labels=("O", "B-PER", "I-PER"))
    with pytest.raises(UserError, match=r"the training examples: there are labels .* 'B-LOC' .*train.conll:4"):
        TokenClassification(config).features("train")


def test_fewer_training_examples_have_the_labels_of_all(tmp_path: Path):
    config = run_config(tmp_path, None, max_train_samples=1)
    (tmp_path / "train.conll").write_text("Bo B-PER\n\nNew B-LOC\nYork I-LOC\nX I-PER\n")
    task = TokenClassification(config)
    features: Any = task.features("train")
    assert task.labels == tuple(LABELS) and len(features) == 1 == len(features.examples().items)


def test_the_number_of_labels_in_a_new_models_config_has_to_be_theirs(tmp_path: Path):
    config = run_config(tmp_path, None)
    model = config.model.model_copy(update={"config": {**(config.model.config or {}), "num_labels": 3}})
    with pytest.raises(UserError, match="num_labels is 3, and there are 5 labels"):
        built(config.model_copy(update={"model": model}))


def test_a_head_of_another_task_that_has_the_same_name_is_refused_with_both_sizes(tmp_path: Path):
    path = model_dir(tmp_path / "model", AutoModelForSequenceClassification, labels=3)
    with pytest.raises(UserError) as error:
        built(run_config(tmp_path, path))
    assert "classifier.bias is (3,), and has to be (5,), classifier.weight is (3, 32), and has to be" in str(
        error.value
    )


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_of_another_task_that_has_the_same_name_and_size_is_refused(tmp_path: Path, trained: bool):
    path = model_dir(tmp_path / "model", AutoModelForSequenceClassification, labels=5)
    with pytest.raises(UserError, match="is a BertForSequenceClassification, whose head would be taken for that of"):
        built(run_config(tmp_path, path, labels=tuple(LABELS)), trained=trained)


def edit(path: Path, **changes: Any) -> None:
    """A model's config.json."""
    content = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def without_training(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"train_file": ()})})


def test_names_of_labels_count_where_the_architecture_is_not_told(tmp_path: Path):
    order = ["I-PER", "O", "B-PER", "B-LOC", "I-LOC"]
    path = model_dir(tmp_path / "model", labels=order)
    edit(path, architectures=None)
    config = without_training(run_config(tmp_path, path))
    _, features = built(config, trained=True)
    labels = features.collate(torch.arange(1).numpy()).targets["label"][0].tolist()
    assert [order[i] for i in labels if i >= 0] == ["B-PER", "O", "O", "B-LOC", "I-LOC"]
    edit(path, id2label=None, label2id=None)
    with pytest.raises(UserError, match=r"has lost the names of its labels \(id2label in config.json\)"):
        built(config, trained=True)
    edit(path, id2label=["O", "B-PER"])
    with pytest.raises(UserError, match="cannot be loaded"):
        built(config, trained=True)


def test_labels_of_a_name_twice_are_refused(tmp_path: Path):
    path = model_dir(tmp_path / "model", labels=["O", "B-PER", "B-PER"])
    with pytest.raises(UserError, match=r"more than one label of a name \(B-PER\)"):
        built(without_training(run_config(tmp_path, path)), trained=True)


def test_data_without_an_entity_are_not_trained_on(tmp_path: Path):
    config = run_config(tmp_path, None, columns={"ner_tags": "2"})
    (tmp_path / "train.conll").write_text("Ada O B-PER\nlives O O\n")
    with pytest.raises(UserError, match="the training examples hold no entity: all tags are O"):
        built(config)


def test_a_base_model_is_not_evaluated(tmp_path: Path):
    with pytest.raises(UserError, match="has not been trained for token classification"):
        built(run_config(tmp_path, model_dir(tmp_path / "model", AutoModel)), trained=True)
