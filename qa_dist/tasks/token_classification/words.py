"""The words of a text that nobody has cut into words."""

import re

WORD = re.compile(
    r"""
    https?://\S+ | [@\#]\w+ | \S+@\S+\.\w+           # addresses and names, as they stand in messages
    | [\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]      # scripts without blanks: each character by itself
    | \d+(?:[.,:/]\d+)*                              # numbers, dates and times
    | (?:[^\W\d_]\.){2,}                             # U.N.
    | ['’](?:s|re|ve|ll|d|m|t)\b                     # what English hangs on to a word
    | \w+(?:-\w+)*                                   # words, also with hyphens
    | \S                                             # punctuation
    """,
    re.VERBOSE | re.IGNORECASE,
)


def words_of(text: str) -> list[tuple[int, int]]:
    """Where the words of `text` begin and end, in characters; about as the corpora of named entities cut them."""
    return [found.span() for found in WORD.finditer(text)]
