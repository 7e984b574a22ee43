"""`qa-dist answer`, `predict` and `serve`, as they are typed, and the page in a real browser."""

import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qa_dist import QuestionAnswerer
from qa_dist.cli import main
from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering import synthetic
from tests.browser import browser_page
from tests.e2e.test_checkpoints import qa_dist as command
from tests.helpers import FORK_SERVER, ROOT, Launcher, environment, squad, tiny_flags

EXAMPLES = synthetic.generate(SyntheticConfig(train_examples=12, long_share=0.3, seed=9), "train")
QUESTION, CONTEXT = EXAMPLES[0].question, EXAMPLES[0].context


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run on questions of which some have no answer."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    flags = tiny_flags(
        **{"data.synthetic.unanswerable_share": "0.3", "data.unanswerable": "allow", "train.epochs": "1"}
    )
    with pytest.raises(SystemExit) as exit_:
        main(["train", *flags, "--run.output_dir", str(directory)])
    assert exit_.value.code == 0
    return directory


@pytest.fixture(scope="module")
def answerer(run: Path) -> QuestionAnswerer:
    return QuestionAnswerer.from_pretrained(str(run), device="cpu")


def typed(*args: str, input: bytes) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own, which has a standard input."""
    return subprocess.run(
        [FORK_SERVER.python, "-m", "qa_dist", *args], input=input, capture_output=True, env=environment(), timeout=120
    )


# --------------------------------------------------------------------------------------------------- answer


def test_a_question_is_answered(run: Path, answerer: QuestionAnswerer, tmp_path: Path, capsys):
    file = tmp_path / "context.txt"
    file.write_text(CONTEXT)
    expected = answerer(QUESTION, CONTEXT, top_k=3)
    asked = ("--model", str(run), "--question", QUESTION, "--context-file", str(file))
    code, out, err = command(capsys, "answer", *asked, "--top-k", "3", "--json")
    assert (code, err) == (0, "")
    assert [answer["answer"] for answer in json.loads(out)] == [answer["answer"] for answer in expected]
    code, out, _ = command(capsys, "answer", *asked)
    assert code == 0
    answer = expected[0]
    assert out.split()[0] == f"{answer['score']:.3f}"
    assert answer["answer"] in out or "(no answer)" in out
    code, again, _ = command(capsys, "answer", "--model", str(run), "--question", QUESTION, "--context", CONTEXT)
    assert again == out
    found = typed("answer", "--model", str(run), "--question", QUESTION, "--context_file", "-", input=CONTEXT.encode())
    assert found.stdout.decode() == out


def test_lines_in_and_lines_out(run: Path, answerer: QuestionAnswerer, tmp_path: Path, capsys):
    lines = [
        json.dumps({"id": 7, "question": QUESTION, "context": CONTEXT, "note": "é"}).encode(),
        b"{not json",
        b"",
        b'{"question": "x"}',
        json.dumps({"question": "word " * 200, "context": "text"}).encode(),
        b'{"question": "\xff", "context": "text"}',
        b"[1, 2]",
        json.dumps({"question": "  ", "context": "text"}).encode(),
        json.dumps(
            {
                "question": EXAMPLES[1].question,
                "context": EXAMPLES[1].context,
                "id": "\ud800",
                "error": "old",
                "score": 1,
            }
        ).encode(),
    ]
    file = tmp_path / "questions.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    code, out, err = command(capsys, "answer", "--model", str(run), "--input", str(file))
    assert code == 2
    found = [json.loads(line) for line in out.splitlines()]
    good = [found[0], found[-1]]
    expected = answerer([(example.question, example.context) for example in EXAMPLES[:2]])
    assert [(one["answer"], one["start"]) for one in good] == [(one["answer"], one["start"]) for one in expected]
    assert (found[0]["id"], found[0]["note"]) == (7, "é")
    assert found[-1]["id"] == "\ud800" and "error" not in found[-1]
    errors = {one["line"]: one["error"] for one in found[1:-1]}
    assert list(errors) == [2, 4, 5, 6, 7, 8]
    for line, message in {
        2: "is not JSON",
        4: "the context is not a text",
        5: "tokens, and may have",
        6: "is not UTF-8",
        7: "is not a JSON object",
        8: "the question holds nothing but blanks",
    }.items():
        assert message in errors[line]
        assert f"line {line}: " in err
    assert "6 of 8 lines could not be answered" in err
    found = typed("answer", "--model", str(run), "--input", "-", "--top_k", "2", input=lines[0] + b"\n")
    assert found.returncode == 0, found.stderr
    assert len(json.loads(found.stdout)["answers"]) == 2


def test_a_program_that_waits_for_each_answer_gets_it(run: Path):
    process = subprocess.Popen(
        [FORK_SERVER.python, "-m", "qa_dist", "answer", "--model", str(run), "--input", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert process.stdin and process.stdout
    for i in range(3):
        line = json.dumps({"id": i, "question": QUESTION, "context": CONTEXT})
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == i
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def test_a_reader_that_has_seen_enough(run: Path, tmp_path: Path):
    line = json.dumps({"question": QUESTION, "context": CONTEXT})
    (tmp_path / "many.jsonl").write_text(f"{line}\n" * 2000)
    command = f"{FORK_SERVER.python} -m qa_dist answer --model {run} --input {tmp_path}/many.jsonl"
    found = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, env=environment(), text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (141, "")
    assert json.loads(found.stdout)


def test_mistakes_in_asking(run: Path, tmp_path: Path, capsys):
    (tmp_path / "latin1.txt").write_bytes(b"first\nna\xefve")
    (tmp_path / "blank.txt").write_text(" \n\t ")
    (tmp_path / "empty.jsonl").write_text("\n")
    shutil.copytree(run / "model", tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    model, question = ("--model", str(run)), ("--question", QUESTION)
    for args, message in (
        ((*model,), "--question: is not set"),
        ((*model, *question), "name a file with the text"),
        ((*model, *question, "--context", "a", "--context_file", "b"), "one of both"),
        ((*model, *question, "--input", "b"), "leave out --question"),
        ((*model, *question, "--context_file", str(tmp_path / "none.txt")), "none.txt: No such file"),
        ((*model, *question, "--context_file", str(tmp_path / "latin1.txt")), "line 2 holds the byte 0xef"),
        ((*model, *question, "--context_file", str(tmp_path / "blank.txt")), "nothing but blanks"),
        ((*model, "--question", "", "--context", "a"), "the question is empty"),
        ((*model, "--input", str(tmp_path / "empty.jsonl")), "holds no line"),
        ((*model, "--input", str(tmp_path)), "Is a directory"),
        ((*model, *question, "--context", "a", "--top_k", "0"), "top_k: 0"),
        (("--model", str(tmp_path), *question, "--context", "a"), "holds no config.json"),
        (("--model", str(tmp_path / "truncated"), *question, "--context", "a"), "weights of .* cannot be loaded"),
    ):
        code, out, err = command(capsys, "answer", *args)
        assert (code, out) == (2, "")
        assert "Traceback" not in err and err.startswith("qa-dist: ")
        assert re.search(message, err), err
    wrong = {"--timeout": ("0", "-5", "nan", "inf"), "--max_characters": ("-1",), "--port": ("99999",), "--host": ("",)}
    for flag, value in ((flag, value) for flag, values in wrong.items() for value in values):
        code, _, err = command(capsys, "serve", *model, flag, value)
        assert code == 2 and flag in err


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in SQuAD's form, and beside them the same as lines."""
    examples = synthetic.generate(
        SyntheticConfig(validation_examples=150, long_share=0.4, unanswerable_share=0.3, seed=21), "validation"
    )
    rows = [{"id": example.id, "question": example.question, "context": example.context} for example in examples]
    answers = [
        [{"text": text, "answer_start": start} for text, start in zip(one.answers, one.answer_starts, strict=True)]
        for one in examples
    ]
    path = tmp_path_factory.mktemp("dev") / "dev.json"
    path.write_text(json.dumps(squad([row | {"answers": own} for row, own in zip(rows, answers, strict=True)])))
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_the_evaluated_ones(run: Path, dev: Path, server: int, tmp_path: Path, capsys):
    """Of `answer` and of `serve`: the texts and lists of `evaluate` and, by the stored threshold, of `predict`."""
    model, lines = tmp_path / "model", dev.with_suffix(".jsonl")
    shutil.copytree(run / "model", model)

    def files(name: str) -> tuple[dict[str, Any], ...]:
        flags = ("--model", str(model), "--data.validation_file", str(dev), "--run.output_dir", str(tmp_path / name))
        code, _, err = command(capsys, name, *flags)
        assert code == 0, err
        names = ("predictions", "nbest_predictions", "null_odds")
        return tuple(json.loads((tmp_path / name / f"{file}.json").read_text()) for file in names)

    def answers(*flags: str) -> dict[str, dict[str, Any]]:
        code, out, err = command(capsys, "answer", "--model", str(model), "--input", str(lines), *flags)
        assert code == 0, err
        return {line["id"]: line for line in map(json.loads, out.splitlines())}

    evaluated, n_best, null_odds = files("evaluate")
    assert {key: one["answer"] for key, one in answers("--no_answer_threshold", "0").items()} == evaluated
    stored = json.loads((model / "qa_dist.json").read_text())
    for line in lines.read_text().splitlines()[:10]:  # the server has the model as it was
        asked = json.loads(line)
        status, content = post(server, asking(asked["question"], asked["context"], top_k=50))
        assert status == 200
        found, key = [own["answer"] for own in content["answers"]], asked["id"]
        assert sorted(found) == sorted(entry["text"] for entry in n_best[key])
        assert (found[0] == "") == (null_odds[key] > stored["findings"]["no_answer_threshold"])
    threshold = sorted(null_odds.values())[len(null_odds) // 2]
    (model / "qa_dist.json").write_text(json.dumps(stored | {"findings": {"no_answer_threshold": threshold}}))
    predicted, n_best, _ = files("predict")
    assert 20 < list(predicted.values()).count("") < len(predicted) - 20
    own = answers()
    assert {key: one["answer"] for key, one in own.items()} == predicted
    for key, one in own.items():
        entry = next(entry for entry in n_best[key] if entry["text"] == predicted[key])
        assert (one["start"], one["end"]) == (entry.get("start", 0), entry.get("end", 0))
        assert one["score"] == pytest.approx(entry["probability"], abs=1e-6)
    merged = answers("--decoding", "pipeline")
    assert [one["score"] for one in merged.values()] != [one["score"] for one in own.values()]


# -------------------------------------------------------------------------------------------------- predict


def test_predictions_do_not_depend_on_the_processes_or_on_answers(
    run: Path, launcher: Launcher, tmp_path: Path, capsys
):
    plain = [{"id": example.id, "question": example.question, "context": example.context} for example in EXAMPLES]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(row) for row in plain))
    wrong = [{**row, "answers": [{"text": "nowhere", "answer_start": 3}]} for row in plain]
    (tmp_path / "nested.json").write_text(json.dumps(squad(wrong)))
    code, _, err = command(
        capsys, "predict", "--model", str(run / "model"), "--data.validation_file", str(tmp_path / "nested.json"),
        "--run.output_dir", str(tmp_path / "alone"),
    )  # fmt: skip
    assert code == 0, err
    found = launcher.run(
        "zero2", 2, "-m", "qa_dist", "predict", "--model", str(run / "model"),
        "--data.validation_file", str(tmp_path / "lines.jsonl"), "--run.output_dir", str(tmp_path / "two"),
    )  # fmt: skip
    assert found.code == 0, found.output
    for name in ("predictions.json", "nbest_predictions.json", "null_odds.json"):
        alone, two = (json.loads((tmp_path / where / name).read_text()) for where in ("alone", "two"))
        assert list(alone) == [example.id for example in EXAMPLES]
        assert alone == two
    assert not (tmp_path / "two" / "metrics.json").exists(), "nothing says what is right"
    findings = json.loads((run / "model" / "qa_dist.json").read_text())["findings"]
    code, _, err = command(
        capsys, "predict", "--model", str(run / "model"), "--data.validation_file", str(tmp_path / "nested.json"),
        "--data.train_file", "elsewhere.json", "--run.output_dir", str(tmp_path / "alone"),
    )  # fmt: skip
    assert code == 2 and "holds another run" in err and "--resume" not in err and "elsewhere" not in err
    settings = (tmp_path / "two" / "config.yaml").read_text()
    assert f"null_score_diff_threshold: {findings['no_answer_threshold']}" in settings, "the tuned one"


# ---------------------------------------------------------------------------------------------------- serve


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[int]:
    """The port of a server that was started as a user does."""
    process = subprocess.Popen(
        [FORK_SERVER.python, "-m", "qa_dist", "serve", "--model", str(run), "--port", "0", "--max_characters", "20000",
         "--timeout", "5"],
        stdout=subprocess.PIPE, env=environment(), text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout
    try:
        yield int(process.stdout.readline().split()[0].rsplit(":", 1)[1])
        assert process.poll() is None, "the server stayed up"
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


def post(port: int, body: bytes, path: str = "/answer", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def asking(question: Any = QUESTION, context: Any = CONTEXT, **more: Any) -> bytes:
    return json.dumps({"question": question, "context": context, **more}).encode()


def test_programs_are_answered(server: int, answerer: QuestionAnswerer):
    status, content = post(server, asking(top_k=3))
    assert status == 200
    expected = answerer(QUESTION, CONTEXT, top_k=3)
    assert [own["answer"] for own in content["answers"]] == [own["answer"] for own in expected]
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(post(server, asking(*pair(i))))) for i in range(6)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [200] * 6


def pair(i: int) -> tuple[str, str]:
    return EXAMPLES[i].question, EXAMPLES[i].context


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (asking(question=""), 400, "the question is empty"),
        (asking(context=" \n"), 400, "the context holds nothing but blanks"),
        (asking(context=5), 400, "both texts"),
        (asking(topk=3), 400, "the request has unknown keys: 'topk'; it takes question, context, top_k"),
        (asking(top_k=0), 400, "top_k is a number from 1 to 50"),
        (asking(top_k=True), 400, "top_k is a number from 1 to 50"),
        (asking(context="x" * 20_001), 413, "more than 20,000 characters"),
        (asking(context="x" * 5_000_000), 413, "more than 20,000 characters"),
        (asking(context="half \ud800"), 400, "surrogate"),
        (asking(question="word " * 300), 400, "tokens, and may have"),
        (b'{"question": "\xff", "context": "a"}', 400, "not JSON in UTF-8"),
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[1]", 400, "not a JSON object"),
        (b"", 400, "not JSON"),
    ],
)
def test_bad_requests_are_told_and_the_server_stays_up(server: int, body: bytes, status: int, message: str):
    found, content = post(server, body)
    assert found == status
    assert message in content["error"]
    assert post(server, asking())[0] == 200


def test_other_methods(server: int):
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=30)
    connection.request("HEAD", "/")
    response = connection.getresponse()
    assert response.status == 200 and int(response.headers["Content-Length"]) > 500 and response.read() == b""
    connection.request("GET", "/", body=b"GET /model HTTP/1.1\r\n\r\n")
    response = connection.getresponse()
    assert response.status == 200 and b"Ask a text" in response.read()
    assert response.headers["Connection"] == "close", "what follows is no request"
    connection.close()
    assert post(server, asking(), **{"Content-Length": "9" * 5000})[0] == 411


def test_other_sites_get_no_answer(server: int):
    assert post(server, asking(), **{"Content-Type": "text/plain"})[0] == 415
    assert post(server, asking(), Host="attacker.example")[0] == 403
    assert post(server, asking(), Host=f"LocalHost:{server}")[0] == 200
    assert post(server, asking(), path="/other")[0] == 404
    assert post(server, asking(), **{"Content-Length": "-5"})[0] == 411


def test_clients_that_send_no_more_are_let_go(server: int):
    """One that promises more than it sends, and many that only hold a connection open."""
    idle = [socket.create_connection(("127.0.0.1", server)) for _ in range(40)]
    for connection in idle:
        connection.close()
    with socket.create_connection(("127.0.0.1", server), timeout=30) as connection:
        head = (
            "POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        connection.sendall(head.encode() + b'{"question"')
        begin = time.monotonic()
        connection.settimeout(1)
        answer = b""
        while b"408" not in answer and time.monotonic() - begin < 25:
            try:
                connection.sendall(b" ")  # a byte now and then does not keep it
                answer += connection.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
        assert b"408" in answer
    assert post(server, asking())[0] == 200


def test_a_port_that_is_taken(run: Path, server: int, capsys):
    code, _, err = command(capsys, "serve", "--model", str(run), "--port", str(server))
    assert code == 2
    assert f"--port {server}: cannot be listened on: Address already in use" in err


def test_the_page_marks_answers_in_the_text(server: int, answerer: QuestionAnswerer):
    context = f"\U0001f600 <b>&amp;</b> {CONTEXT}"
    expected = answerer(QUESTION, context, top_k=3)
    with browser_page() as (page, problems):
        page.goto(f"http://127.0.0.1:{server}/")
        page.fill("#context", context)
        page.fill("#question", QUESTION)
        page.click("#ask")
        page.wait_for_selector("#answers li")
        shown = page.locator("#answers li")
        assert shown.count() == 3
        for i, answer in enumerate(expected):
            shown.nth(i).locator("button").click()
            text = answer["answer"] or "no answer in the text"
            assert shown.nth(i).inner_text().split("\n")[-1].split() == text.split()
            marked = "".join(page.locator("mark.chosen").all_text_contents())
            assert marked == answer["answer"], "characters beyond the basic plane are counted as one"
        assert page.inner_text("#text") == context
        page.fill("#question", "   ")
        page.click("#ask")
        page.wait_for_selector("#message.wrong")
        assert "nothing but blanks" in page.inner_text("#message")
        assert page.locator("#result").is_hidden()
        page.fill("#context", "x" * 20_100)
        assert page.locator("#ask").is_disabled()
        assert "too many" in page.inner_text("#size")
        assert [problem for problem in problems if "400" not in problem] == []
