"""Labels against an oracle that knows the characters of each token without the tokenizer's offsets."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer

from qa_dist.tasks.question_answering.data import Example
from qa_dist.tasks.question_answering.features import build_features
from tests.tokenizers import cased_tokenizer, gpt2_tokenizer, roberta_tokenizer, sentencepiece_tokenizer, t5_tokenizer

WORDS = ["ab", "ba", "éa", "шж", "東京", "東", "京b", "a", "é", "ж", "Zq", "12"]
TEXTS = [
    " ".join([*WORDS, *WORDS[::-1]]),
    "東京京東 шжжш ééé 東京 шж",
    "ab ab ba 12 Zq",
    "12abéшж1a bé éш шa ж1 2b",
] * 6


def byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (Radford et al. 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTES = byte_of()


def across_letters() -> GPT2Tokenizer:
    """A byte-level tokenizer whose tokens hold the last byte of a letter and the first of the next, or one letter."""
    of = {byte: character for character, byte in BYTES.items()}
    merges = [(of[0x88], of[0xD0]), (of[0xB6], of[0xD1]), (of[0xA9], of[0xD1]), (of[0xC3], of[0xA9])]
    vocab = {token: i for i, token in enumerate([*BYTES, *("".join(pair) for pair in merges), "<|endoftext|>"])}
    return GPT2Tokenizer(vocab=vocab, merges=merges)  # pyright: ignore[reportArgumentType]


TOKENIZERS: dict[str, Any] = {
    "unigram": sentencepiece_tokenizer(TEXTS),
    "unigram of t5": t5_tokenizer(TEXTS),
    "wordpiece": cased_tokenizer(TEXTS),
    "byte-level": gpt2_tokenizer(TEXTS),
    "byte-level across letters": across_letters(),
    "byte-level, trimmed": roberta_tokenizer(TEXTS),
}


def by_bytes(context: str, tokens: list[str]) -> list[set[int]]:
    owner = [i for i, character in enumerate(context) for _ in character.encode()]
    found, at = [], 0
    for token in tokens:
        found.append(set(owner[at : at + len(token)]))
        assert bytes(BYTES[c] for c in token) == context.encode()[at : at + len(token)]
        at += len(token)
    return found


def by_letters(context: str, tokens: list[str]) -> list[set[int]]:
    """Of pieces, whose characters are those of the text without its blanks."""
    letters = [i for i, character in enumerate(context) if not character.isspace()]
    found, at = [], 0
    for token in tokens:
        text = token.removeprefix("##").replace("▁", "")
        assert text == "".join(context[i] for i in letters[at : at + len(text)])
        found.append(set(letters[at : at + len(text)]))
        at += len(text)
    return found


def expected_label(context: str, parts: list[set[int]], start: int, end: int) -> tuple[int, int]:
    """First and last token of the answer: those that hold a part of it; but not one that holds a letter beside it, too,
    where the answer's first or last letter is also in a token that does not."""
    visible = [{i for i in part if not context[i].isspace()} for part in parts]
    answer = [place for place, part in enumerate(visible) if any(start <= i < end for i in part)]
    pure_first = [place for place in answer if start in visible[place] and min(visible[place]) >= start]
    pure_last = [place for place in answer if end - 1 in visible[place] and max(visible[place]) < end]
    first = min(pure_first, default=answer[0])
    last = max(pure_last, default=answer[-1])
    return (first, last) if first <= last else (answer[0], answer[-1])


ORACLES: dict[str, Callable[[str, list[str]], list[set[int]]]] = {
    name: by_bytes if "byte" in name else by_letters for name in TOKENIZERS
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    words=st.lists(st.sampled_from(WORDS) | st.text("abéшж東京12", min_size=1, max_size=4), min_size=1, max_size=14),
    spaces=st.sampled_from([" ", "  "]),
    data=st.data(),
    max_length=st.sampled_from([16, 24, 500]),
)
@settings(max_examples=150, deadline=None)
def test_labels_are_those_of_the_characters(
    name: str, words: list[str], spaces: str, data: st.DataObject, max_length: int
):
    tokenizer = TOKENIZERS[name]
    context = spaces.join(words)
    letters = [i for i, character in enumerate(context) if character != " "]
    start = data.draw(st.sampled_from(letters))
    end = 1 + data.draw(st.sampled_from([i for i in letters if start <= i < start + 6]))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(context, add_special_tokens=False)["input_ids"])
    first, last = expected_label(context, ORACLES[name](context, tokens), start, end)
    example = Example("x", "ab", context, (context[start:end],), (start,))
    rows = build_features([example], tokenizer, max_length=max_length, stride=5).to_pylist()
    begin = 0
    for row in rows:
        size = row["context_end"] - row["context_begin"]
        holds = begin <= first and last < begin + size
        label = (row["start_position"], row["end_position"])
        shift = row["context_begin"] - begin
        assert label == ((first + shift, last + shift) if holds else (row["cls"], row["cls"]))
        begin += size - 5
