"""Initial weights depend on the seed and the names of modules, and on nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BertForQuestionAnswering,
    BertModel,
)

from qa_dist.training.initial_weights import initialize
from tests.head_first import HeadFirst
from tests.helpers import DISTIL_SIZES, SIZES, TINY_BERT

GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "deberta-v2": SIZES,
    "distilbert": DISTIL_SIZES,
    "electra": SIZES,
    "gpt2": GPT_SIZES,
    "modernbert": SIZES | {"global_attn_every_n_layers": 2},
    "roberta": SIZES,
    "t5": T5_SIZES,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
}


def bert_config(**changes: Any) -> Any:
    shape: dict[str, Any] = TINY_BERT | {"vocab_size": 60} | changes
    return AutoConfig.for_model(**shape)


def state(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    initialize(model, seed)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("auto", [AutoModelForQuestionAnswering, AutoModelForTokenClassification])
def test_the_state_of_the_generator_does_not_matter(auto: Any, kind: str):
    """For models that initialize whole modules, single weights, or weights of modules within modules."""
    config = AutoConfig.for_model(kind, vocab_size=60, pad_token_id=0, **KINDS[kind])
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(auto.from_config(config))
    drawn = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    states = [state(model) for model in models]
    assert equal(*states)
    changed = {name for name in drawn if not torch.equal(drawn[name], states[0][name])}
    assert {name for name in changed if drawn[name].numel() > 1 and drawn[name].float().std() == 0} == set()
    for name in changed:  # and have the distribution that the model chose
        if drawn[name].numel() >= 500:
            assert float(states[0][name].std()) == pytest.approx(float(drawn[name].std()), rel=0.3), name
    assert changed


def test_the_order_of_construction_does_not_matter():
    assert equal(state(BertForQuestionAnswering(bert_config())), state(HeadFirst(bert_config())))


def test_another_seed_and_another_module_have_other_weights():
    found, other = state(BertForQuestionAnswering(bert_config())), state(BertForQuestionAnswering(bert_config()), 4)
    drawn = [name for name, tensor in found.items() if tensor.float().std() > 0]
    assert len(drawn) > 10
    assert not any(torch.equal(found[name], other[name]) for name in drawn)
    values = [tuple(found[name].flatten()[:4].tolist()) for name in drawn]
    assert len(set(values)) == len(values)


def test_the_generator_is_left_as_it_was():
    model = BertForQuestionAnswering(bert_config())
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    initialize(model, 3)
    assert torch.equal(torch.rand(4), expected)


def test_a_new_head_is_the_same_and_loaded_weights_are_kept(tmp_path: Path):
    """The head of a pretrained model has the weights that it has in a model that is new as a whole."""
    torch.manual_seed(1)
    BertModel(bert_config()).save_pretrained(tmp_path)
    stored = BertModel.from_pretrained(tmp_path).state_dict()
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = BertForQuestionAnswering.from_pretrained(tmp_path)
        found = state(model)
        loaded = {name.removeprefix("bert."): tensor for name, tensor in found.items() if name.startswith("bert.")}
        assert loaded
        assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())
        heads.append({name: tensor for name, tensor in found.items() if not name.startswith("bert.")})
    new = state(BertForQuestionAnswering(bert_config()))
    assert equal(*heads)
    assert heads[0].keys() == {"qa_outputs.weight", "qa_outputs.bias"}
    assert all(torch.equal(new[name], tensor) for name, tensor in heads[0].items())


def test_a_trained_model_is_left_alone(tmp_path: Path):
    torch.manual_seed(1)
    BertForQuestionAnswering(bert_config()).save_pretrained(tmp_path)
    model = BertForQuestionAnswering.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert equal(state(model), before)
