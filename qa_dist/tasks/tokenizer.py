"""The tokenizer of a run: the model's own, another one, or one trained on the training texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as decoding
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qa_dist.config import ModelConfig
from qa_dist.errors import UserError, listing

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
    if key == "model.name" and Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        hint = f"; did you mean {Path(name) / 'model'}?" if (Path(name) / "model" / "config.json").is_file() else ""
        raise UserError(f"model.name: {name} holds no config.json, so it is not a model directory{hint}")
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
            f"{key}: the tokenizer of {name!r} ({type(tokenizer).__name__}) is not a fast one, which tells what "
            "its tokens were made of. Use a model with a tokenizer.json, or convert the tokenizer"
        )
    # Windows are cut here. What the file says of truncation and padding (sentence encoders ship 128 tokens) would
    # only stay until the first call, and so differ between processes that have encoded something and those that
    # found it in the cache.
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a directory, not as an id on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


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
