"""What the report says, and that nothing it is given can break or be run by it."""

import base64
import hashlib
import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist.errors import UserError
from qa_dist.reporting.report import write_report
from qa_dist.reporting.report.breakdown import calibration
from qa_dist.reporting.report.charts import HEIGHT, Series, chart, thinned, ticks
from qa_dist.reporting.report.page import tiles
from qa_dist.reporting.report.reading import Log
from qa_dist.reporting.untrusted import without_paths
from tests.report_runs import (
    EXAMPLES,
    LINES,
    N_BEST,
    OTHER_CONTEXT,
    PREDICTIONS,
    PROBABILITIES,
    Parsed,
    example,
    n_best,
    read,
    reviewed,
    train_line,
    write_run,
    written,
)

# ------------------------------------------------------------------------------------------------- metrics.jsonl


def test_of_a_step_that_comes_twice_the_later_line_counts_and_damaged_ones_are_told(tmp_path: Path):
    run = write_run(tmp_path / "run", lines=[train_line(10), train_line(20), train_line(30)])
    good = (run / "metrics.jsonl").read_text()
    again = json.dumps(train_line(20, loss=1.25, grad_norm=None))
    damaged = ["{", "[1]", "5", '{"kind": "train", "step": "x"}', '{"step": 3}', "\x00\x01", '{"kind": "train", "st']
    (run / "metrics.jsonl").write_text("\n".join([good + again, *damaged]))
    log = Log.read(run / "metrics.jsonl")
    assert log.damaged == len(damaged)
    assert log.points("train", "loss") == [(10, 4.9), (20, 1.25), (30, 4.7)]
    assert log.points("train", "grad_norm") == [(10, 2.0), (30, 2.0)]
    page = written(run)
    assert "metrics.jsonl: 7 lines are damaged or half-written, and left out" in page.text
    assert [point[:2] for point in page.data["charts"]["loss"][0]["points"]] == [[10, 4.9], [20, 1.25], [30, 4.7]]


def test_bytes_that_are_no_text_and_numbers_that_are_none_are_left_out(tmp_path: Path):
    run = write_run(tmp_path / "run", lines=[train_line(10)])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"kind": "train", "step": 20, "loss": NaN, "epoch": 1e999}\n' + b"[" * 100_000 + b"\n")
    log = Log.read(run / "metrics.jsonl")
    assert log.damaged == 2
    assert log.points("train", "loss") == [(10, 4.9)]


def test_long_curves_are_drawn_as_means(tmp_path: Path):
    points = [(float(step), float(step % 2)) for step in range(1, 2001)]
    assert thinned(points[:1000]) == points[:1000]
    assert thinned(points) == [(2 * i + 1.5, 0.5) for i in range(1000)]
    drawn = chart("c", "C", "step", [Series("c", points)])
    assert drawn is not None
    assert "2,000" in drawn.note
    assert len(drawn.lines[0].places) == 1000


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.2, 0.21), (-3, 1e6), (1e-9, 5e-5), (99.99, 100.0), (-7.25, -7.24), (3, 3.5)]
)
def test_axes_have_round_numbers_within_them(low: float, high: float):
    found = ticks(low, high)
    assert 2 <= len(found) <= 12
    assert min(found) >= low - 1e-9 * abs(low)
    assert max(found) <= high + 1e-9 * abs(high)
    assert len(set(np.round(np.diff(found) / (found[1] - found[0]), 6))) == 1


def test_a_single_point_is_a_chart_too():
    assert chart("c", "C", "step", [Series("c", [(5.0, 0.0)])]) is not None
    assert chart("c", "C", "step", [Series("c", [])]) is None


def test_headline_figures_are_the_last_and_the_best(tmp_path: Path):
    story = read(write_run(tmp_path / "run"))
    found = {tile.name: (tile.value, tile.best, tile.best_at) for tile in tiles(story, None)}
    assert found == {
        "EM": (33.3, 40.0, "epoch 1"),
        "F1": (55.5, 60.0, "epoch 1"),
        "validation loss": (2.75, 2.5, "epoch 1"),
    }


# ------------------------------------------------------------------------------------------------- the page


def test_calibration_without_probabilities_is_left_out(tmp_path: Path):
    run = write_run(tmp_path / "run")
    assert calibration(reviewed(run).examples) is None
    page = written(run)
    assert "calibration" not in page.data["charts"]
    assert "nbest_predictions.json has nothing on 6 questions" in page.text


def test_a_comparison_tells_what_changed(tmp_path: Path):
    changes = {"q1": "Analytical Engine", "q2": "1815", "q3": "Ada"}
    run = write_run(tmp_path / "new", files=N_BEST, name="new")
    examples = [{**one, "context": one["context"] + " More."} if one["id"] == "q6" else one for one in EXAMPLES[:-1]]
    examples.append({**EXAMPLES[-1], "answers": EXAMPLES[-1]["answers"][:1], "context": OTHER_CONTEXT + " More."})
    predictions = {**PREDICTIONS, **changes}
    old = write_run(
        tmp_path / "old", examples, predictions, lines=LINES[:5], name="old",
        files={"nbest_predictions.json": n_best(examples, predictions, PROBABILITIES)},
    )  # fmt: skip
    page = written(run, old)
    assert "1 fixed, 1 broken, 3 with another prediction" in page.text
    assert "1 examples have the same id in both runs, but not the same text" in page.text
    other = page.data["other"]
    assert other["predicted"] == list(predictions.values())
    assert other["differs"] == [0, 0, 0, 0, 0, 1]
    assert other["right"] == [0, 1, 0, 1, 0, 0]
    assert [len(line["points"]) for line in page.data["charts"]["loss"]] == [8, 4, 2, 1]
    assert page.data["charts"]["loss"][1]["name"] == "training, other run"
    # what the other run found in another text is not marked in this one's
    assert other["found"][5] == []
    assert other["alternatives"][5][0] == [0.05, "Ten"]


def test_runs_without_a_common_example_have_no_differences(tmp_path: Path):
    figures = {"kind": "evaluation", "step": 80, "epoch": 2, "exact_match": 99.0, "f1": 99.5, "loss": 0.1}
    others = [{**one, "id": f"other-{one['id']}"} for one in EXAMPLES]
    predictions = {f"other-{key}": text for key, text in PREDICTIONS.items()}
    run = write_run(tmp_path / "new", files=N_BEST)
    for name, examples, share in (("disjoint", others, False), ("partly", [*EXAMPLES[:3], *others[3:]], True)):
        old = write_run(
            tmp_path / name, examples, {key: (PREDICTIONS | predictions)[key] for key in (e["id"] for e in examples)},
            lines=[*LINES, figures],
        )  # fmt: skip
        page = written(run, old)
        assert "other run 99.00 (on other examples)" in page.text
        assert "difference" not in page.text.partition("By group")[0].partition("Training")[0]
        assert ("No example is in both runs" in page.text) != share
        assert ("3 examples are in both runs, 3 only in this one and 3 only in the other" in page.text) == share
        assert ("other" in page.data) == share
        assert (" fixed, " in page.text) == share
    same = write_run(tmp_path / "same", lines=[*LINES, figures])
    assert "other run 99.00, difference" in " ".join(written(run, same).text.split())


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_a_run_that_was_given_no_name_is_called_by_its_directory(tmp_path: Path, name: str):
    assert read(write_run(tmp_path / "first", name=name)).name == "first"
    assert read(write_run(tmp_path / "second", name="mine")).name == "mine"


def test_a_run_that_has_no_examples_is_compared_by_its_curves(tmp_path: Path):
    run, old = write_run(tmp_path / "new"), write_run(tmp_path / "old", predictions=None)
    page = written(run, old)
    assert "The examples of the two runs cannot be compared." in page.text
    assert "other" not in page.data
    assert len(page.data["charts"]["loss"]) == 4


# -------------------------------------------------------------------------------------------- untrusted texts

NASTY = (
    "</script><img src=x onerror=alert(1)><!-- <script> {{ 7*7 }} {% raw %} &amp; \" ' ` \u2028\u2029 \ud83d \x00 ]]>"
)


def test_texts_are_never_markup(tmp_path: Path):
    whole = NASTY.replace("\ud83d", "")  # the data are checked for halves of characters; the other files are not
    context = f"Before {whole} after"
    examples = [example(f"id {whole}", f"What is {whole}?", context, whole)]
    predicted = NASTY
    rows = [{"text": NASTY, "probability": 0.5}]
    run = write_run(
        tmp_path / "run",
        examples,
        {f"id {whole}": predicted},
        name=f"run {whole}".replace("\x00", ""),
        files={
            "nbest_predictions.json": {f"id {whole}": rows},
            "status.json": {"state": "failed", "reason": NASTY, "step": 3, "launch": NASTY},
            "predictions_summary.json": {NASTY: 1},
        },
    )
    content = write_report(run, None, None, lambda text: None).read_bytes().decode()  # UTF-8 throughout
    page = Parsed(content)
    assert "img" not in dict(page.tags)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "{{ 7*7 }}" in page.text
    assert "run </script><img src=x" in page.text
    assert page.data["examples"]["heading"] == [f"What is {whole}?"]
    assert page.data["texts"] == [context]
    assert page.data["examples"]["id"] == [f"id {whole}"]
    assert page.data["examples"]["predicted"] == [predicted]
    assert page.data["examples"]["alternatives"] == [[[0.5, predicted], 0]]
    raw = re.search(r'id="data">(.*?)</script>', content, re.DOTALL)
    assert raw
    assert "<" not in raw[1]
    assert raw[1].isascii()


def test_only_the_page_s_own_script_may_run_and_nothing_is_loaded(tmp_path: Path):
    page = written(write_run(tmp_path / "run", files=N_BEST))
    (policy,) = (attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    for tag, attrs in page.tags:
        assert not {"src", "srcset", "style", "action"} & attrs.keys()
        assert not any(name.startswith("on") for name in attrs)
        assert (attrs.get("href") or "#").startswith(("#", "data:,")), (tag, attrs)


def test_paths_are_told_by_their_last_part(tmp_path: Path):
    content = write_report(write_run(tmp_path / "secret-place" / "run"), None, None, lambda text: None).read_text()
    assert "secret-place" not in content
    assert "run-dev.json" in content


# ----------------------------------------------------------------------------------------------- bad input


def test_what_is_no_run_directory_is_refused(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path / "run")
    (run / "model").mkdir()
    for path, words in (
        (tmp_path / "none", "there is no such directory"),
        (file, "is a file"),
        (tmp_path / "empty", "is not a run directory (there is no config.yaml); name"),
        (run / "model", f"did you mean {run}?"),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as error:
            write_report(path, tmp_path / "out.html", None, lambda text: None)
        assert str(path) in str(error.value)
        with pytest.raises(UserError, match=re.escape(words)):
            write_report(run, tmp_path / "out.html", path, lambda text: None)
    assert not (tmp_path / "out.html").exists()


def test_a_run_of_an_unknown_task_is_refused(tmp_path: Path):
    run = write_run(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    for name in ("knitting", "[1]", "5"):
        (run / "config.yaml").write_text(config.replace("task: question_answering", f"task: {name}"))
        with pytest.raises(UserError, match=r"config\.yaml: task: there is no task"):
            read(run)


@pytest.mark.parametrize("content", ["", "a: [", "{}", "task: question_answering\ndata: 5\nmodel: {}\nrun: {}", "\x00"])
def test_a_damaged_config_leaves_the_curves(tmp_path: Path, content: str):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(content)
    page = written(run)
    assert "config.yaml cannot be used" in page.text
    assert len(page.data["charts"]["loss"][0]["points"]) == 8
    assert "examples" not in page.data


def test_predictions_of_other_data_are_told(tmp_path: Path):
    run = write_run(
        tmp_path / "run", predictions={"z1": "x", "z2": "y"}, files={"predictions_summary.json": {"a_b": 3}}
    )
    page = written(run)
    assert "none of its 2 ids (z1, z2) is among the 6 examples" in page.text
    assert "examples" not in page.data
    assert "a b" in page.text  # what is known without the examples
    assert "loss" in page.data["charts"]


def test_some_predictions_may_be_missing_or_strange(tmp_path: Path):
    run = write_run(tmp_path / "run", predictions={"q1": "London", "q2": 5, "z": "x"})  # pyright: ignore[reportArgumentType]
    page = written(run)
    assert "5 questions have no prediction and are left out" in page.text
    assert "1 predictions are for no question of these data (z)" in page.text
    assert page.data["examples"]["id"] == ["q1"]


@pytest.mark.parametrize("name", ["predictions.json", "nbest_predictions.json", "metrics.json", "status.json"])
@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"state": [], "step": {}, "q1": []}']
)
def test_no_damaged_file_breaks_the_page(tmp_path: Path, name: str, content: bytes):
    run = write_run(tmp_path / "run", files=N_BEST)
    (run / name).write_bytes(content)
    page = written(run)
    assert "loss" in page.data["charts"]
    assert ("examples" in page.data) == (name != "predictions.json")
    if content in (b"{", b"\xff", b"[" * 100_000):
        assert f"{name} is damaged or half-written, and is left out" in page.text


def test_data_that_are_gone_leave_the_curves_and_a_hint(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (tmp_path / "run-dev.json").unlink()
    page = written(run)
    assert "there is no such file" in page.text
    assert "make the report there" in page.text
    assert "loss" in page.data["charts"]


def test_relative_data_are_looked_for_where_the_report_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_run(tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tmp_path / "run-dev.json"), "run-dev.json"))
    monkeypatch.chdir(tmp_path)
    assert read(run).review is not None
    monkeypatch.chdir("/")
    assert read(run).review is None


def test_code_that_lies_in_the_run_directory_is_not_run(tmp_path: Path):
    run = write_run(tmp_path / "run")
    model, proof = run / "model", tmp_path / "proof"
    model.mkdir()
    (model / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Tokens: ...\nclass Config: ...\n")
    auto = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokens", "evil.Tokens"]}
    (model / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokens", "auto_map": auto}))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("model:\n", "model:\n  trust_remote_code: true\n"))
    page = written(run)
    assert not proof.exists()
    assert "The examples cannot be shown" in page.text


def test_a_run_that_only_evaluates_has_no_curves_of_training(tmp_path: Path):
    line = {"kind": "evaluation", "step": 0, "exact_match": 33.3, "f1": 55.5, "loss": 2.75}
    page = written(write_run(tmp_path / "run", lines=[line], files=N_BEST))
    assert "no curves of training" in page.text
    assert "learning-rate" not in page.data["charts"]
    assert "55.50" in page.text
    assert page.data["examples"]["id"] == ["q1", "q2", "q3", "q4", "q5", "q6"]


def test_a_run_without_a_log_shows_the_figures_of_metrics_json(tmp_path: Path):
    run = write_run(tmp_path / "run", files={"metrics.json": {"exact_match": 12.5, "f1": 25.0}})
    (run / "metrics.jsonl").unlink()
    assert [(tile.name, tile.value) for tile in tiles(read(run), None)] == [("EM", 12.5), ("F1", 25.0)]


def test_the_head_says_how_the_run_is(tmp_path: Path):
    for i, (status, words) in enumerate(
        [
            ({"state": "running", "step": 1200, "host": "elsewhere", "pid": 1}, "still running at step 1,200"),
            ({"state": "running", "step": 7, "host": socket.gethostname(), "pid": 2**22 + 1}, "its process is gone"),
            ({"state": "running", "step": 7, "host": socket.gethostname(), "pid": os.getpid()}, "still running"),
            ({"state": "failed", "step": 3, "reason": "no memory"}, "failed at step 3: no memory"),
            ({"state": "completed", "step": 80}, "completed at step 80"),
            ({}, "not known"),
        ]
    ):
        assert words in read(write_run(tmp_path / f"run{i}", files={"status.json": status})).state


def test_figures_that_are_not_of_these_predictions_are_told(tmp_path: Path):
    wrong = {"metrics.json": {"exact_match": 99.0, "f1": 99.5}}
    assert (
        "metrics.json says EM 99.00, the predictions give 33.33" in written(write_run(tmp_path / "a", files=wrong)).text
    )
    right: dict[str, Any] = {"metrics.json": {"exact_match": 100 * 2 / 6}}
    assert "the predictions give" not in written(write_run(tmp_path / "b", files=right)).text


# -------------------------------------------------------------------------------------------------- the file


def test_a_report_is_replaced_and_no_other_file_is(tmp_path: Path):
    run, said = write_run(tmp_path / "run"), []
    path = write_report(run, None, None, said.append)
    assert path == run / "report.html"
    assert not any(str(path) in line for line in said), "the command prints it"
    path.write_text(path.read_text() + "<p>old</p>")
    assert write_report(run, path, None, lambda text: None).read_text().endswith("</html>")
    mine = tmp_path / "mine.html"
    mine.write_text("<html>")
    with pytest.raises(UserError, match=r"mine\.html: is there already, and is not a report of qa-dist"):
        write_report(run, mine, None, lambda text: None)
    assert mine.read_text() == "<html>"
    with pytest.raises(UserError, match="is a directory"):
        write_report(run, tmp_path, None, lambda text: None)
    with pytest.raises(UserError, match="there is no directory"):
        write_report(run, tmp_path / "no" / "r.html", None, lambda text: None)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cache", "mine.html", "run", "run-dev.json"]


def test_a_failing_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_run(tmp_path / "run")
    old = write_report(run, None, None, lambda text: None).read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_report(run, None, None, lambda text: None)
    assert (run / "report.html").read_bytes() == old
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize(
    "points",
    [[0.0, 1e-13], [1.0, 1.0000000000000002], [1e-13, 1e-13], [0.0, 5e-324], [0.0, 0.0], [-1e14, 1e14], [1e9, 1e9 + 1]],
)
def test_any_two_figures_make_a_chart(points: list[float]):
    found = chart("c", "title", "step", [Series("s", list(enumerate(points)), 0)])
    assert found is not None
    heights = [y for _, y in found.lines[0].places]
    assert all(math.isfinite(y) and 0 <= y <= HEIGHT for y in heights)


def test_paths_are_private():
    text = (
        "data.validation_file: /home/alice/secret/dev.json: there is no such file; C:\\Users\\bob\\x.json, 1/2 of a/b"
    )
    assert without_paths(text) == "data.validation_file: dev.json: there is no such file; x.json, 1/2 of a/b"
