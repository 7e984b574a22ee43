"""The vectorised decoder against the plain way: loops over windows, starts and ends."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering import decoding, synthetic
from qa_dist.tasks.question_answering.data import Examples
from qa_dist.tasks.question_answering.decoding import candidates, decode
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures, build_features
from tests.tokenizers import wordpiece_tokenizer

EXAMPLES = synthetic.generate(SyntheticConfig(train_examples=12, long_share=0.5, seed=3), "train")
TOKENIZER = wordpiece_tokenizer(synthetic.texts(EXAMPLES))


def make_features(max_length: int, stride: int) -> QuestionAnsweringFeatures:
    table = build_features(EXAMPLES, TOKENIZER, max_length=max_length, stride=stride).combine_chunks()
    padding = {"input_ids": 0, "token_type_ids": 0}
    return QuestionAnsweringFeatures(table, "key", padding, lambda: Examples(EXAMPLES))


FEATURES = make_features(72, 20)


def reduce(features: QuestionAnsweringFeatures, start: torch.Tensor, end: torch.Tensor, n_best: int):
    targets = {name: torch.from_numpy(values) for name, values in features.scalars.items()}
    spans = (targets["context_begin"], targets["context_end"], targets["cls"])
    return {name: t.numpy() for name, t in candidates(start, end, *spans, n_best=n_best).items()}


def plain(features, start: np.ndarray, end: np.ndarray, n_best: int, max_answer_length: int):
    """Per example: {(start char, end char): score} of every valid pair of top starts and ends; null scores."""
    found = [{} for _ in EXAMPLES]
    null = [np.inf for _ in EXAMPLES]
    for f in range(len(features)):
        example = features.example[f]
        begin, stop = features.scalars["context_begin"][f], features.scalars["context_end"][f]
        null[example] = min(null[example], start[f, features.scalars["cls"][f]] + end[f, features.scalars["cls"][f]])
        context = range(begin, stop)
        starts = sorted(context, key=lambda t, f=f: -start[f, t])[:n_best]
        ends = sorted(context, key=lambda t, f=f: -end[f, t])[:n_best]
        for s in starts:
            for e in ends:
                if s <= e < s + max_answer_length:
                    span = features.char_starts[f][s - begin], features.char_ends[f][e - begin]
                    score = start[f, s] + end[f, e]
                    found[example][span] = max(found[example].get(span, -np.inf), score)
    return found, null


@given(
    seed=st.integers(0, 2**31),
    n_best=st.integers(1, 25),
    max_answer_length=st.integers(1, 40),
    ties=st.booleans(),
    chunk=st.sampled_from([1, 3, 4096]),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_plain_way(seed: int, n_best: int, max_answer_length: int, ties: bool, chunk: int):
    shape = (len(FEATURES), 72)
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if ties:  # as low precision gives
        start, end = start.round(), end.round()
    outputs = reduce(FEATURES, start, end, n_best)
    expected, null = plain(FEATURES, start.numpy(), end.numpy(), n_best, max_answer_length)
    decoding.PAIRS_PER_CHUNK, before = chunk * n_best**2, decoding.PAIRS_PER_CHUNK
    try:
        answers = decode(outputs, FEATURES, len(EXAMPLES), n_best=n_best, max_answer_length=max_answer_length)
    finally:
        decoding.PAIRS_PER_CHUNK = before
    np.testing.assert_array_equal(answers.null_score, np.array(null, dtype=np.float32))
    for i in range(len(EXAMPLES)):
        own = answers.example == i
        spans = list(zip(answers.start_char[own], answers.end_char[own], strict=True))
        assert len(set(spans)) == len(spans) == min(n_best, len(expected[i]))
        scores = answers.score[own]
        assert (np.diff(scores) <= 0).all()
        best = sorted(expected[i].values(), reverse=True)[:n_best]
        np.testing.assert_array_equal(scores, np.array(best, dtype=np.float32))
        assert all(expected[i][span] == score for span, score in zip(spans, scores, strict=True))
        assert (FEATURES.example[answers.feature[own]] == i).all()


def test_windows_shorter_than_n_best_and_low_precision():
    start = torch.tensor([[1.0, 2.0, 3.0, 0.5]], dtype=torch.bfloat16)
    values = candidates(start, start, torch.tensor([1]), torch.tensor([3]), torch.tensor([0]), n_best=6)
    assert values["start_logit"].dtype == torch.float32
    assert values["start_logit"].tolist() == [[3.0, 2.0, *[-torch.inf] * 4]]
    assert values["start_index"][0, :2].tolist() == [1, 0]  # counted from the context's first token
    assert values["null_score"].tolist() == [2.0]


@pytest.mark.parametrize("max_length", [60, 300])
def test_a_confident_model_is_read_back(max_length: int):
    features = make_features(max_length, 24)
    start = torch.zeros(len(features), max_length)
    end = torch.zeros(len(features), max_length)
    rows = torch.arange(len(features))
    start[rows, torch.from_numpy(features.scalars["start_position"])] = 9.0
    end[rows, torch.from_numpy(features.scalars["end_position"])] = 9.0
    outputs = reduce(features, start, end, 20)
    answers = decode(outputs, features, len(EXAMPLES), n_best=20, max_answer_length=30)
    first = np.searchsorted(answers.example, np.arange(len(EXAMPLES)))
    texts = [e.context[answers.start_char[j] : answers.end_char[j]] for e, j in zip(EXAMPLES, first, strict=True)]
    assert texts == [e.answers[0] for e in EXAMPLES]


def test_what_is_gathered_does_not_grow_with_the_window():
    """The main process of a large evaluation holds n_best figures per window, not max_length logits."""
    sizes = set()
    for length in (64, 512):
        logits = torch.randn(3, length)
        spans = (torch.tensor([10] * 3), torch.tensor([length - 1] * 3), torch.tensor([0] * 3))
        values = candidates(logits, logits, *spans, n_best=20)
        sizes.add(sum(tensor.nbytes for tensor in values.values()))
    assert sizes == {3 * (20 * 4 * 4 + 4)}
