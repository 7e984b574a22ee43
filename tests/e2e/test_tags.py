"""`TokenClassifier`, `qa-dist tag` and `serve` for token classification, on a run of seconds."""

import itertools
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, pipeline

from qa_dist import QuestionAnswerer, TokenClassifier
from qa_dist.cli import main
from qa_dist.config import SyntheticConfig
from qa_dist.errors import InputError, UserError
from qa_dist.tasks.token_classification import synthetic
from tests.browser import browser_page
from tests.e2e.test_checkpoints import qa_dist as command
from tests.e2e.test_token_classification import flags_of
from tests.helpers import FORK_SERVER, ROOT, environment

EXAMPLES = synthetic.generate(SyntheticConfig(validation_examples=21, long_share=0.3), "validation")
TEXT = "Ada Brunot was born in Graul . She works for Kelman Works ."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    with pytest.raises(SystemExit) as exit_:
        main(["train", *flags_of(directory / "cache"), "--run.output_dir", str(directory / "run")])
    assert exit_.value.code == 0
    return directory / "run"


@pytest.fixture(scope="module")
def classifier(run: Path) -> TokenClassifier:
    return TokenClassifier.from_pretrained(str(run), device="cpu")


def places(entities: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(entity["entity_group"], entity["start"], entity["end"]) for entity in entities]


def test_words_give_the_entities_of_the_evaluation(run: Path, classifier: TokenClassifier):
    predictions = json.loads((run / "predictions.json").read_text())
    found = classifier([list(example.words) for example in EXAMPLES])
    for example, entities in zip(EXAMPLES, found, strict=True):
        expected = predictions[example.id]
        assert places(entities) == [(own["type"], own["start"], own["end"]) for own in expected]
        assert [own["score"] for own in entities] == pytest.approx([own["score"] for own in expected], abs=1e-5)
    assert sum(map(len, found)) > 20


def test_texts_give_what_transformers_gives(run: Path, classifier: TokenClassifier):
    """Where both see the same words: those between blanks."""
    tag: Any = pipeline("token-classification", model=str(run / "model"), aggregation_strategy="first", stride=12)
    several = 0
    for example in EXAMPLES:
        text = " ".join(example.words)
        ours = classifier(text)
        assert all(text[own["start"] : own["end"]] == own["word"] for own in ours)
        if len(example.words) > 25:
            several += 1  # of two windows transformers keeps another prediction
            continue
        theirs = tag(text)
        assert places(ours) == places(theirs)
        # transformers takes the score of the first token of a word, too, and their mean
        assert [own["score"] for own in ours] == pytest.approx([own["score"] for own in theirs], abs=1e-4)
    assert several < len(EXAMPLES) / 2


def test_batches_streams_and_threads_change_nothing(classifier: TokenClassifier, monkeypatch: pytest.MonkeyPatch):
    texts = [" ".join(example.words) for example in EXAMPLES]
    expected = [classifier(text) for text in texts]
    assert [places(own) for own in classifier(texts)] == [places(own) for own in expected]
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: classifier(texts[i:])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([places(own) for own in found[i]] == [places(own) for own in expected[i:]] for i in range(4))
    monkeypatch.setattr("qa_dist.inference.reader.TEXTS_PER_CHUNK", 4)
    stream = classifier(text for text in itertools.cycle(texts))
    assert [places(next(stream)) for _ in range(6)] == [places(own) for own in expected[:6]]
    assert classifier([]) == []
    assert classifier("\u200b\u200e") == []  # nothing that is seen, and so no word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty"),
        (" \n\t", "the text holds nothing but blanks"),
        ("half \ud800", "surrogate"),
        (7, "neither a text nor several of them, but int"),
        ([["Ada", " "]], "text 1: word 2 is empty or blank"),
        ([["Ada", None]], "text 1: word 2 is not a text, but NoneType"),
        ({"text": "Ada"}, "neither a text nor several of them, but dict"),
        (b"Ada", "neither a text nor several of them, but bytes"),
        ([b"Ada"], "text 1: is neither a text nor a list of words, but bytes"),
        (["Ada"] * 1030 + [""], "text 1,031: the text is empty"),
        ([[]], "there are no words"),
        (["good", 5], "text 2: is neither a text nor a list of words, but int"),
    ],
)
def test_what_cannot_be_read(classifier: TokenClassifier, text: Any, message: str):
    with pytest.raises(InputError, match=message):
        classifier(text)


def test_what_comes_before_a_bad_text_is_read(classifier: TokenClassifier):
    texts = [" ".join(example.words) for example in EXAMPLES[:2]]
    stream = classifier(iter([*texts, ""]))
    assert [next(stream), next(stream)] == classifier(texts)
    with pytest.raises(InputError, match="text 3: the text is empty"):
        next(stream)


@pytest.mark.parametrize("timeout", ["1", -1, float("nan")])
def test_a_time_limit_is_a_number_of_seconds(classifier: TokenClassifier, timeout: Any):
    with pytest.raises(InputError, match=r"timeout: .* is not a number of seconds"):
        classifier("Ada", timeout=timeout)


def test_labels_can_be_named_for_a_model_that_has_no_names(run: Path, classifier: TokenClassifier, tmp_path: Path):
    path = shutil.copytree(run / "model", tmp_path / "nameless")
    content = json.loads((path / "config.json").read_text())
    names = [content["id2label"][str(i)] for i in range(len(content["id2label"]))]
    for name in ("id2label", "label2id"):
        del content[name]
    (path / "config.json").write_text(json.dumps(content | {"num_labels": len(names)}))
    with pytest.raises(UserError, match=r"a head for 7 labels; and no names .*data.labels \(to ask it: with labels"):
        TokenClassifier.from_pretrained(str(path))
    named = TokenClassifier.from_pretrained(str(path), labels=names, device="cpu")
    assert named(TEXT) == classifier(TEXT)
    with pytest.raises(UserError, match=r"has a head for 7 labels, and data.labels has 6"):
        TokenClassifier.from_pretrained(str(path), labels=names[:-1])


def test_models_that_cannot_be_used(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="is a model for token classification, not for question answering"):
        QuestionAnswerer.from_pretrained(str(run))
    damaged = shutil.copytree(run / "model", tmp_path / "damaged")
    model = AutoModelForTokenClassification.from_pretrained(damaged)
    model.classifier.weight.data.fill_(torch.nan)
    model.save_pretrained(damaged)
    with pytest.raises(UserError, match="logits are not numbers"):
        TokenClassifier.from_pretrained(str(damaged), device="cpu")(TEXT)
    (tmp_path / "words.conll").write_text("Ada\nlives\n")
    flags = ["--data.validation_file", str(tmp_path / "words.conll"), "--run.output_dir", str(tmp_path / "out")]
    code, _, message = command(capsys, "predict", "--model", str(damaged), *flags)
    assert code == 1 and "the model's outputs are not numbers: its weights are not usable" in message
    code, _, message = command(capsys, "evaluate", "--task", "question_answering", "--model", str(run), *flags)
    assert code == 2
    assert "is a model for token classification, and the task is question answering; set task to token_cl" in message
    (damaged / "qa_dist.json").unlink()
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be loaded"):
        TokenClassifier.from_pretrained(str(damaged), device="cpu")
    with pytest.raises(TimeoutError):
        TokenClassifier.from_pretrained(str(run), device="cpu")("word " * 5000, timeout=0.001)


def test_a_file_of_no_json_lines_at_all(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "words.conll").write_text("Ada O\n\nlives O\n")
    code, _, err = command(capsys, "tag", "--model", str(run), "--input", str(tmp_path / "words.conll"))
    assert code == 2
    assert err.endswith(
        "2 of 2 lines could not be answered\n"
        "each line has to be a JSON object with text or tokens; other files of data are for qa-dist predict\n"
    )


def test_the_command(run: Path, classifier: TokenClassifier, tmp_path: Path, capsys):
    expected = classifier(TEXT)
    code, out, err = command(capsys, "tag", "--model", str(run), "--text", TEXT)
    assert (code, err) == (0, "") and expected
    assert [line.split()[1] for line in out.splitlines()] == [own["entity_group"] for own in expected]
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, _ = command(capsys, "tag", "--model", str(run), "--text-file", str(tmp_path / "text.txt"), "--json")
    assert places(json.loads(out)) == places(expected)
    lines = [{"id": 4, "text": TEXT}, {"tokens": TEXT.split()}, {"other": 1}, {"text": ""}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{")
    code, out, err = command(capsys, "tag", "--model", str(run), "--input", str(tmp_path / "lines.jsonl"))
    assert code == 2 and "line 5: is not JSON" in err and "3 of 5 lines" in err
    found = [json.loads(line) for line in out.splitlines()]
    assert found[0]["id"] == 4 and places(found[0]["entities"]) == places(expected)
    assert [own["word"] for own in found[1]["entities"]] == [own["word"] for own in expected]
    assert [(own["line"], own["error"]) for own in found[2:4]] == [
        (3, "there is neither text nor tokens"),
        (4, "the text is empty"),
    ]
    for args, message in (
        ((), "name a file with the text"),
        (("--text", "a", "--input", "b"), "one of them"),
        (("--text", " "), "nothing but blanks"),
        (("--text_file", str(tmp_path / "none")), "--text_file: .*none: No such file"),
    ):
        code, _, err = command(capsys, "tag", "--model", str(run), *args)
        assert code == 2 and re.search(message, err), err


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [FORK_SERVER.python, "-m", "qa_dist", "serve", "--model", str(run), "--port", "0"],
        stdout=subprocess.PIPE, env=environment(), text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout
    try:
        yield process.stdout.readline().split()[0]
        assert process.poll() is None, "the server stayed up"
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


def test_the_server(url: str, classifier: TokenClassifier):
    def post(content: Any) -> Any:
        data, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/answer", data, headers)) as response:
            return json.loads(response.read())

    assert places(post({"text": TEXT})["entities"]) == places(classifier(TEXT))
    for content, message in (
        ({"question": "a"}, b"text is needed"),
        ({"text": "a", "top_k": 2}, b"unknown keys: 'top_k'; it takes text"),
        ({"text": " "}, b"nothing but blanks"),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(content)
        assert caught.value.code == 400 and message in caught.value.read()


def test_the_page(url: str, classifier: TokenClassifier):
    with browser_page() as (page, problems):
        page.goto(url)
        page.fill("#context", f"\U0001f600 {TEXT}")
        assert page.locator("#question").is_hidden()
        page.click("#ask")
        page.wait_for_selector("#answers li")
        expected = classifier(f"\U0001f600 {TEXT}")
        assert [text.strip() for text in page.locator("#answers .type").all_inner_texts()] == [
            own["entity_group"] for own in expected
        ]
        assert page.locator("mark").all_text_contents() == [own["word"] for own in expected]
        types = page.locator("mark").evaluate_all("marks => marks.map((mark) => mark.dataset.type)")
        assert types == [own["entity_group"] for own in expected]
        assert problems == []
