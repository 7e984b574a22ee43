"""The tokenizer of a run: the model's own, another one, or one trained on the training texts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as decoding
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qa_dist.config import ModelConfig
from qa_dist.errors import UserError

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `model` names. Raises `UserError` if there is none, or none that is fast."""
    name = model.tokenizer or model.name
    key = "model.tokenizer" if model.tokenizer else "model.name"
    assert name is not None
    if looks_like_path(name) and not Path(name).is_dir():
        raise UserError(f"{key}: {name}: there is no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{key}: the tokenizer of {name!r} cannot be loaded: {first_line}. Point model.tokenizer at a directory "
            "that holds a tokenizer.json"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{key}: the tokenizer of {name!r} ({type(tokenizer).__name__}) is not a fast one, so tokens cannot be "
            "traced back to characters. Use a model with a tokenizer.json, or convert the tokenizer"
        )
    return tokenizer


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a directory, not as an id on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def train_tokenizer(texts: Sequence[str], vocab_size: int, model_config: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Train a WordPiece tokenizer in BERT's manner (Devlin et al. 2019) on `texts`.

    The same texts give the same tokenizer in every process. Token types are given out only if the model that
    `model_config` describes has embeddings for two of them.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoding.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    names = ["input_ids", "attention_mask"]
    if model_config.get("type_vocab_size", 2 if model_config.get("model_type") == "bert" else 0) >= 2:
        names.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **SPECIAL_TOKENS)
