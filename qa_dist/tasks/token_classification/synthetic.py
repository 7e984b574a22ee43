"""A corpus with named entities out of nothing but a seed, that can only be solved by reading.

The same surname may be that of a person, of a company or of a town: what it is only the words around it tell. Names are
put together from syllables, and the held-out texts are drawn from another stream of the seed.
"""

import random

from qa_dist.config import SyntheticConfig
from qa_dist.tasks.token_classification.data import Example

TEMPLATES = (
    "{person} was born in {place} .",
    "{person} , who lives in {place} , works for {organisation} .",
    "In {place} the factory of {organisation} was closed .",
    "Shares of {organisation} fell after {person} had left .",
    "{organisation} , based in {place} , has hired {person} .",
    "The mayor of {place} met {person} and {person} .",
    "A train from {place} to {place} was late .",
    "{person} sued {organisation} .",
)
FILLERS = (
    "Nothing else was known at first .",
    "The weather was bad for most of the summer .",
    "A newspaper reported about it at some length .",
)

_ONSETS = ("b", "br", "d", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v", "w")
_VOWELS = ("a", "e", "i", "o", "u", "ei", "ou")
_CODAS = ("", "l", "n", "r", "s", "t", "m")
_FIRST_NAMES = ("Ada", "Boris", "Clara", "David", "Edith", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karin", "Leo")


class _Writer:
    """Draws names and writes sentences from one stream of random numbers."""

    def __init__(self, stream: random.Random):
        self.random = stream

    def _surname(self) -> str:
        draw = self.random.choice
        return "".join(draw(_ONSETS) + draw(_VOWELS) + draw(_CODAS) for _ in range(2)).capitalize()

    def _name(self, kind: str) -> list[str]:
        surname, draw = self._surname(), self.random.random()
        if kind == "person":
            return [self.random.choice(_FIRST_NAMES), surname] if draw < 0.7 else [surname]
        if kind == "place":
            return [surname] if draw < 0.7 else [self.random.choice(("New", "Upper", "East")), surname]
        return [surname] if draw < 0.5 else [surname, "&", self._surname()] if draw < 0.7 else [surname, "Works"]

    def sentence(self) -> tuple[list[str], list[str]]:
        """Words and labels."""
        words: list[str] = []
        labels: list[str] = []
        template = self.random.choice(FILLERS if self.random.random() < 0.15 else TEMPLATES)
        for part in template.split():
            name = self._name(part[1:-1]) if part.startswith("{") else [part]
            words += name
            labels += [f"{'I' if i else 'B'}-{part[1:-1]}" if part.startswith("{") else "O" for i in range(len(name))]
        return words, labels


def generate(config: SyntheticConfig, split: str) -> list[Example]:
    """The examples of `split` ("train" or "validation"), the same on every machine."""
    count = config.train_examples if split == "train" else config.validation_examples
    stream = random.Random(f"qa_dist token classification {config.seed} {split}")
    writer = _Writer(stream)
    examples = []
    for i in range(count):
        words: list[str] = []
        labels: list[str] = []
        for _ in range(30 if stream.random() < config.long_share else 1):
            more = writer.sentence()
            words += more[0]
            labels += more[1]
        name = f"synthetic-{split}-{i:06d}"
        examples.append(Example(name, tuple(words), tuple(labels), name))
    return examples
