"""A corpus in SQuAD form out of nothing but a seed, that can only be solved by reading.

Each context tells several facts about one person. Facts of the same kind (three cities, four years, …) differ
only in the relation that the text states, so a question such as "Where did Ada Brandt study?" cannot be
answered by looking for the one city in the text: the model has to tell where she studied from where she was
born and where she lives. Names of places and people are put together from syllables, and the held-out
contexts are drawn from another stream of the seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering.data import Example


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how the text may state it and how one may ask for it."""

    kind: str
    """Facts of one kind have values of one kind; they are each other's distractors."""
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = (
    Relation(
        "city",
        ("{name} was born in {value}.", "{She} was born in {value}.", "{She} was born near the river in {value}."),
        ("Where was {name} born?", "In which city was {name} born?"),
    ),
    Relation(
        "city",
        ("{She} studied in {value}.", "{name} studied in {value}.", "{She} studied law in {value}."),
        ("Where did {name} study?", "In which city did {name} study?", "Where has {name} studied?"),
    ),
    Relation(
        "city",
        ("Today {she} lives in {value}.", "{name} lives in {value}.", "{She} lives with a cat in {value}."),
        ("Where does {name} live?", "In which city does {name} live?"),
    ),
    Relation(
        "city",
        ("{She} met {her} teacher in {value}.", "{name} met {her} teacher by chance in {value}."),
        ("Where did {name} meet {her} teacher?", "In which city did {name} meet {her} teacher?"),
    ),
    Relation(
        "year",
        ("{Her} first book appeared in {value}.", "{Her} first book was printed in {value}."),
        ("When did the first book of {name} appear?", "In which year was the first book of {name} printed?"),
    ),
    Relation(
        "year",
        ("{She} married in {value}.", "{name} married in {value}."),
        ("When did {name} marry?", "In which year did {name} marry?"),
    ),
    Relation(
        "year",
        ("{She} received a medal in {value}.", "{name} was given a medal in {value}."),
        ("When did {name} receive a medal?", "In which year was {name} given a medal?"),
    ),
    Relation(
        "thing",
        ("{She} collects {value}.", "{name} collects {value}."),
        ("What does {name} collect?", "Which things does {name} collect?"),
    ),
    Relation(
        "thing",
        ("{She} is afraid of {value}.", "{name} is afraid of {value}."),
        ("What is {name} afraid of?", "Which things is {name} afraid of?"),
    ),
    Relation(
        "thing",
        ("{She} paints {value}.", "{name} paints {value}."),
        ("What does {name} paint?", "Which things does {name} paint?"),
    ),
)

FILLERS = (
    "Little else is known about those years.",
    "Many letters from that time have been kept in an archive.",
    "Friends remember long evenings with music and stories.",
    "The weather was bad for most of that summer.",
    "A newspaper reported about it at some length.",
    "Historians still argue over the details of this account.",
    "The family kept a small house near the river for many years.",
    "The story was told again and again by the neighbours.",
)

_ONSETS = ("b", "br", "d", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v", "w")
_VOWELS = ("a", "e", "i", "o", "u", "ei", "ou")
_CODAS = ("", "l", "n", "r", "s", "t", "m")
_CITY_ENDINGS = ("burg", "ville", "stad", "mouth", "ford", "field")
_FIRST_NAMES = (
    ("Ada", True), ("Clara", True), ("Edith", True), ("Greta", True), ("Ida", True), ("Karin", True),
    ("Boris", False), ("David", False), ("Felix", False), ("Hugo", False), ("Jonas", False), ("Leo", False),
)  # fmt: skip
_ADJECTIVES = ("old", "small", "blue", "broken", "wooden", "silver", "painted", "foreign", "heavy", "rare")
_NOUNS = ("clocks", "spiders", "maps", "horses", "bridges", "coins", "masks", "bottles", "storms", "violins")


class _Writer:
    """Draws names and writes contexts from one stream of random numbers."""

    def __init__(self, stream: random.Random):
        self.random = stream

    def _syllable(self) -> str:
        return self.random.choice(_ONSETS) + self.random.choice(_VOWELS) + self.random.choice(_CODAS)

    def _surname(self) -> str:
        return (self._syllable() + self._syllable()).capitalize()

    def value(self, kind: str) -> str:
        draw = self.random
        if kind == "city":
            return self._syllable().capitalize() + draw.choice(_CITY_ENDINGS)
        if kind == "year":
            return str(draw.randrange(1870, 2000))
        return f"{draw.choice(_ADJECTIVES)} {draw.choice(_NOUNS)}"

    def context(self, long: bool) -> tuple[dict[str, str], str, list[tuple[Relation, str, int]], list[Relation]]:
        """A person, the text about them, its facts as (relation, value, offset in the text), and the relations
        of the same kinds that the text does not state."""
        first_name, female = self.random.choice(_FIRST_NAMES)
        words = {
            "name": f"{first_name} {self._surname()}",
            "She": "She" if female else "He",
            "she": "she" if female else "he",
            "Her": "Her" if female else "His",
            "her": "her" if female else "his",
        }
        kinds = self.random.sample(("city", "year", "thing"), k=2)
        candidates = [relation for relation in RELATIONS if relation.kind in kinds]
        stated = self.random.sample(candidates, k=self.random.randint(3, 5))
        sentences: list[tuple[Relation | None, str, str]] = []
        used: set[str] = {words["name"]}
        for relation in stated:
            value = self.value(relation.kind)
            while value in used:  # a distractor that equals the answer would distract from nothing
                value = self.value(relation.kind)
            used.add(value)
            sentences.append((relation, self.random.choice(relation.statements), value))
        for _ in range(self.random.randint(14, 20) if long else self.random.randint(0, 2)):
            place = self.random.randint(0, len(sentences))
            sentences.insert(place, (None, self.random.choice(FILLERS), ""))

        text = f"{words['name']} is the subject of this article."
        facts = []
        for relation, template, value in sentences:
            before, _, after = template.partition("{value}")
            text += " " + before.format(**words)
            if relation is not None:
                facts.append((relation, value, len(text)))
                text += value + after.format(**words)
        return words, text, facts, [relation for relation in candidates if relation not in stated]


def generate(config: SyntheticConfig, split: str) -> list[Example]:
    """The examples of `split` ("train" or "validation"), the same on every machine.

    Two questions share a context, as several do in SQuAD.
    """
    count = config.train_examples if split == "train" else config.validation_examples
    stream = random.Random(f"qa_dist {config.seed} {split}")
    writer = _Writer(stream)
    examples: list[Example] = []
    while len(examples) < count:
        words, context, facts, absent = writer.context(long=stream.random() < config.long_share)
        for relation, value, start in stream.sample(facts, k=min(2, count - len(examples))):
            unanswerable = bool(absent) and stream.random() < config.unanswerable_share
            asked = stream.choice(absent) if unanswerable else relation
            examples.append(
                Example(
                    id=f"synthetic-{split}-{len(examples):06d}",
                    question=stream.choice(asked.questions).format(**words),
                    context=context,
                    answers=() if unanswerable else (value,),
                    answer_starts=() if unanswerable else (start,),
                )
            )
    return examples


def texts(examples: Sequence[Example]) -> list[str]:
    """Every distinct question and context, in order of appearance."""
    return list(dict.fromkeys(text for example in examples for text in (example.question, example.context)))
