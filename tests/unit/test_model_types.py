"""Every type of model that transformers lists for a task, made tiny: its direction of reading, and its padding."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from qa_dist.config import RunConfig
from qa_dist.errors import UserError
from qa_dist.tasks import load_task
from qa_dist.tasks.model_config import reads_left_to_right
from qa_dist.tasks.question_answering.layout import PairTemplate
from qa_dist.tasks.trial import trial_logits, trial_tokens
from qa_dist.training.models import build_model
from tests.tokenizers import llama_tokenizer, roberta_tokenizer

TEXTS = ["Ada Lovelace was born in London and lived there for most of her life.", "Where was she born?"] * 4
MAX_LENGTH = 96
LABELS = ("O", "B-X", "I-X")

SMALL: dict[int, tuple[str, ...]] = {
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
        *("decoder_attention_heads", "num_key_value_heads", "num_kv_heads", "num_experts", "num_local_experts"),
    ),
    8: ("d_kv", "rotary_dim"),
    32: ("hidden_size", "d_model", "dim", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"),
    64: (
        *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner", "n_inner"),
        *("hidden_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"),
    ),
    160: ("max_position_embeddings", "n_positions"),
}
"""Value -> the settings that get it, in the words of whichever type has them."""


def tiny(model_type: str, **more: Any) -> dict[str, Any]:
    """`model.config` of a model of about 0.1 M weights."""
    known = AutoConfig.for_model(model_type)
    sizes = {name: value for value, names in SMALL.items() for name in names if type(getattr(known, name, None)) is int}
    return {"model_type": model_type, **sizes, **more}


OTHERS: dict[str, dict[str, Any]] = {
    "axk1": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "axk2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "index_topk": 8},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1], "n_head": 4, "d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "helium": {"head_dim": 8},
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "qwen2_moe": {"num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts_per_tok": 2},
    "qwen3_next": {"num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "is_decoder": False},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "t5": {"decoder_start_token_id": 1},
    "xlnet": {"max_position_embeddings": None},
    "xmod": {"default_language": "en_XX"},
}
"""Settings of types for which sizes are not all. None: leave out."""

NOT_MADE = {
    "layoutlmv2": "detectron2",  # a library
    "lxmert": "visual_feats",
    "bros": "bbox",
}
"""Types that need more than tokens, and a word of the error."""
BLIND = {"mra"}
"""Types whose context does not depend on the question on a CPU: their attention is 0 without a CUDA kernel."""
COMPOSED = {"modernvbert", "qwen3_5", "qwen3_asr", "t5gemma", "t5gemma2", "ultravbert"}
"""Types whose configs hold those of other models, whose sizes are not set here."""
NO_MODELS = {"attn_config", "esmfold_config"}
"""Parts of configs that are not those of a model within the model."""
PADDING_COUNTS = {"canine", "convbert", "fnet", "funnel", "nystromformer", "yoso"}
"""Types whose outputs depend on padding."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, make in (("roberta", roberta_tokenizer), ("llama", llama_tokenizer)):
        make(TEXTS).save_pretrained(root / name)
    return {name: str(root / name) for name in ("roberta", "llama")}


def made(task_name: str, model_type: str, tokenizers: dict[str, str]) -> tuple[Any, Any, list[str]]:
    """The task, a tiny model, and the notes on it. Decoders have a tokenizer that pads on the left."""
    sizes = {
        name: value for name, value in (tiny(model_type) | OTHERS.get(model_type, {})).items() if value is not None
    }
    is_decoder = reads_left_to_right(AutoConfig.for_model(**sizes)) and task_name == "question_answering"
    data: dict[str, Any] = {"synthetic": {"train_examples": 4}, "max_length": MAX_LENGTH, "stride": 8}
    if task_name == "token_classification":
        data["labels"] = LABELS
    model = {"config": sizes, "tokenizer": tokenizers["llama" if is_decoder else "roberta"]}
    config = RunConfig.model_validate({"task": task_name, "data": data, "model": model})
    task = load_task(config)
    return task, *build_model(config, task)


@pytest.mark.parametrize("model_type", MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES)
def test_question_answering(model_type: str, tokenizers: dict[str, str]):
    """The rule for the direction of reading is what the model does, and each context depends on its question."""
    if model_type in NOT_MADE or model_type in BLIND:
        with pytest.raises(UserError, match=NOT_MADE.get(model_type, "do not change with the question")):
            made("question_answering", model_type, tokenizers)
        return
    task, model, notes = made("question_answering", model_type, tokenizers)
    assert any("depend on padding" in note for note in notes) == (model_type in PADDING_COUNTS), notes
    template = PairTemplate.of(task.tokenizer, causal=task.causal)
    assert template.question_first
    context = trial_tokens(task.tokenizer, 48)
    later = context[:40] + trial_tokens(task.tokenizer, 8, 1)
    question = trial_tokens(task.tokenizer, 4)
    windows = [template.window(question, text) for text in (context, later)]
    one, other = (trial_logits(model, task.tokenizer, tokens)[place][:40] for tokens, place in windows)
    assert torch.equal(one, other) == task.causal
    assert task.tokenizer.padding_side == "right"


@pytest.mark.parametrize("model_type", MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)
def test_token_classification(model_type: str, tokenizers: dict[str, str]):
    parts: Any = CONFIG_MAPPING[model_type].sub_configs
    assert (model_type in COMPOSED) == bool(set(parts) - NO_MODELS)
    if model_type in COMPOSED:
        return
    if model_type in NOT_MADE:
        with pytest.raises(UserError, match=NOT_MADE[model_type]):
            made("token_classification", model_type, tokenizers)
        return
    _, _, notes = made("token_classification", model_type, tokenizers)
    assert any("depend on padding" in note for note in notes) == (model_type in PADDING_COUNTS), notes


@pytest.mark.parametrize(
    ("model_type", "switch", "causal"),
    [
        ("bert", {"is_decoder": True}, True),
        ("roberta", {"is_decoder": True}, True),
        ("xlm", {"causal": True}, True),
        ("llama", {"is_causal": False}, False),
    ],
)
def test_settings_that_turn_the_direction_of_reading(
    model_type: str, switch: dict[str, Any], causal: bool, tokenizers: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(OTHERS, model_type, switch)
    task, model, _ = made("question_answering", model_type, tokenizers)
    assert task.causal is causal
    tokens = [(token, 0) for token in trial_tokens(task.tokenizer, 40)]
    later = tokens[:-4] + [(token, 0) for token in trial_tokens(task.tokenizer, 4, 1)]
    one, other = (trial_logits(model, task.tokenizer, row)[:30] for row in (tokens, later))
    assert torch.equal(one, other) is causal
