"""Tokenizers of every family, made on the spot.

Vocabularies are trained with `tokenizers`; normalizer, pre-tokenizer and post-processor are those of the classes
that `AutoTokenizer` loads for the family, or, where files of the Hub differ from the class, those of the files.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    DistilBertTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    XLNetTokenizer,
)

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
WITH_TYPES = ["input_ids", "token_type_ids", "attention_mask"]

SCRIPTS = [
    "naïve café Ångström façade",
    "東京は日本の首都です 北京 上海",
    "שלום עולם ירושלים",
    "مرحبا بالعالم القاهرة",
    "नमस्ते दुनिया",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \U0001f1eb\U0001f1f7 ❤\ufe0f",
]
"""Texts beside the tests' own, so that not every letter that is not Latin is an unknown token."""


def wordpiece_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As BERT's: lower case, token types."""
    return BertTokenizer(vocab=_wordpiece_vocab(texts, lower_case=True), do_lower_case=True)


def cased_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As BERT's cased ones: letters keep their case and their accents."""
    return BertTokenizer(vocab=_wordpiece_vocab(texts, lower_case=False), do_lower_case=False)


def distilbert_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As DistilBERT's: BERT's without token types."""
    return DistilBertTokenizer(vocab=_wordpiece_vocab(texts, lower_case=True), do_lower_case=True)


def roberta_tokenizer(texts: Sequence[str], *, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """As RoBERTa's: byte-level, two separators between the texts, no token types."""
    vocab, merges = _byte_level_vocab(
        texts, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], add_prefix_space=add_prefix_space
    )
    return RobertaTokenizer(vocab=vocab, merges=merges, add_prefix_space=add_prefix_space)


def albert_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As ALBERT's: Unigram over words, accents and case dropped after compatibility decomposition."""
    vocab = _unigram_vocab(texts, ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], "<unk>")
    return AlbertTokenizer(vocab=vocab, model_input_names=WITH_TYPES)


def deberta_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As DeBERTa-v3's: Unigram over the text as it is, so that the space before a word is in its offsets."""
    return DebertaV2Tokenizer(vocab=_unigram_vocab(texts, ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], "[UNK]"))


def sentencepiece_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As the tokenizer.json of DeBERTa-v3 and of other converted SentencePiece models: its normalization."""
    vocab = _unigram_vocab(texts, [*SPECIAL.values(), "[MASK]"], "[UNK]")
    tokenizer = Tokenizer(models.Unigram(vocab, 1, False))
    tokenizer.normalizer = normalizers.Sequence(
        # the first two do what the precompiled nmt_nfkc map of the files does
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=WITH_TYPES, **SPECIAL)


def xlnet_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As XLNet's: padding on the left, `A <sep> B <sep> <cls>`, a token type of its own for `<cls>` and for padding."""
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
    vocab = _unigram_vocab(texts, special, "<unk>")
    return XLNetTokenizer(vocab=vocab, model_input_names=WITH_TYPES, pad_token_type_id=3)


def gpt2_tokenizer(
    texts: Sequence[str], make: type[PreTrainedTokenizerFast] = GPT2Tokenizer, **more: Any
) -> PreTrainedTokenizerFast:
    """As GPT-2's: byte-level, nothing is added to a pair, and there is no token for padding."""
    end = "<|endoftext|>"
    vocab, merges = _byte_level_vocab(texts, [end, "<pad>", "<s>", "</s>"])
    return make(vocab=vocab, merges=merges, **more)


def t5_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As T5's: `</s>` behind each text, and neither a token that begins a sequence nor one for classification."""
    vocab = _unigram_vocab(texts, ["<pad>", "</s>", "<unk>"], "<unk>")
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def llama_tokenizer(texts: Sequence[str], **more: Any) -> PreTrainedTokenizerFast:
    """As Llama's first two: `<s>` before each text, bytes for what is unknown, padding on the left."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # a text is not cut into words, so without these no merge would end with one
    words = [word.replace(" ", "▁") for text in texts for word in re.findall(r" ?\w+|[^\w\s]", f" {text}")]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return LlamaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True, **more
    )


DECODERS: dict[str, Callable[[Sequence[str]], PreTrainedTokenizerFast]] = {
    "gpt2": gpt2_tokenizer,
    "gpt2 with bos": lambda texts: gpt2_tokenizer(texts, bos_token="<s>", add_bos_token=True),  # OPT
    "qwen": lambda texts: gpt2_tokenizer(texts, Qwen2Tokenizer),
    "neox": lambda texts: gpt2_tokenizer(texts, GPTNeoXTokenizer, pad_token="<pad>"),
    "neox with eos": lambda texts: gpt2_tokenizer(texts, GPTNeoXTokenizer, pad_token="<pad>", add_eos_token=True),
    "t5": t5_tokenizer,
    "llama": llama_tokenizer,
    "llama with eos": lambda texts: llama_tokenizer(texts, add_eos_token=True),
}
"""Tokenizers without a classification token, most of them of models that read from left to right."""

FAMILIES: dict[str, Callable[[Sequence[str]], PreTrainedTokenizerFast]] = {
    "bert": wordpiece_tokenizer,
    "bert cased": cased_tokenizer,
    "distilbert": distilbert_tokenizer,
    "roberta": roberta_tokenizer,
    "roberta with prefix space": lambda texts: roberta_tokenizer(texts, add_prefix_space=True),
    "albert": albert_tokenizer,
    "deberta": deberta_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "xlnet": xlnet_tokenizer,
}


def _wordpiece_vocab(texts: Sequence[str], *, lower_case: bool) -> dict[str, int]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [*SPECIAL.values(), "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()


def _byte_level_vocab(texts: Sequence[str], special: list[str], *, add_prefix_space: bool = False) -> tuple[Any, Any]:
    """Vocabulary and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _unigram_vocab(texts: Sequence[str], special: list[str], unknown: str) -> list[tuple[str, float]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token=unknown, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return [(piece, score) for piece, score in model["vocab"]]
