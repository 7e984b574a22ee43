"""The report in a real browser: it loads nothing, and what people look for in it is found, marked and kept."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qa_dist.cli import main
from qa_dist.reporting.report import write_report
from tests.helpers import tiny_flags
from tests.report_runs import (
    CONTEXT,
    EXAMPLES,
    N_BEST,
    OTHER_CONTEXT,
    PREDICTIONS,
    PROBABILITIES,
    answer,
    example,
    n_best,
    write_run,
)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
NASTY = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


class Browsed:
    """A page, with all that it has asked for and complained of."""

    def __init__(self, page: Any):
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))

    def open(self, path: Path, address: str = "") -> "Browsed":
        self.page.goto("about:blank")
        self.page.goto(path.as_uri() + address)
        return self

    @property
    def headings(self) -> list[str]:
        """The questions that are listed."""
        return self.page.locator("#table .open").all_inner_texts()

    @property
    def count(self) -> str:
        return self.page.inner_text("#count")

    @property
    def hash(self) -> str:
        return self.page.evaluate("location.hash")

    def marked(self, kind: str) -> str:
        """The text under the marks of one kind, in one piece."""
        return "".join(self.page.locator(f"mark.{kind}").all_text_contents())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browsed(browser: Any) -> Iterator[Browsed]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = Browsed(context.new_page())
    yield found
    context.close()
    assert not found.complaints
    assert all(url.startswith(("file:", "about:blank", "data:,")) for url in found.requests), found.requests
    assert len({url.partition("#")[0] for url in found.requests if url.startswith("file:")}) <= 1


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("report") / "run", files=N_BEST)
    return write_report(run, None, None, lambda text: None)


@pytest.fixture(scope="module")
def long_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 10,000 examples."""
    run = many(tmp_path_factory.mktemp("report") / "run", 10_000)
    return write_report(run, None, None, lambda text: None)


def many(run: Path, count: int) -> Path:
    """Five questions to a context of 100 to 250 words, as in SQuAD."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvwz", k=draw.randint(2, 9))) for _ in range(3000)]
    examples, predictions, best, context = [], {}, {}, ""
    for number in range(count):
        if number % 5 == 0:
            context = " ".join(draw.choices(words, k=draw.randint(100, 250)))
        parts = context.split()
        id, gold = f"q{number}", " ".join(parts[3 : 3 + draw.randint(1, 4)])
        examples.append(example(id, f"Which {' '.join(draw.choices(words, k=8))} {number}?", context, gold))
        predictions[id] = gold if draw.random() < 0.7 else parts[-1]
        rows = [answer(context, part, 0.02) for part in draw.choices(parts, k=9)]
        best[id] = [answer(context, predictions[id], round(draw.uniform(0.2, 0.8), 4)), *rows]
    return write_run(run, examples, predictions, files={"nbest_predictions.json": best})


def test_the_page_loads_nothing_and_shows_the_run(browsed: Browsed, report: Path):
    page = browsed.open(report).page
    assert page.title() == "demo – report"
    assert page.inner_text("h1") == "demo"
    assert "completed at step 80" in page.inner_text("header")
    assert page.locator("figure.chart").count() == 7
    assert browsed.count == "6 of 6 examples"
    assert browsed.headings == [one["question"] for one in EXAMPLES]
    assert browsed.hash == ""


def test_a_run_that_was_trained_here_is_shown_with_its_own_figures(browsed: Browsed, tmp_path: Path):
    """SQuAD 2.0's rules; the page's means are those that the evaluation has found."""
    flags = tiny_flags(
        **{"data.synthetic.unanswerable_share": "0.4", "data.unanswerable": "allow", "train.epochs": "1"}
    )
    with pytest.raises(SystemExit) as ended:
        main(["train", *flags, "--run.output_dir", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "cache")])
    assert ended.value.code == 0
    said: list[str] = []
    page = browsed.open(write_report(tmp_path / "run", None, None, said.append)).page
    assert not [text for text in said if text.startswith("note")]  # one says where files contradict each other
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    everything = page.locator("#groups table").first.locator("tbody tr td").all_inner_texts()
    assert everything == ["13", f"{metrics['exact_match']:.2f}", f"{metrics['f1']:.2f}"]
    assert browsed.count == "13 of 13 examples"
    present = page.locator("#confidence tr", has_text="present").locator("td").all_inner_texts()
    assert present[1:3] == everything[1:]
    assert page.locator("figure.chart").count() == 8
    page.locator("#table .open").first.click()
    probabilities = page.locator(".detail .percent").all_inner_texts()[1:]
    assert probabilities == sorted(probabilities, key=lambda text: -float(text.split()[0]))
    summary = json.loads((tmp_path / "run" / "predictions_summary.json").read_text())
    page.select_option("#show", "is:no_answer_predicted")
    assert browsed.count == f"{summary['predicted_no_answer']} of 13 examples"
    page.select_option("#show", "is:has_no_answer")
    assert browsed.count == f"{summary['examples_without_answer']} of 13 examples"


def test_every_word_of_a_search_has_to_match_whatever_its_case_and_accents(browsed: Browsed, report: Path):
    query = browsed.open(report).page.locator("#query")
    for text, found in (
        ("CAFE zurich", [4, 5]),  # in the context
        ("guests", [4, 5]),
        ("guests many", [5]),  # one in the context, the other in the question
        ("Zürich because why", [4]),
        ("q3", [2]),  # an id
        ("1815. she", [0, 1, 2, 3]),
        ("  LONDON\t\tada ", [0, 1, 2, 3]),
        ("nothing of this", []),
        ("", range(6)),
    ):
        query.fill(text)
        assert browsed.headings == [EXAMPLES[i]["question"] for i in found], text
        assert browsed.count == f"{len(found)} of 6 examples"


def test_filters_sorting_and_groups(browsed: Browsed, report: Path):
    page = browsed.open(report).page
    questions = [one["question"] for one in EXAMPLES]
    page.select_option("#show", "wrong")
    assert browsed.headings == [questions[i] for i in (1, 2, 4, 5)]
    page.select_option("#show", "right")
    assert browsed.headings == [questions[i] for i in (0, 3)]
    page.select_option("#show", "all")
    page.select_option("#sort", "probability")
    assert browsed.headings == [questions[i] for i in (5, 4, 2, 3, 1, 0)]
    page.check("#descending")
    assert browsed.headings == [questions[i] for i in (0, 1, 3, 2, 4, 5)]
    page.click("thead >> text=F1 >> nth=-1")
    assert browsed.headings == [questions[i] for i in (4, 1, 2, 5, 0, 3)]
    assert page.get_attribute("#table th[aria-sort]", "aria-sort") == "ascending"
    page.keyboard.press("Enter")  # the header has kept the focus
    assert page.get_attribute("#table th[aria-sort]", "aria-sort") == "descending"
    assert browsed.headings[-1] == questions[4]
    page.click("button.group >> text='how'")
    assert browsed.headings == [questions[5]]
    page.click("#group")
    assert browsed.count == "6 of 6 examples"


def test_an_opened_example_has_the_accepted_and_the_predicted_text_marked(browsed: Browsed, report: Path):
    page = browsed.open(report).page
    page.click("text=Where was Ada born?")
    # the two accepted answers overlap, and the prediction is one of them
    assert browsed.marked("gold") == "in London"
    assert browsed.marked("predicted") == "London"
    assert page.locator("p.context").text_content() == CONTEXT
    assert page.locator("mark[data-tag]").evaluate_all("all => all.map((one) => one.dataset.tag)") == [
        "gold",
        "predicted",
    ]
    rows = page.locator(".detail tbody tr").all_inner_texts()
    assert [row.split("\t")[:2] for row in rows] == [["London", "95.0\u00a0%"], ["Ada", "2.5\u00a0%"]]
    page.click("text=In what year was she born?")  # overlapping, neither in the other's place alone
    assert (browsed.marked("gold"), browsed.marked("predicted")) == ("1815", "1815. She wrote")
    assert page.locator(".detail").count() == 1
    page.click("text=Why did the café open?")
    assert (browsed.marked("gold"), browsed.marked("predicted")) == ("because of its view", "Zürich")
    # places behind a character that JavaScript counts as two
    page.click("text=How many guests came?")
    assert (browsed.marked("gold"), browsed.marked("predicted")) == ("Ten guests", "Ten")
    assert page.locator("p.context").text_content() == OTHER_CONTEXT
    # both are seen without colours: a line below, a line above
    gold, predicted = (
        page.locator(f"mark.{kind}").first.evaluate(f"one => getComputedStyle(one).border{side}Style")
        for kind, side in (("gold", "Bottom"), ("predicted", "Top"))
    )
    assert (gold, predicted) == ("solid", "dashed")
    page.click("text=How many guests came?")
    assert page.locator(".detail").count() == 0


def test_an_address_shows_again_what_was_shown(browsed: Browsed, report: Path):
    page = browsed.open(report).page
    page.fill("#query", "born")
    page.select_option("#show", "wrong")
    page.select_option("#sort", "f1")
    page.check("#descending")
    page.click("text=In what year was she born?")
    address = browsed.hash
    assert dict(part.split("=") for part in address[1:].split("&")) == {
        "q": "born",
        "show": "wrong",
        "sort": "f1",
        "desc": "1",
        "open": "q2",
    }
    shown = browsed.headings
    page = browsed.open(report, address).page
    assert browsed.headings == shown
    assert browsed.marked("predicted") == "1815. She wrote"
    assert page.input_value("#query") == "born"
    assert page.input_value("#show") == "wrong"
    assert page.is_checked("#descending")
    assert browsed.hash == address
    page.evaluate("location.hash = '#show=right'")
    page.wait_for_function("document.getElementById('show').value === 'right'")
    assert browsed.count == "2 of 6 examples"
    browsed.open(report, "#show=nonsense&sort=nonsense&open=nobody&page=99&group=a=b&x=%zz&q=%00")
    assert browsed.count == "0 of 6 examples"
    browsed.open(report, "#show=nonsense&sort=nonsense&open=nobody&page=99&group=a=b&__proto__=1")
    assert browsed.count == "6 of 6 examples"


def test_it_can_be_used_by_keyboard(browsed: Browsed, report: Path):
    page = browsed.open(report).page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skip to the examples
    page.keyboard.press("Tab")
    page.keyboard.type("guests many")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "open":
            break
    page.keyboard.press("Enter")
    assert browsed.marked("gold") == "Ten guests"
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "false"
    page.focus("[data-chart=loss] .plot")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-chart=loss] output").text_content() == "step 20: training 4.8"
    page.keyboard.press("End")
    assert page.locator("[data-chart=loss] output").text_content() == "step 80: training 4.2, validation 2.75"


def test_the_pointer_reads_a_curve(browsed: Browsed, report: Path):
    page = browsed.open(report).page
    plot = page.locator("[data-chart=scores] svg").first
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] * 0.95, "y": box["height"] / 2})
    assert page.inner_text("[data-chart=scores] .at") == "epoch 2"
    assert page.locator("[data-chart=scores] .legend b").all_inner_texts() == ["33.3", "55.5"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(browser: Any, report: Path, scheme: str):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{report.as_uri()}#open=q1")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    widths = page.evaluate("[...document.querySelectorAll('.opened td')].map((one) => one.offsetWidth)")
    assert widths[1] > 100  # the question's
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    context.close()


def test_a_comparison_shows_what_was_fixed_and_broken(browsed: Browsed, tmp_path: Path):
    runs = []
    for name, changes in (("new", {}), ("old", {"q1": "Ada", "q2": "1815", "q5": "view"})):
        predictions = {**PREDICTIONS, **changes}
        examples = EXAMPLES if name == "new" else EXAMPLES[:5]
        best = n_best(EXAMPLES, predictions, PROBABILITIES)
        shown = {one["id"]: predictions[one["id"]] for one in examples}
        runs.append(
            write_run(tmp_path / name, examples, shown, name=name, files={"nbest_predictions.json": best}),
        )
    page = browsed.open(write_report(runs[0], None, runs[1], lambda text: None)).page
    assert page.inner_text("h1") == "new against old"
    for show, found in (("fixed", [0]), ("broken", [1]), ("changed", [0, 1, 4]), ("alone", [5])):
        page.select_option("#show", show)
        assert browsed.headings == [EXAMPLES[i]["question"] for i in found], show
    page.select_option("#show", "changed")
    page.select_option("#sort", "change:f1")
    assert browsed.headings[0] == EXAMPLES[1]["question"]
    page.click("text=In what year was she born?")
    assert [browsed.marked(kind) for kind in ("gold", "predicted", "other")] == ["1815", "1815. She wrote", "1815"]
    page.click("text=Why did the café open?")
    assert [browsed.marked(kind) for kind in ("predicted", "other")] == ["Zürich", "view"]


def test_texts_of_others_run_nothing(browsed: Browsed, tmp_path: Path):
    context = f"Before {NASTY} after"
    examples = [example(f"id{NASTY}", f"What is {NASTY}?", context, NASTY)]
    best = {f"id{NASTY}": [answer(context, NASTY, 0.5)]}
    files = {"nbest_predictions.json": best, "status.json": {"state": "failed", "reason": NASTY}}
    run, other = (
        write_run(tmp_path / name, examples, {f"id{NASTY}": NASTY}, name=f"{name} {NASTY}", files=files)
        for name in ("run", "other")
    )
    page = browsed.open(write_report(run, None, other, lambda text: None)).page
    page.fill("#query", "onerror")
    page.click(".open")
    assert page.locator("img").count() == 0
    assert [browsed.marked(kind) for kind in ("gold", "predicted", "other")] == [NASTY] * 3
    assert page.inner_text("h1") == f"run {NASTY} against other {NASTY}"
    browsed.open(tmp_path / "run" / "report.html", browsed.hash)
    assert browsed.marked("gold") == NASTY
    # and if a script got in, it would not be run
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.ran = 1' }))"
    )
    assert page.evaluate("window.ran") is None
    assert "Content Security Policy" in browsed.complaints.pop()


@pytest.mark.slow
def test_ten_thousand_examples_are_searched_and_paged(browsed: Browsed, long_report: Path):
    page = browsed.open(long_report).page
    assert browsed.count == "10,000 of 10,000 examples"
    assert len(browsed.headings) == 50
    assert page.inner_text("#page") == "Page 1 of 200"
    page.click("#next")
    assert "page=2" in browsed.hash
    assert browsed.headings[0].endswith(" 50?")
    page.fill("#query", "q9876")
    assert browsed.count == "1 of 10,000 examples"
    page.fill("#query", "")
    page.select_option("#sort", "id")
    page.check("#descending")
    assert browsed.headings[0].endswith(" 9999?")
    browsed.open(long_report, "#open=q7777")
    assert page.inner_text("#page") == "Page 156 of 200"
    assert page.locator(".opened .open").inner_text().endswith(" 7777?")
    assert page.evaluate("document.querySelector('.opened').getBoundingClientRect().top") < 900
