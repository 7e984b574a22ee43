"""Where "no answer" points: to a special token of the window, whatever a tokenizer adds to a pair of texts."""

from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from qa_dist.config import SyntheticConfig
from qa_dist.errors import UserError
from qa_dist.tasks.question_answering import synthetic
from qa_dist.tasks.question_answering.characters import span_of_whole_characters
from qa_dist.tasks.question_answering.data import Example
from qa_dist.tasks.question_answering.features import build_features
from qa_dist.tasks.question_answering.layout import PairTemplate
from tests.tokenizers import DECODERS, FAMILIES, SCRIPTS

CORPUS = synthetic.generate(SyntheticConfig(train_examples=20, long_share=0.5), "train")
UNANSWERABLE = [Example(f"none-{i}", e.question, e.context, (), ()) for i, e in enumerate(CORPUS[:8])]
TEXTS = [*synthetic.texts(CORPUS), *3 * SCRIPTS]
TOKENIZERS: dict[str, Any] = {name: build(TEXTS) for name, build in (DECODERS | FAMILIES).items()}
LEFT = {name for name, one in TOKENIZERS.items() if one.padding_side == "left"}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_answer_is_never_a_token_of_the_texts(name: str, causal: bool):
    tokenizer = TOKENIZERS[name]
    examples = [*CORPUS, *UNANSWERABLE]
    rows = build_features(examples, tokenizer, max_length=64, stride=16, causal=causal).to_pylist()
    special = set(tokenizer.all_special_ids)
    counts = np.bincount([row["example"] for row in rows])
    assert counts.max() > 1
    found, empty = set(), 0
    for row in rows:
        example, ids = examples[row["example"]], row["input_ids"]
        assert len(ids) <= 64
        assert ids[row["cls"]] in special and not row["context_begin"] <= row["cls"] < row["context_end"]
        question = tokenizer(example.question, add_special_tokens=False)["input_ids"]
        context = ids[row["context_begin"] : row["context_end"]]
        own = [token for token in ids if token not in special]
        question_first = causal or name not in LEFT
        assert own == (question + context if question_first else context + question)
        if causal:
            assert row["cls"] == len(ids) - 1 >= row["context_end"], "the last token alone sees everything"
        elif tokenizer.cls_token_id in ids:
            assert row["cls"] == ids.index(tokenizer.cls_token_id)
        if row["start_position"] == row["cls"]:
            empty += 1
            assert row["end_position"] == row["cls"]
            continue
        first, last = (row[f"{edge}_position"] - row["context_begin"] for edge in ("start", "end"))
        start, end = span_of_whole_characters(example.context, row["char_starts"][first], row["char_ends"][last])
        assert example.context[start:end] == example.answers[0]
        found.add(row["example"])
    assert found == set(range(len(CORPUS)))
    assert empty >= counts[len(CORPUS) :].sum()


@pytest.mark.parametrize("name", DECODERS)
def test_pairs_are_the_tokenizers_own_but_for_a_token_at_the_end(name: str):
    tokenizer = TOKENIZERS[name]
    own = tokenizer("Who?", "Ada.")["input_ids"]
    example = Example("x", "  Who?", "Ada.", ("Ada",), (0,))  # blanks before a question are left out
    (row,) = build_features([example], tokenizer, max_length=64, stride=0, causal=True).to_pylist()
    added = [] if own[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
    assert row["input_ids"] == own + added
    assert (added != []) == (name not in ("neox with eos", "t5", "llama with eos"))


def with_pair(pair: str | None, **special: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer with the pair that a post-processor may give, and these special tokens."""
    backend = FAMILIES["distilbert"](TEXTS).backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(["<a>", "<b>", "<c>"])
    tokens = [(token, backend.token_to_id(token)) for token in ("<a>", "<b>", "<c>")]
    if pair is None:
        backend.post_processor = processors.Sequence([])
    else:
        backend.post_processor = processors.TemplateProcessing(single="$A", pair=pair, special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", **special)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("pair", "special", "expected", "causal"),
    [  # the token of "no answer" in brackets; "+" before one that is added
        ("<a> $A <b> $B <b>", {"cls_token": "<a>"}, "[<a>] Q <b> C <b>", "<a> Q <b> C [<b>]"),
        ("<a> $A <b> $B <b>", {"bos_token": "<a>"}, "[<a>] Q <b> C <b>", "<a> Q <b> C [<b>]"),
        ("<a> $A <b> $B <b>", {"cls_token": "<c>", "bos_token": "<a>"}, "[<a>] Q <b> C <b>", "<a> Q <b> C [<b>]"),
        ("<a> $A <b> $B <b>", {}, "<a> Q <b> C [<b>]", "<a> Q <b> C [<b>]"),
        ("$A <b> $B <b> <a>", {"cls_token": "<a>"}, "Q <b> C <b> [<a>]", "Q <b> C <b> [<a>]"),
        ("$A <b> $B <a> <b>", {"cls_token": "<a>"}, "Q <b> C [<a>] <b>", "Q <b> C <a> [<b>]"),
        ("$A <a> $B", {"cls_token": "<a>", "eos_token": "<b>"}, "Q <a> C [<b>]", "Q <a> C [<b>]"),
        ("$A <b> $B", {"sep_token": "<b>"}, "Q <b> C [<b>]", "Q <b> C [<b>]"),
        ("<a> $A $B", {"bos_token": "<a>"}, "[<a>] Q C", "<a> Q C [<a>]"),
        ("<a> <b> $A $B", {"bos_token": "<b>", "eos_token": "<c>"}, "<a> [<b>] Q C", "<a> <b> Q C [<c>]"),
        ("<a> $B <b> $A <b>", {"cls_token": "<a>"}, "[<a>] C <b> Q <b>", "<a> Q <b> C [<b>]"),
        ("$A $B", {"eos_token": "<b>"}, "Q C [<b>]", "Q C [<b>]"),
        (None, {"eos_token": "<b>"}, "Q C [<b>]", "Q C [<b>]"),
        ("$A $B <c>", {}, "Q C [<c>]", "Q C [<c>]"),
    ],
)
def test_whatever_a_post_processor_gives(pair: str | None, special: dict[str, str], expected: str, causal: str):
    tokenizer: Any = with_pair(pair, **special)
    texts = {tokenizer.convert_tokens_to_ids("a"): "Q", tokenizer.convert_tokens_to_ids("e"): "C"}
    for is_causal, layout in ((False, expected), (True, causal)):
        example = Example("x", "a", "e", (), ())
        (row,) = build_features([example], tokenizer, max_length=64, stride=0, causal=is_causal).to_pylist()
        words = [texts.get(token) or tokenizer.convert_ids_to_tokens(token) for token in row["input_ids"]]
        words[row["cls"]] = f"[{words[row['cls']]}]"
        assert " ".join(words) == layout


def test_tokenizers_that_cannot_say_no_answer_are_refused():
    with pytest.raises(UserError, match="has none that can stand there"):
        PairTemplate.of(with_pair("$A $B"))
    with pytest.raises(UserError, match="does not encode pairs of texts"):
        PairTemplate.of(with_pair("$A $B $A", eos_token="<b>"))
