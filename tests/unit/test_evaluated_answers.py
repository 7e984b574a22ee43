"""`QuestionAnswerer` gives the answers that were evaluated: the same texts, lists and probabilities as the files."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qa_dist import QuestionAnswerer
from qa_dist.cli import main
from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering import synthetic
from tests.helpers import SIZES
from tests.tokenizers import roberta_tokenizer, wordpiece_tokenizer, xlnet_tokenizer
from tests.unit.test_inference import save

COUNTS = {"bert": 200, "bert_v2": 200, "roberta": 50, "xlnet": 20}
"""Questions to each kind of model; those of the slower ones are fewer."""
V2 = {"data.unanswerable": "allow", "evaluation.max_answer_length": 8}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "pad_token_id": 5}


def command(*args: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    assert exit_.value.code == 0


class Evaluated:
    """A weak model, and what `qa-dist evaluate` and `qa-dist predict` say of questions to it."""

    def __init__(self, directory: Path, kind: str):
        self.directory, self.kind = directory, kind
        self.synthetic = {"validation_examples": COUNTS[kind], "long_share": 0.5, "seed": 11}
        if kind == "bert_v2":
            self.synthetic["unanswerable_share"] = 0.3
        self.examples = synthetic.generate(SyntheticConfig.model_validate(self.synthetic), "validation")
        self.pairs = [(example.question, example.context) for example in self.examples]
        texts = [*synthetic.texts(self.examples), "naïve café"]
        family = kind.partition("_")[0]
        make = {"bert": wordpiece_tokenizer, "roberta": roberta_tokenizer, "xlnet": xlnet_tokenizer}[family]
        tokenizer = make(texts)
        tokens = {"roberta": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}}.get(family, {})
        sizes = XLNET if family == "xlnet" else SIZES
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **tokens, **sizes)
        self.model = str(save(directory / "model", config, tokenizer, settings=V2 if kind == "bert_v2" else {}))
        self.evaluated = self.run("evaluate")

    def run(self, name: str) -> dict[str, Any]:
        """The files of predictions that a command leaves, by their names without the ending."""
        flags = [part for key, value in self.synthetic.items() for part in (f"--data.synthetic.{key}", str(value))]
        output = self.directory / name
        command(
            name, "--model", self.model, *flags, "--data.cache_dir", str(self.directory / "cache"),
            "--evaluation.batch_size", "32", "--run.output_dir", str(output),
        )  # fmt: skip
        return {file.stem: json.loads(file.read_text()) for file in output.glob("*.json")}

    def store_threshold(self, threshold: float) -> None:
        """As an evaluation that found it to be the best."""
        path = Path(self.model) / "qa_dist.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"findings": {"no_answer_threshold": threshold}}))

    def lists(self, files: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """The n-best list of every question, its prediction first."""
        found = []
        for example in self.examples:
            entries, predicted = files["nbest_predictions"][example.id], files["predictions"][example.id]
            first = next(i for i, entry in enumerate(entries) if entry["text"] == predicted)
            found.append([entries[first], *entries[:first], *entries[first + 1 :]])
        return found


@pytest.fixture(scope="module", params=COUNTS)
def weak(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return Evaluated(tmp_path_factory.mktemp(request.param), request.param)


def as_entries(answers: Sequence[dict[str, Any]]) -> list[tuple[str, int, int, float]]:
    return [(answer["answer"], answer["start"], answer["end"], answer["score"]) for answer in answers]


def as_expected(entries: Sequence[dict[str, Any]]) -> list[tuple[str, int, int, float]]:
    return [
        (entry["text"], entry.get("start", 0), entry.get("end", 0), entry["probability"]) for entry in entries
    ]  # fmt: skip


def require_same(answers: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> None:
    """Places and probabilities are the same; entries whose scores are equal but for rounding may change places."""
    own, expected = as_entries(answers), as_expected(entries)
    assert len(own) == len(expected)
    for i, (found, wanted) in enumerate(zip(own, expected, strict=True)):
        if found[:3] != wanted[:3]:
            place = [one[:3] for one in expected].index(found[:3])
            assert abs(entries[place]["score"] - entries[i]["score"]) < 1e-5, (i, found, wanted)
        assert found[3] == pytest.approx(wanted[3], abs=1e-6)


def test_answers_are_those_of_the_files(weak: Evaluated):
    """In the batches of the evaluation bit for bit, each list as a whole and the answer alone."""
    threshold = 0.0 if weak.kind == "bert_v2" else None
    answerer = QuestionAnswerer.from_pretrained(
        weak.model, device="cpu", batch_size=32, no_answer_threshold=threshold
    )  # fmt: skip
    expected = weak.lists(weak.evaluated)
    found = answerer(weak.pairs, top_k=50)
    assert [as_entries(own) for own in found] == [as_expected(entries) for entries in expected]
    alone = [own["answer"] for own in answerer(weak.pairs)]
    assert alone == list(weak.evaluated["predictions"].values())
    assert sum(len(own[0]["windows"]) > 1 for own in found) > len(found) / 4
    assert max(len(entries) for entries in expected) == 20 + (threshold is not None)
    merged = QuestionAnswerer.from_pretrained(weak.model, device="cpu", decoding="pipeline")
    others = [own["answer"] for own in merged(weak.pairs)]
    assert sum(a != b for a, b in zip(alone, others, strict=True)) > len(others) / 20, (
        "else the two rules are not told apart"
    )


@pytest.mark.parametrize("batch_size", [1, 7])
def test_answers_do_not_depend_on_the_batches(weak: Evaluated, batch_size: int):
    threshold = 0.0 if weak.kind == "bert_v2" else None
    answerer = QuestionAnswerer.from_pretrained(
        weak.model, device="cpu", batch_size=batch_size, no_answer_threshold=threshold
    )  # fmt: skip
    expected = weak.lists(weak.evaluated)
    count = len(weak.pairs)
    order = random.Random(batch_size).sample(range(count), count // 3)
    together = answerer([weak.pairs[i] for i in order], top_k=50)
    alone = [answerer(*weak.pairs[i], top_k=50) for i in order[:10]]
    for i, own in zip([*order, *order[:10]], [*together, *alone], strict=True):
        require_same(own, expected[i])


@pytest.mark.parametrize("weak", ["bert_v2"], indirect=True)
def test_the_stored_threshold_holds_as_in_predict(weak: Evaluated):
    """`predict` and the answerer both use the threshold that was found to be the best; the lists are the same."""
    odds = list(weak.evaluated["null_odds"].values())
    threshold = sorted(odds)[len(odds) // 2]
    weak.store_threshold(threshold)
    files = weak.run("predict")
    answerer = QuestionAnswerer.from_pretrained(weak.model, device="cpu", batch_size=32)
    assert answerer.no_answer_threshold == threshold
    found = answerer(weak.pairs, top_k=50)
    assert [as_entries(own) for own in found] == [as_expected(entries) for entries in weak.lists(files)]
    assert files["nbest_predictions"] == weak.evaluated["nbest_predictions"]
    assert [own[0]["answer"] == "" for own in found] == [value > threshold for value in odds]
    assert [own[0]["no_answer_probability"] for own in found] == nulls(files)
    without = answerer(weak.pairs, top_k=50, handle_impossible_answer=False)
    assert without == [[one for one in own if one["answer"]] for own in found]


def nulls(files: dict[str, Any]) -> list[float]:
    """The probability of "no answer" for every question."""
    return [
        next(entry["probability"] for entry in entries if not entry["text"])
        for entries in files["nbest_predictions"].values()
    ]


@pytest.mark.parametrize("weak", ["bert"], indirect=True)
def test_a_model_without_a_threshold_may_be_allowed_to_give_no_answer(weak: Evaluated):
    """ "No answer" then competes by its score, and takes part in the softmax."""
    answerer = QuestionAnswerer.from_pretrained(weak.model, device="cpu", batch_size=32)
    for own, entries in zip(
        answerer(weak.pairs, top_k=50, handle_impossible_answer=True), weak.lists(weak.evaluated), strict=True
    ):
        none = own[0]["no_answer_probability"]
        assert sum(one["score"] for one in own) == pytest.approx(1)
        assert [one["score"] for one in own] == sorted((one["score"] for one in own), reverse=True)
        (empty,) = (one for one in own if not one["answer"])
        assert (empty["start"], empty["end"], empty["score"]) == (0, 0, none)
        rest = [(text, start, end) for text, start, end, _ in as_entries(own) if text]
        assert rest == [entry[:3] for entry in as_expected(entries)]
        for one, entry in zip([one for one in own if one["answer"]], entries, strict=True):
            assert one["score"] == pytest.approx(entry["probability"] * (1 - none), abs=1e-9)
