"""Run directories as an evaluation leaves them, of examples made by hand, for the tests of the report."""

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from qa_dist.reporting.report import write_report
from qa_dist.reporting.report.reading import Story, read_run
from qa_dist.tasks.task import Review
from tests.helpers import TINY_BERT, squad

CONTEXT = "Ada Lovelace was born in London in 1815. She wrote the first program for the Analytical Engine."
OTHER_CONTEXT = "The café opened in Zürich because of its view. \U0001f600 Ten guests came."


def example(id: str, question: str, context: str, *answers: str) -> dict[str, Any]:
    """In SQuAD's form; each answer stands where it is first found."""
    found = [{"text": text, "answer_start": context.index(text)} for text in answers]
    return {"id": id, "question": question, "context": context, "answers": found}


EXAMPLES = [
    example("q1", "Where was Ada born?", CONTEXT, "London", "in London"),
    example("q2", "In what year was she born?", CONTEXT, "1815"),
    example("q3", "Whose program was it?", CONTEXT, "Ada Lovelace"),
    example("q4", "Name the engine.", CONTEXT, "the Analytical Engine"),
    example("q5", "Why did the café open?", OTHER_CONTEXT, "because of its view"),
    example("q6", "How many guests came?", OTHER_CONTEXT, "Ten guests"),
]
PREDICTIONS = {"q1": "London", "q2": "1815. She wrote", "q3": "Lovelace", "q4": "Analytical Engine", "q5": "Zürich"}
PREDICTIONS["q6"] = "Ten"


def answer(context: str, text: str, probability: float) -> dict[str, Any]:
    """A row of nbest_predictions.json."""
    start = context.index(text)
    return {"text": text, "start": start, "end": start + len(text), "probability": probability}


def n_best(
    examples: Sequence[Mapping[str, Any]], predictions: Mapping[str, str], probabilities: Mapping[str, float]
) -> dict[str, list[dict[str, Any]]]:
    """Of each example its prediction, and the context's first word."""
    found = {}
    for one in examples:
        id, context = one["id"], one["context"]
        rest = answer(context, context.split()[0], round((1 - probabilities[id]) / 2, 6))
        found[id] = [answer(context, predictions[id], probabilities[id]), rest]
    return found


PROBABILITIES = {"q1": 0.95, "q2": 0.91, "q3": 0.55, "q4": 0.58, "q5": 0.3, "q6": 0.05}
N_BEST = {"nbest_predictions.json": n_best(EXAMPLES, PREDICTIONS, PROBABILITIES)}


def train_line(step: int, **values: float | None) -> dict[str, Any]:
    figures = {"loss": 5 - step / 100, "learning_rate": 1e-5, "grad_norm": 2.0, "samples_per_second": 9.0}
    return {"kind": "train", "step": step, "epoch": step / 40, "tokens_per_second": 900.0, **figures, **values}


LINES = [
    *(train_line(step) for step in range(10, 50, 10)),
    {"kind": "evaluation", "step": 40, "epoch": 1, "exact_match": 40.0, "f1": 60.0, "loss": 2.5},
    *(train_line(step) for step in range(50, 90, 10)),
    {"kind": "evaluation", "step": 80, "epoch": 2, "exact_match": 33.3, "f1": 55.5, "loss": 2.75},
]


def write_run(
    run: Path,
    examples: Sequence[Mapping[str, Any]] = EXAMPLES,
    predictions: Mapping[str, str] | None = PREDICTIONS,
    *,
    lines: Sequence[Mapping[str, Any]] = LINES,
    files: Mapping[str, Any] | None = None,
    name: str | None = "demo",
    unanswerable: str = "error",
    state: str = "completed",
) -> Path:
    """`files` are further ones: name -> JSON content. The examples' own file lies beside the run directory."""
    run.mkdir(parents=True)
    data = run.parent / f"{run.name}-dev.json"
    data.write_text(json.dumps(squad([dict(one) for one in examples])))
    config = {
        "task": "question_answering",
        "data": {
            "train_file": [str(data)],
            "validation_file": [str(data)],
            "unanswerable": unanswerable,
            "max_length": 128,
            "stride": 32,
            "cache_dir": str(run.parent / "cache"),
        },
        "model": {"config": TINY_BERT, "vocab_size": 300},
        "train": {"epochs": 2},
        "evaluation": {},
        "run": {"name": name},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    content: dict[str, Any] = {
        "status.json": {"state": state, "step": 80, "launch": "DDP, float32, 2 processes on cpu"},
        **({} if predictions is None else {"predictions.json": predictions}),
        **(files or {}),
    }
    for file, value in content.items():
        (run / file).write_text(json.dumps(value))
    return run


class Parsed(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script is given."""
        return json.loads(self.scripts[0])


def read(run: Path) -> Story:
    return read_run(run, lambda text: None)


def written(run: Path, compare: Path | None = None) -> Parsed:
    return Parsed(write_report(run, None, compare, lambda text: None).read_text(encoding="utf-8"))


def reviewed(run: Path) -> Review:
    story = read(run)
    assert story.review is not None, story.notes
    return story.review
