"""Write tests/seqeval_figures.json: the figures that seqeval 1.2.2 computes for many sequences of labels.

seqeval is no dependency of the tests, since it comes as source, whose build needs packages that cannot be pinned. To
write the file again, in a virtual environment of its own:

    python -m venv /tmp/seqeval && . /tmp/seqeval/bin/activate
    pip install setuptools wheel setuptools_scm==8.3.1 && pip install --no-build-isolation seqeval==1.2.2
    python tests/seqeval_figures.py
"""

import importlib.metadata
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

VERSION = "1.2.2"
FILE = Path(__file__).with_suffix(".json")
CASES = 160
TYPES = [["PER"], ["A", "B"], ["PER", "LOC", "creative-work"], ["A", "A-B", "AB", "B-A"]]
"""Sets of entity types; some of them with a hyphen, or the beginning of another one."""

Case = tuple[list[str], list[list[str]], list[list[str]]]
"""Labels, predictions, references."""


def labels_of(types: Sequence[str]) -> list[str]:
    return ["O", *(f"{prefix}-{name}" for name in types for prefix in "BI")]


def random_sentence(
    labels: Sequence[str], rng: random.Random, reference: Sequence[str | None], well_formed: bool
) -> list[str]:
    """Return a sentence like `reference`, with random labels in place of None; if `well_formed`, without I- labels that
    begin an entity."""
    sentence: list[str] = []
    for wanted in reference:
        before = sentence[-1][2:] if sentence else ""
        allowed = [label for label in labels if not well_formed or label[0] != "I" or label[2:] == before]
        sentence.append(wanted if wanted in allowed else rng.choice(allowed))
    return sentence


def cases() -> Iterator[Case]:
    """Yield all sentences of four words with two types, in both roles, and random ones: half of them well-formed;
    predictions that agree with the reference in all words, in most, or only by chance."""
    rng = random.Random(0)
    labels = labels_of(["A", "B"])
    every = [list(sentence) for sentence in itertools.product(labels, repeat=4)]
    yield labels, rng.sample(every, len(every)), every
    for number in range(CASES):
        labels = labels_of(TYPES[number % len(TYPES)])
        well_formed = number % 8 < 4
        lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
        references = [random_sentence(labels, rng, [None] * length, well_formed) for length in lengths]
        changed = rng.choice([0.0, 0.2, 0.2, 1.0])
        kept = [[None if rng.random() < changed else label for label in sentence] for sentence in references]
        yield labels, [random_sentence(labels, rng, sentence, well_formed) for sentence in kept], references


def figures(predictions: list[list[str]], references: list[list[str]], **mode: Any) -> dict[str, list[float]]:
    """Return type -> precision, recall, F1 and number of expected entities, as fractions; "" stands for all types."""
    from seqeval import metrics  # pyright: ignore[reportMissingImports]

    arguments: dict[str, Any] = {"y_true": references, "y_pred": predictions, "zero_division": 0, **mode}
    scores = (metrics.precision_score, metrics.recall_score, metrics.f1_score)
    found: dict[str, list[float]] = {"": [float(score(**arguments)) for score in scores]}
    try:
        report = metrics.classification_report(**arguments, output_dict=True)
    except ValueError:  # seqeval's report needs at least one entity
        return found
    for name, row in report.items():
        if not name.endswith(" avg"):
            found[name] = [float(row[key]) for key in ("precision", "recall", "f1-score", "support")]
    return found


def main() -> None:
    from seqeval import metrics  # pyright: ignore[reportMissingImports]
    from seqeval.scheme import IOB2  # pyright: ignore[reportMissingImports]

    version = importlib.metadata.version("seqeval")
    if version != VERSION:
        raise SystemExit(f"seqeval is {version}, and {FILE.name} is made with {VERSION}")
    lines = []
    for labels, predictions, references in cases():
        number = {label: str(i) for i, label in enumerate(labels)}  # at most nine labels: one digit each
        case = {
            "labels": labels,
            "predictions": ["".join(map(number.__getitem__, sentence)) for sentence in predictions],
            "references": ["".join(map(number.__getitem__, sentence)) for sentence in references],
            "accuracy": float(metrics.accuracy_score(references, predictions)),
            "default": figures(predictions, references),
            "strict": figures(predictions, references, mode="strict", scheme=IOB2),
        }
        lines.append(json.dumps(case))
    cases_text = ",\n".join(lines)
    FILE.write_text(f'{{"seqeval": "{version}", "cases": [\n{cases_text}\n]}}\n')


if __name__ == "__main__":
    main()
