"""`QuestionAnswerer`: the evaluated answers, those of the removed pipeline, in batches, from threads, and errors."""

import io
import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    XLNetConfig,
    XLNetForQuestionAnsweringSimple,
)

from qa_dist import QuestionAnswerer
from qa_dist.config import SyntheticConfig
from qa_dist.errors import InputError, UserError
from qa_dist.inference.lines import Asking, answer_lines
from qa_dist.tasks.question_answering import synthetic
from tests.helpers import SIZES
from tests.pipeline_reference import pipeline_answers
from tests.tokenizers import roberta_tokenizer, wordpiece_tokenizer, xlnet_tokenizer

EXAMPLES = synthetic.generate(SyntheticConfig(train_examples=24, long_share=0.5, seed=5), "train")
PAIRS = [(example.question, example.context) for example in EXAMPLES]
TEXTS = [*synthetic.texts(EXAMPLES), "naïve café Ångström 東京は日本の首都です \U0001f469\u200d\U0001f4bb"]
WINDOWS = {"max_length": 96, "stride": 24}


def save(
    directory: Path, config: Any, tokenizer: Any, *, settings: dict[str, Any] | None = None, **findings: float
) -> Path:
    """A model with new weights whose logits are far from equal."""
    torch.manual_seed(7)
    model = AutoModelForQuestionAnswering.from_config(config)
    for parameter in model.get_submodule("qa_outputs").parameters():
        parameter.data.normal_(std=1.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    carried = {"task": "question_answering", "data.max_length": 96, "data.stride": 24} | (settings or {})
    content = {"schema_version": 1, "settings": carried, "findings": findings, "step": 3}
    (directory / "qa_dist.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    bert, roberta = wordpiece_tokenizer(TEXTS), roberta_tokenizer(TEXTS)
    bert_config = AutoConfig.for_model("bert", vocab_size=len(bert), **SIZES)
    v2 = {"data.unanswerable": "allow", "evaluation.max_answer_length": 8}
    return {
        "bert": save(root / "bert", bert_config, bert, settings={"evaluation.max_answer_length": 12}),
        "roberta": save(
            root / "roberta",
            AutoConfig.for_model(
                "roberta", vocab_size=len(roberta), pad_token_id=1, bos_token_id=0, eos_token_id=2, **SIZES
            ),
            roberta,
        ),
        "always": save(root / "always", bert_config, bert, settings=v2, no_answer_threshold=1e4),
        "never": save(root / "never", bert_config, bert, settings=v2, no_answer_threshold=-1e4),
    }


@pytest.fixture(scope="module")
def bert(models: dict[str, Path]) -> QuestionAnswerer:
    return QuestionAnswerer.from_pretrained(str(models["bert"]), device="cpu")


@pytest.fixture(scope="module")
def pipeline(models: dict[str, Path]) -> QuestionAnswerer:
    return QuestionAnswerer.from_pretrained(str(models["bert"]), device="cpu", decoding="pipeline")


def places(answers: list[dict[str, Any]]) -> list[Any]:
    return [(answer["answer"], answer["start"], answer["end"]) for answer in answers]


def is_part_of_a_word(context: str, start: int, end: int) -> bool:
    return any(context[max(place - 1, 0) : place + 1].isalnum() and 0 < place < len(context) for place in (start, end))


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize("words", [False, True])
def test_answers_and_scores_are_those_of_the_removed_pipeline(models, family: str, impossible: bool, words: bool):
    answerer = QuestionAnswerer.from_pretrained(
        str(models[family]),
        device="cpu",
        decoding="pipeline",
        align_to_words=words,
        max_answer_length=12,
        batch_size=5,
    )
    pairs = [
        *PAIRS,
        ("Wo?", "Im café der naïve Ångström, 東京は日本の首都です, \U0001f469\u200d\U0001f4bb und so."),
        ("q", "One."),
    ]
    found = answerer(pairs, top_k=4, handle_impossible_answer=impossible)
    several = cut = 0
    for (question, context), own in zip(pairs, found, strict=True):
        expected = pipeline_answers(
            answerer.reader.model, answerer.task.tokenizer, question, context,
            top_k=4, max_answer_length=12, align_to_words=words, handle_impossible_answer=impossible, **WINDOWS,
        )  # fmt: skip
        several += len(own[0]["windows"]) > 1
        if words and any(is_part_of_a_word(context, answer["start"], answer["end"]) for answer in expected):
            cut += 1  # by a window's edge: the pipeline gave such halves of words
            continue
        if context.isascii():  # beyond, what readers see as one character is not cut
            assert places(own) == places(expected)
        assert [a["score"] for a in own] == pytest.approx([min(a["score"], 1) for a in expected], abs=2e-6)
    assert several > 5 and cut < 6


@pytest.mark.parametrize("decoding", ["evaluated", "pipeline"])
def test_fields(bert: QuestionAnswerer, pipeline: QuestionAnswerer, decoding: str):
    question, context = max(PAIRS, key=lambda pair: len(pair[1]))
    answerer = bert if decoding == "evaluated" else pipeline
    answer = answerer(question, context)
    assert set(answer) == {"score", "start", "end", "answer", "no_answer_probability", "windows"}
    assert answer["answer"] == context[answer["start"] : answer["end"]] != ""
    assert 0 < answer["score"] <= 1 and 0 <= answer["no_answer_probability"] <= 1
    windows = answer["windows"]
    assert len(windows) > 1 and windows[0][0] == 0 and windows[-1][1] == len(context)
    assert all(before[1] > after[0] for before, after in itertools.pairwise(windows)), "they overlap"
    several = answerer(question, context, top_k=3)
    assert several[0] == answer and len(several) == 3
    found = [answer["answer"] for answer in answerer(question, "Yes", top_k=5)]
    assert sorted(found) == (["Y", "Yes", "es"] if decoding == "evaluated" else ["Yes"]), "there are not always so many"
    assert len(answerer(question, context, top_k=1000)) >= 20


@pytest.mark.parametrize("decoding", ["evaluated", "pipeline"])
def test_batches_change_nothing(models, decoding: Any):
    bert = QuestionAnswerer.from_pretrained(str(models["bert"]), device="cpu", decoding=decoding)
    one_by_one = [bert(question, context) for question, context in PAIRS]
    together = bert([question for question, _ in PAIRS], [context for _, context in PAIRS])
    mappings = bert([{"question": question, "context": context} for question, context in PAIRS])
    for alone, answer, again in zip(one_by_one, together, mappings, strict=True):
        assert places([alone]) == places([answer]) == places([again])
        assert alone["score"] == pytest.approx(answer["score"], abs=1e-6)
    context = PAIRS[0][1]
    same_context = bert([question for question, _ in PAIRS[:3]], context)
    assert same_context == bert([(question, context) for question, _ in PAIRS[:3]])
    assert bert([]) == [] and list(bert(iter([]))) == []
    one = bert(*PAIRS[0])
    assert bert(PAIRS[0]) == bert({"question": PAIRS[0][0], "context": PAIRS[0][1], "id": 3}) == one
    columns = {"question": [question for question, _ in PAIRS[:2]], "context": [context for _, context in PAIRS[:2]]}
    assert bert(columns) == bert(PAIRS[:2])


def test_a_stream_is_read_as_it_is_needed(bert: QuestionAnswerer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qa_dist.inference.reader.TEXTS_PER_CHUNK", 4)
    taken = 0

    def endless():
        nonlocal taken
        for pair in itertools.cycle(PAIRS):
            taken += 1
            yield pair

    answers = list(itertools.islice(bert(endless()), 6))
    assert taken == 8
    assert places(answers) == places(bert(PAIRS[:6]))


def test_a_stream_that_breaks_off_is_answered_up_to_there(bert: QuestionAnswerer):
    def broken():
        yield from PAIRS[:3]
        raise OSError("the disk is gone")

    answers = []
    with pytest.raises(OSError, match="the disk is gone"):
        answers.extend(bert(broken()))
        for answer in bert(broken()):
            answers.append(answer)
    assert places(answers) == places(bert(PAIRS[:3]))


def test_threads_may_ask_at_once(bert: QuestionAnswerer):
    expected = bert(PAIRS, top_k=2)
    found: dict[int, Any] = {}

    def ask(thread: int) -> None:
        found[thread] = bert(PAIRS[thread % 3 :], top_k=2)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for thread, answers in found.items():
        assert [places(own) for own in answers] == [places(own) for own in expected[thread % 3 :]]


def test_the_stored_threshold_decides_whether_there_is_an_answer(models):
    always = QuestionAnswerer.from_pretrained(str(models["always"]), device="cpu")
    never = QuestionAnswerer.from_pretrained(str(models["never"]), device="cpu")
    assert (always.no_answer_threshold, always.max_answer_length) == (1e4, 8)
    assert all(answer["answer"] for answer in always(PAIRS))
    for answer in never(PAIRS):
        assert (answer["answer"], answer["start"], answer["end"]) == ("", 0, 0)
        assert answer["score"] == answer["no_answer_probability"]
    assert all(answer["answer"] for answer in never(PAIRS, handle_impossible_answer=False))
    for own in always(PAIRS, top_k=3):
        assert own[0]["answer"] and sum(not answer["answer"] for answer in own) <= 1
    own = QuestionAnswerer.from_pretrained(str(models["never"]), device="cpu", no_answer_threshold=1e4)
    assert all(answer["answer"] for answer in own(PAIRS))


def test_the_threshold_is_compared_as_evaluation_does(models, tmp_path: Path):
    """The same questions get no answer as `Task.score` gives none."""
    answerer = QuestionAnswerer.from_pretrained(str(models["always"]), device="cpu")
    task, windows = answerer.task, answerer.task.windows(EXAMPLES)
    batch = windows.collate(np.arange(len(windows)))
    with torch.no_grad():
        outputs = task.outputs(answerer.reader.model(**batch.inputs), batch)
    odds = task.score({name: tensor.numpy() for name, tensor in outputs.items()}, windows).files["null_odds.json"]
    middle = sorted(odds.values())[len(odds) // 2] - 1e-4
    answerer.no_answer_threshold = middle
    none = [example.id for example, answer in zip(EXAMPLES, answerer(PAIRS), strict=True) if not answer["answer"]]
    assert none == [name for name, value in odds.items() if value > middle]
    assert 5 < len(none) < len(EXAMPLES) - 5


def test_models_that_read_the_context_first(tmp_path: Path):
    tokenizer = xlnet_tokenizer(TEXTS)
    config = XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=2, d_inner=64, pad_token_id=5)
    torch.manual_seed(7)
    model = XLNetForQuestionAnsweringSimple(config)
    model.qa_outputs.weight.data.normal_(std=1.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answerer = QuestionAnswerer.from_pretrained(str(tmp_path), device="cpu")
    assert tokenizer.padding_side == "left"
    together = answerer(PAIRS, top_k=2)
    for (question, context), own in zip(PAIRS, together, strict=True):
        alone = answerer(question, context, top_k=2)
        assert places(alone) == places(own)
        assert all(context[a["start"] : a["end"]] == a["answer"] != "" for a in own)


@pytest.mark.parametrize(("decoding", "longest"), [("evaluated", 30), ("pipeline", 15)])
def test_models_of_others_get_the_settings_of_evaluation_or_of_the_pipeline(
    models, tmp_path: Path, decoding: Any, longest: int
):
    shutil.copytree(models["bert"], tmp_path / "foreign")
    (tmp_path / "foreign" / "qa_dist.json").unlink()
    answerer = QuestionAnswerer.from_pretrained(str(tmp_path / "foreign"), device="cpu", decoding=decoding)
    data, found = answerer.task.config.data, answerer.max_answer_length
    assert (data.max_length, data.stride, found) == (130, 65, longest), "130 is what the model can take"
    assert answerer.no_answer_threshold is None
    assert answerer(*PAIRS[0])["answer"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision(models, bert: QuestionAnswerer, dtype: Any):
    half = QuestionAnswerer.from_pretrained(str(models["bert"]), device="cpu", dtype=dtype)
    assert next(half.reader.model.parameters()).dtype in (torch.bfloat16, torch.float16)
    same = [a["answer"] == b["answer"] for a, b in zip(half(PAIRS), bert(PAIRS), strict=True)]
    assert sum(same) > len(PAIRS) / 2, "near logits may change places"


@pytest.mark.slow
def test_compiled(models, bert: QuestionAnswerer):
    compiled = QuestionAnswerer.from_pretrained(str(models["bert"]), device="cpu", compile=True)
    assert places(compiled(PAIRS[:1])) == places(bert(PAIRS[:1]))


def test_a_run_directory_will_do(models, tmp_path: Path):
    shutil.copytree(models["bert"], tmp_path / "run" / "model")
    assert QuestionAnswerer.from_pretrained(str(tmp_path / "run"), device="cpu")(*PAIRS[0])["answer"]


@pytest.mark.parametrize("context", ["\u200b\u200b", "\x00\x01"])
def test_contexts_without_any_token_have_no_answer(
    bert: QuestionAnswerer, pipeline: QuestionAnswerer, models, context: str
):
    v2 = QuestionAnswerer.from_pretrained(str(models["always"]), device="cpu")
    for answerer in (bert, pipeline, v2):
        for impossible in (None, True, False):
            answers = answerer([("Who?", context), PAIRS[0]], handle_impossible_answer=impossible)
            assert (answers[0]["answer"], answers[0]["windows"]) == ("", [])
            assert answerer("Who?", context, top_k=2, handle_impossible_answer=impossible) == [answers[0]]
            assert answers[0]["score"] == answers[0]["no_answer_probability"] == pytest.approx(1)
        assert answerer(*PAIRS[0], handle_impossible_answer=False)["answer"]


def test_half_a_million_characters(bert: QuestionAnswerer):
    context = "word " * 100_000 + "Ada was born in London."
    answer = bert("Where was Ada born?", context)
    assert len(answer["windows"]) > 1000 and answer["windows"][-1][1] == len(context)


def test_the_time_limit(bert: QuestionAnswerer):
    with pytest.raises(TimeoutError, match="the time is up"):
        bert("Where?", "word " * 20_000, timeout=0.01)
    assert bert(*PAIRS[0], timeout=60)["answer"]


@pytest.mark.parametrize(
    ("question", "context", "message"),
    [
        ("", "text", "the question is empty"),
        ("  \n", "text", "the question holds nothing but blanks"),
        ("Who?", "", "the context is empty"),
        ("Who?", " \t\n ", "the context holds nothing but blanks"),
        ("Who?", None, "to one question belongs one context"),
        ("Who?", "half \ud800", "surrogate"),
        ("Who? " * 100, "text", r"the question has \d+ tokens, and may have \d+"),
        (["a", "b"], ["text"], "2 questions and 1 contexts"),
        ([("a", "b"), ("a",)], None, "question 2: is neither a pair"),
        ([{"question": "a"}], None, "question 1: is neither a pair"),
        ({"question": "a"}, None, "a mapping without question and context"),
        (5, None, "is neither a text nor several of them, but int"),
        (None, "text", "is neither a text nor several of them, but NoneType"),
        (["Who?", "Where?"], None, "of columns, pass the questions and the contexts"),
        ([("a", "text"), (3, "text")], None, "the question is not a text .question 3"),
    ],
)
def test_what_cannot_be_asked(bert: QuestionAnswerer, question: Any, context: Any, message: str):
    with pytest.raises(InputError, match=message) as caught:
        bert(question, context)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_question_that_is_too_long_is_an_error_for_itself_alone(bert: QuestionAnswerer, top_k: int):
    context = PAIRS[0][1]
    asked = [("Who? " * 100, "text"), *PAIRS[:3], ("Why? " * 60, context), PAIRS[3], ("When? " * 100, context)]
    found = bert(asked, top_k=top_k)
    for place in (0, 4, 6):
        tokens = len(bert.task.tokenizer(asked[place][0], add_special_tokens=False)["input_ids"])
        assert isinstance(found[place], InputError)
        assert f"the question has {tokens} tokens, and may have" in str(found[place])
        assert asked[place][0][:40] in str(found[place])
    assert [one for one in found if not isinstance(one, InputError)] == bert(PAIRS[:4], top_k=top_k)
    assert [str(one) for one in bert(iter(asked), top_k=top_k)] == [str(one) for one in found]
    alone = bert([asked[0]], top_k=top_k)
    assert [type(one) for one in alone] == [InputError], "a list, though of one question"


def test_a_line_with_a_question_that_is_too_long_is_an_error_for_itself_alone(models):
    lines = [{"question": question, "context": context, "id": i} for i, (question, context) in enumerate(PAIRS[:3])]
    lines.insert(1, {"question": "Who? " * 100, "context": "text", "id": "long"})
    shown: list[str] = []
    said: list[str] = []
    asked: list[int] = []
    answerer = QuestionAnswerer.from_pretrained(str(models["bert"]), device="cpu")

    def ask(values: list[dict[str, Any]]) -> list[Any]:
        asked.append(len(values))
        return answerer([(value["question"], value["context"]) for value in values])

    asking = Asking(lambda _: None, ask, frozenset({"question", "context"}), "a JSON object")
    file = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
    assert answer_lines(file, "lines", asking, shown.append, said.append) == 2
    results = [json.loads(line) for line in shown]
    assert [result["id"] for result in results] == [0, "long", 1, 2]
    assert [result.get("answer") for result in results if result["id"] != "long"] == [
        answer["answer"] for answer in answerer(PAIRS[:3])
    ]
    assert results[1]["line"] == 2 and "the question has 300 tokens" in results[1]["error"]
    assert sum(asked) == 4, "no line is answered twice"


def test_wrong_arguments(models, bert: QuestionAnswerer):
    for wrong_k in (0, 1.5, "3", True, 10**10):
        with pytest.raises(InputError, match=f"top_k: {wrong_k!r} is not a whole number"):
            bert(*PAIRS[0], top_k=wrong_k)  # pyright: ignore[reportArgumentType]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_answer_length": 0}, "max_answer_length: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 1.5}, "batch_size: 1.5"),
        ({"no_answer_threshold": float("nan")}, "no_answer_threshold: nan"),
        ({"decoding": "best"}, "decoding: 'best' is not one of evaluated, pipeline"),
        ({"decoding": "pipeline", "no_answer_threshold": 0.0}, "no_answer_threshold: decoding pipeline"),
        ({"align_to_words": True}, "align_to_words: is for decoding pipeline"),
        ({"align_to_words": False}, "align_to_words: is for decoding pipeline"),
        ({"device": "meta"}, "device: 'meta' cannot be used"),
        ({"dtype": "int4"}, "dtype: 'int4' is none of float32"),
        ({"device": "cuda:9"}, "device: 'cuda:9' cannot be used"),
        ({"device": "tpuish"}, "device: 'tpuish' cannot be used"),
    ]
    for settings, message in wrong:
        with pytest.raises(UserError, match=message):
            QuestionAnswerer.from_pretrained(str(models["bert"]), **settings)


def test_models_that_cannot_be_used(models, tmp_path: Path):
    def broken(name: str) -> Path:
        return shutil.copytree(models["bert"], tmp_path / name)

    headless = broken("headless")
    AutoModel.from_pretrained(headless).save_pretrained(headless)
    truncated = broken("truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    not_numbers = broken("nan")
    model = AutoModelForQuestionAnswering.from_pretrained(not_numbers)
    model.get_submodule("qa_outputs").weight.data.fill_(torch.nan)
    model.save_pretrained(not_numbers)
    speechless = broken("speechless")
    (speechless / "tokenizer.json").unlink()
    other = broken("other")
    (other / "qa_dist.json").write_text(json.dumps({"schema_version": 1, "settings": {"task": "summing_up"}}))
    for path, message in (
        (headless, "has no weights for qa_outputs"),
        (truncated, "the weights of .* cannot be loaded"),
        (other, "summing.up"),
        (speechless, "speechless holds no tokenizer .tokenizer.json, vocab.txt"),
        (tmp_path / "nowhere", "no such directory"),
        (Path("user/there-is-no-such-model"), "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=message):
            QuestionAnswerer.from_pretrained(str(path), device="cpu")
    for decoding in ("evaluated", "pipeline"):
        with pytest.raises(UserError, match="logits are not numbers"):
            QuestionAnswerer.from_pretrained(str(not_numbers), device="cpu", decoding=decoding)(*PAIRS[0])
