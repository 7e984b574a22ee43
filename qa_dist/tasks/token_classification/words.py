"""The words of a text that nobody has cut into words."""

import regex

_ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts that put no blanks between words."""
_LETTER = rf"[[\w\u00ad]--[{_ALONE}]]"
"""With marks on letters, joiners, and hyphens that are only seen at a line's end."""
_CLITIC = r"(?i:['’](?:s|re|ve|ll|d|m|t)\b)"
"""What English hangs on to a word."""

WORD = regex.compile(
    rf"""
    (?:https?://|www\.)\S*[\w/]                                         # addresses in the Internet
    | [@\#]\w+ | [\w.+-]{{1,64}}+@[\w-]{{1,63}}(?:\.[\w-]{{1,63}})+      # names there
    | \d+(?:[.,:/-]\d+)*(?:-?{_LETTER}+)*                                # 12.50, 1996-08-22, 1st, 30-year-old
    | (?:\p{{L}}\.){{2,}}                                                # U.N.
    | \b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Inc|Corp|Co|Ltd|Gen|Sen|Gov|Lt|Col|Sgt|Capt|Rev)\.   # abbreviations in names
    | \b\p{{Lu}}+/\p{{Lu}}+\b                                            # AC/DC
    | [{_ALONE}][\p{{M}}\u200d]*                                         # each character by itself, with its marks
    | \b(?<!['’])(?:[cdjlmnst]|qu|un|all|dell|nell|sull|dall)['’](?=\p{{L}}{{3}})   # d'Artagnan: the d'
    | {_CLITIC}
    | {_LETTER}+(?:(?:[-&]|(?!{_CLITIC})['’]){_LETTER}+)*                # Jean-Luc, AT&T, O'Brien
    | ([^\w\s\p{{M}}\p{{Cc}}\p{{Cf}}])[\p{{M}}\u200d]*(?:\1[\p{{M}}\u200d]*)*       # punctuation; ... is one
    """,
    regex.VERBOSE | regex.VERSION1,
)


def words_of(text: str) -> list[tuple[int, int]]:
    """Where the words of `text` begin and end, in characters; about as the corpora of named entities cut them.

    What is neither seen nor part of a word, such as marks of the direction of writing, is left out as blanks are.
    """
    return [found.span() for found in WORD.finditer(text)]
