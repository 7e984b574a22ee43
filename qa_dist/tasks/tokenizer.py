"""The tokenizer of a run: the model's own, another one, or one trained on the training texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as decoding
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qa_dist.config import ModelConfig
from qa_dist.errors import UserError, listing
from qa_dist.tasks.model_config import require_model, require_reachable

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `model` names.

    Raises `UserError` if there is none, or none that is fast, and if there is no model where `model.name` is set.
    """
    name = model.tokenizer or model.name
    key = "model.tokenizer" if model.tokenizer else "model.name"
    assert name is not None
    if model.name is not None:  # a model that is missing is not reported as one without a tokenizer
        require_model(model.name)
    if model.tokenizer is not None:
        require_reachable(key, name, ("tokenizer_config.json", "tokenizer.json"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # whatever files that came from elsewhere make transformers raise
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{key}: the tokenizer of {name!r} cannot be loaded: {first_line}. Point model.tokenizer at a directory "
            "that holds a tokenizer.json"
        ) from None
    vocabularies = dict.fromkeys(["tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()])
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in vocabularies):
        # from nothing, transformers makes a tokenizer that knows nothing
        raise UserError(
            f"{key}: {name} holds no tokenizer ({listing(list(vocabularies))}); copy it from where the model comes "
            "from, or point model.tokenizer at one"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{key}: the tokenizer of {name!r} ({type(tokenizer).__name__}) is not a fast one, and only these report "
            "which characters each token covers. Use a model with a tokenizer.json, or convert the tokenizer"
        )
    # Windows are cut here. What the file says of truncation and padding (sentence encoders ship 128 tokens) would
    # only stay until the first call, and so differ between processes that have encoded something and those that
    # found it in the cache.
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # as is usual for GPT-2 and its like: attention leaves padding out
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int, model_config: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer (Radford et al. 2019) on `texts`, with BERT's special tokens.

    The same texts give the same tokenizer in every process and on every machine; WordPiece training does not:
    its ties fall by the order of a randomly seeded hash map. Token types are given out only if the model that
    `model_config` describes has embeddings for two of them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoding.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    # trim_offsets: the space that belongs to a token is not part of an answer
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    names = ["input_ids", "attention_mask"]
    if model_config.get("type_vocab_size", 2 if model_config.get("model_type") == "bert" else 0) >= 2:
        names.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **SPECIAL_TOKENS)
