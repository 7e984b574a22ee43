"""Spans of whole characters: what a reader sees as one is never cut, whatever a tokenizer's offsets say."""

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qa_dist.tasks.ragged import distinct

BLANK_CATEGORIES = {"Cc", "Cf", "Zs", "Zl", "Zp"}
VISIBLE_FORMAT_CHARACTERS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
"""Signs that enclose the number or the letter that follows; Unicode calls them format characters, too."""
MODIFIERS = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff\uff9e\uff9f"
"""Skin tones of emoji, and the voicing marks of halfwidth katakana."""
ZERO_WIDTH_JOINER = "\u200d"
REGIONAL_INDICATORS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
"""The letters that make flags, in pairs."""


def span_of_whole_characters(context: str, start: int, end: int) -> tuple[int, int]:
    """The span without the blanks at its edges, extended to whole characters as readers see them.

    Tokens hold less or more than the letters of an answer. Some families count the space before a word as part of
    its token; byte-level ones have tokens of spaces alone. Normalizers that strip accents leave a letter's token
    without the marks that follow it, and those that drop control characters tear an emoji from what modifies it.
    Characters that cannot be seen are blanks too: of 18,023 answers of SQuAD and XQuAD none begins or ends with one,
    while some stand beside one. So the same answer comes back whether or not a tokenizer has tokens for these.
    """
    while start < end and _is_blank(context[start]):
        start += 1
    while end > start and _is_blank(context[end - 1]):
        end -= 1
    if start < end:
        while _is_joined(context, start):
            start -= 1
        while _is_joined(context, end):
            end += 1
    return start, end


def spans_of_whole_characters(
    contexts: Sequence[str],
    row: npt.NDArray[np.int64],
    start: npt.NDArray[np.int64],
    end: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`span_of_whole_characters` of many spans; `row` is the place of each one's context. Shapes: [spans] each.

    Spans that begin and end with visible ASCII characters, beside ASCII characters, stay as they are. That is nearly
    all of them, and seen at once; the others are looked at one by one.
    """
    places, texts = distinct(contexts)
    # all texts in one array of characters, with a letter before and behind each
    characters = np.frombuffer(("a" + "".join(f"{text}a" for text in texts)).encode("utf-32-le"), dtype="<u4")
    lengths = np.array([len(text) + 1 for text in texts], dtype=np.int64)
    base = (1 + np.cumsum(lengths) - lengths)[places[row]]
    before, first = characters[base + start - 1], characters[base + start]
    last, behind = characters[base + end - 1], characters[base + end]
    plain = (start < end) & (np.maximum(before, behind) < 128)
    for inner, outer in ((first, before), (last, behind)):
        plain &= (inner > ord(" ")) & (inner < 127)
        plain &= (inner != outer) | ((inner != ord("`")) & (inner != ord("'")))
    start, end = start.copy(), end.copy()
    for i in np.flatnonzero(~plain).tolist():
        start[i], end[i] = span_of_whole_characters(contexts[int(row[i])], int(start[i]), int(end[i]))
    return start, end


def _is_blank(character: str) -> bool:
    """Whether it is a space, or a control or format character, which has no shape of its own."""
    if character.isprintable() and character != " ":
        return False
    return unicodedata.category(character) in BLANK_CATEGORIES and character not in VISIBLE_FORMAT_CHARACTERS


def _is_joined(context: str, place: int) -> bool:
    """Whether the characters before and at `place` are seen as one.

    The boundaries of Unicode Standard Annex 29 as far as they concern marks and emoji (its rules GB9, GB9a, GB9b,
    GB11, GB12 and GB13), and the quotation marks `` and '', which the normalizers of ALBERT and XLNet make one.
    """
    if not 0 < place < len(context):
        return False
    character, before = context[place], place - 1
    if character.isalnum() and character.isascii():
        return False
    category = unicodedata.category(character)
    if category.startswith("M") or character in MODIFIERS or _is_joiner(character):
        while before > 0 and _is_joiner(context[before]):
            before -= 1
        return not _is_blank(context[before])
    if context[before] == ZERO_WIDTH_JOINER:
        return category == "So" and before > 0 and not _is_blank(context[before - 1])
    if context[before] in VISIBLE_FORMAT_CHARACTERS:
        return not _is_blank(character)
    if not _is_pair(context[before], character):
        return False
    letters = character if character.isascii() else REGIONAL_INDICATORS
    return (place - len(context[:place].rstrip(letters))) % 2 == 1  # in C: a run may be as long as the text


def _is_joiner(character: str) -> bool:
    """Whether it joins two emoji, or is one of the letters that turn a black flag into that of a region."""
    return character == ZERO_WIDTH_JOINER or "\U000e0020" <= character <= "\U000e007f"


def _is_pair(first: str, second: str) -> bool:
    """Whether they are one quotation mark, or two letters that are one flag."""
    if first.isascii():
        return first == second and first in "`'"
    return min(first, second) >= "\U0001f1e6" and max(first, second) <= "\U0001f1ff"
