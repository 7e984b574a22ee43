"""Our way of preparing, decoding and scoring question answering, timed beside the plain way, on one core.

The plain way is that of the well-known tutorials: pairs encoded in batches of 1000 and padded to `max_length`,
then Python loops over windows, offsets, candidates and predictions. Both ways run in one process by turns
(A B A B …), and must find the same labels, answers and figures; if they do not, nothing is printed but where
they differ, and the exit code is 1.

    python -m tests.benchmarks.question_answering
"""

import argparse
import collections
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qa_dist.config import DataConfig, ModelConfig
from qa_dist.errors import UserError
from qa_dist.tasks.question_answering.answers import find_answers
from qa_dist.tasks.question_answering.data import Example, Examples, check_records
from qa_dist.tasks.question_answering.decoding import candidates
from qa_dist.tasks.question_answering.evaluate_metric import ExtractiveAnswerMetric
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures, build_features
from qa_dist.tasks.question_answering.reading import read_file
from qa_dist.tasks.tokenizer import load_tokenizer
from qa_dist.training.batching import evaluation_batches
from tests.benchmarks.plain_question_answering import (
    MAX_ANSWER_LENGTH,
    N_BEST,
    Columns,
    Logits,
    PlainMetric,
    plain_answers,
    plain_evaluation_batch,
    plain_features,
    plain_score,
    plain_training_batch,
)

SHARED = Path(__file__).parents[3] / "shared"
FIGURES = ("exact_match", "f1")


class DifferenceError(Exception):
    """The two ways do not find the same."""


@dataclass
class Row:
    """One comparison. Rates are in examples per CPU second."""

    what: str
    ours: float
    plain: float
    ratio: float
    """Median over the rounds of plain time by our time."""
    spread: tuple[float, float]
    """Lowest and highest ratio of any round."""
    target: float

    def __str__(self) -> str:
        met = f"≥ {self.target:g}" + ("" if self.ratio >= self.target else " **missed**") if self.target else ""
        low, high = self.spread
        figures = f"{self.ours:,.0f} | {self.plain:,.0f} | {self.ratio:.1f} | {low:.1f} to {high:.1f}"
        return f"| {self.what} | {figures} | {met} |"


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Processor time of this process: other work on a shared machine counts for little in it."""
    gc.collect()
    begin = time.process_time()
    result = run()
    seconds = time.process_time() - begin
    del result
    return seconds


def compare(
    what: str, count: int, rounds: int, target: float, ours: Callable[[], Any], plain: Callable[[], Any]
) -> Row:
    """Time both by turns. They have run once before, to be compared, so nothing is cold."""
    # What lives already, the data of both ways, is of no concern to the garbage collections of either.
    gc.collect()
    gc.freeze()
    times = [(cpu_seconds(ours), cpu_seconds(plain)) for _ in range(rounds)]
    gc.unfreeze()
    ratios = [slow / fast for fast, slow in times]
    ours_median, plain_median = (statistics.median(column) for column in zip(*times, strict=True))
    spread = (min(ratios), max(ratios))
    return Row(what, count / ours_median, count / plain_median, statistics.median(ratios), spread, target)


def same(what: str, ours: Any, plain: Any, name: Callable[[int], str]) -> None:
    """Raise `DifferenceError` unless both sequences are equal; `name` says what the item at a position is."""
    if len(ours) != len(plain):
        raise DifferenceError(f"{what}: {len(ours):,} ours, {len(plain):,} plain")
    places = [place for place, (a, b) in enumerate(zip(ours, plain, strict=True)) if a != b]
    if places:
        shown = "\n".join(f"  {name(place)}: ours {ours[place]!r}, plain {plain[place]!r}" for place in places[:5])
        raise DifferenceError(f"{what}: {len(places):,} of {len(ours):,} differ:\n{shown}")


def benchmark_features(
    examples: list[Example],
    columns: Columns,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    settings: argparse.Namespace,
) -> tuple[list[Row], QuestionAnsweringFeatures, Columns]:
    """Training and evaluation features; also returns ours, and the plain ones for evaluation."""
    own, other = tokenizers

    def ours() -> Any:
        return build_features(examples, own, max_length=settings.max_length, stride=settings.stride)

    def plain_training() -> Columns:
        return plain_features(plain_training_batch, other, columns, settings)

    def plain_evaluation() -> Columns:
        return plain_features(plain_evaluation_batch, other, columns, settings)

    def mapped(one_batch: Callable[..., Columns]) -> Any:
        def transform(batch: Columns) -> Columns:
            return one_batch(other, batch, settings)

        return lambda: source.map(
            transform, batched=True, batch_size=1000, remove_columns=source.column_names, load_from_cache_file=False
        )

    table = ours().combine_chunks()
    labels = list(zip(*(table.column(name).to_pylist() for name in ("start_position", "end_position")), strict=True))
    training = plain_training()
    owner = table.column("example").to_pylist()
    name = [f"window {i} of {columns['id'][example]}" for i, example in enumerate(owner)].__getitem__
    same("labels", labels, list(zip(training["start_positions"], training["end_positions"], strict=True)), name)
    unpadded = [
        [token for token, real in zip(ids, mask, strict=True) if real]
        for ids, mask in zip(training["input_ids"], training["attention_mask"], strict=True)
    ]
    same("token ids", table.column("input_ids").to_pylist(), unpadded, name)
    evaluation = plain_evaluation()
    offsets = [[place for place in window if place is not None] for window in evaluation["offset_mapping"]]
    starts, ends = (table.column(column).to_pylist() for column in ("char_starts", "char_ends"))
    same("offsets", [list(zip(a, b, strict=True)) for a, b in zip(starts, ends, strict=True)], offsets, name)
    del training, unpadded, offsets, starts, ends

    source = datasets.Dataset.from_dict(columns)
    count, rounds = len(examples), settings.rounds
    rows = [
        compare("training features", count, rounds, 4, ours, plain_training),
        compare("evaluation features", count, rounds, 4, ours, plain_evaluation),
    ]
    if settings.map:
        rows += [
            compare("training features, plain in `Dataset.map`", count, rounds, 0, ours, mapped(plain_training_batch)),
            compare(
                "evaluation features, plain in `Dataset.map`", count, rounds, 0, ours, mapped(plain_evaluation_batch)
            ),
        ]
    padding = {"input_ids": int(own.pad_token_id or 0), "token_type_ids": own.pad_token_type_id}  # pyright: ignore
    return rows, QuestionAnsweringFeatures(table, "", padding, lambda: Examples(examples)), evaluation


def random_logits(features: QuestionAnsweringFeatures, width: int, seed: int, peaked: bool) -> tuple[Logits, Logits]:
    """Start and end logits as of a model that knows where the context is, [num_features, width].

    `peaked`: with three places in each window around which starts and ends are likely, as trained models have; then
    more of the best starts and ends make a pair. Otherwise noise alone.
    For every other example it is sure that there is no answer. Elsewhere the classification token scores too low
    to be among the best: the plain way counts it there, and ours, which looks at the context alone, does not.
    """
    generator = np.random.default_rng(seed)
    places = np.arange(width)
    begin, end = features.scalars["context_begin"], features.scalars["context_end"]
    context = (places >= begin[:, None]) & (places < end[:, None])
    peaks = generator.integers(begin[:, None], end[:, None], (len(features), 3))
    result = []
    for _ in ("start", "end"):
        logits = generator.normal(0, 2, (len(features), width)).astype(np.float32)
        for peak in peaks.T if peaked else ():
            logits += 8 * np.exp(-np.abs(places - peak[:, None]) / 6, dtype=np.float32)
        logits[~context] = -40
        sure = features.example % 2 == 0
        logits[sure, features.scalars["cls"][sure]] = 60
        result.append(logits)
    return result[0], result[1]


def benchmark_decoding(
    examples: list[Example],
    columns: Columns,
    features: QuestionAnsweringFeatures,
    plain: Columns,
    peaked: bool,
    settings: argparse.Namespace,
) -> list[Row]:
    starts, ends = random_logits(features, settings.max_length, settings.seed, peaked)
    # our evaluation meets the logits in batches, each as wide as its longest window
    batches = []
    for index in evaluation_batches(features.lengths, 32):
        width = -(-int(features.lengths[index].max()) // 8) * 8
        logits = [torch.from_numpy(np.ascontiguousarray(values[index, :width])) for values in (starts, ends)]
        spans = [torch.from_numpy(features.scalars[name][index]) for name in ("context_begin", "context_end", "cls")]
        batches.append((*logits, *spans))
    order = np.concatenate(evaluation_batches(features.lengths, 32))

    def ours() -> Any:
        parts = [candidates(*batch, n_best=N_BEST) for batch in batches]
        outputs = {}
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts]).numpy()
            outputs[name] = np.empty_like(values)
            outputs[name][order] = values
        sizes = {"n_best": N_BEST, "max_answer_length": MAX_ANSWER_LENGTH}
        texts = find_answers(outputs, features, **sizes, threshold=0.0)
        for _ in texts.n_best.items():  # as writing them does; they need not be there before
            pass
        return texts

    examples_data, features_data = datasets.Dataset.from_dict(columns), datasets.Dataset.from_dict(plain)
    examples_rows, features_rows = _rows(columns), _rows(plain)

    def over_data() -> Any:
        return plain_answers(examples_data, features_data, starts, ends)

    def over_rows() -> Any:
        return plain_answers(examples_rows, features_rows, starts, ends)

    ids = columns["id"]
    predictions = ours().predictions
    for plain_n_best, plain_predictions in (over_data(), over_rows()):
        expected = [plain_predictions[i] for i in ids]
        for place, example_id in enumerate(ids):  # answers of exactly the same score may come in either order
            tied = _tied(plain_n_best[example_id])
            if expected[place] in tied and predictions[example_id] in tied:
                expected[place] = predictions[example_id]
        same("answers", [predictions[i] for i in ids], expected, ids.__getitem__)
        del plain_n_best, plain_predictions
    count, rounds = len(examples), settings.rounds
    what = "decoding, peaked logits" if peaked else "decoding, noise as logits"
    return [
        compare(what, count, rounds, 10, ours, over_data),
        compare(f"{what}, plain from lists", count, rounds, 0, ours, over_rows),
    ]


def _rows(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _tied(answers: list[dict[str, Any]]) -> set[str]:
    """The texts of those that score as high as the best that is not empty."""
    answers = [answer for answer in answers if answer["text"]]
    return {answer["text"] for answer in answers if answer["score"] == answers[0]["score"]}


def imagined_predictions(examples: list[Example], seed: int) -> list[str]:
    """What a middling model answers: right, right but for a word, wrong, or nothing."""
    draw = random.Random(seed)
    result = []
    for example in examples:
        words = example.context.split()
        at = draw.randrange(len(words))
        somewhere = " ".join(words[at : at + draw.randint(1, 8)])
        answer = draw.choice(example.answers) if example.answers else ""
        result.append(draw.choice((answer, answer, f"{answer} {words[at]}", somewhere, "")))
    return result


def benchmark_scoring(examples: list[Example], settings: argparse.Namespace) -> list[Row]:
    predictions = imagined_predictions(examples, settings.seed)
    references = [list(example.answers) for example in examples]
    plain_predictions = [
        {"id": example.id, "prediction_text": text, "no_answer_probability": 0.0}
        for example, text in zip(examples, predictions, strict=True)
    ]
    plain_references = [
        {"id": example.id, "answers": {"text": list(example.answers), "answer_start": list(example.answer_starts)}}
        for example in examples
    ]

    def ours() -> Any:
        metric = ExtractiveAnswerMetric("squad_v2", keep_in_memory=True)
        return metric.compute(predictions=predictions, references=references)

    def wrapped() -> Any:
        return PlainMetric(keep_in_memory=True).compute(predictions=plain_predictions, references=plain_references)

    def bare() -> Any:
        return plain_score(predictions, references)

    found = ours()
    for plain in (wrapped(), bare()):
        same("figures", [found[name] for name in FIGURES], [plain[name] for name in FIGURES], FIGURES.__getitem__)
    count, rounds = len(examples), settings.rounds
    return [
        compare("scoring", count, rounds, 2, ours, wrapped),
        compare("scoring, plain without `evaluate`", count, rounds, 0, ours, bare),
    ]


def on_one_core() -> None:
    """One CPU for everything, one thread each: what is compared is work, not parallelism."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    datasets.disable_progress_bars()


def read(files: Sequence[Path]) -> list[Example]:
    config = DataConfig(unanswerable="allow")
    examples = [e for file in files for e in check_records(read_file(file, {}), config, str(file), True).items]
    counts = collections.Counter(example.id for example in examples)
    twice = [example_id for example_id, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"{len(twice):,} ids are in more than one of the files, such as {twice[0]!r}")
    return examples


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    squad = SHARED / "data" / "squad_v2"
    parser.add_argument("--data", type=Path, nargs="+", default=[squad / "train.json", squad / "dev.json"])
    parser.add_argument("--tokenizer", default=str(SHARED / "models" / "minilm-l6"), help="directory or Hub id")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is measured")
    parser.add_argument("--seed", type=int, default=0, help="of the logits and of the predictions")
    parser.add_argument("--map", action="store_true", help="also run the plain features in `Dataset.map`")
    return parser.parse_args()


def main() -> int:
    settings = arguments()
    on_one_core()
    try:
        examples = read(settings.data)
        tokenizers = tuple(load_tokenizer(ModelConfig(tokenizer=settings.tokenizer)) for _ in range(2))
    except UserError as error:
        print(f"{error}\nPoint --data and --tokenizer at files that are there.", file=sys.stderr)
        return 2
    if tokenizers[0].padding_side != "right":
        print("the plain way is written for tokenizers that pad on the right", file=sys.stderr)
        return 2
    columns: Columns = {
        "id": [example.id for example in examples],
        "question": [example.question for example in examples],
        "context": [example.context for example in examples],
        "answers": [{"text": list(e.answers), "answer_start": list(e.answer_starts)} for e in examples],
    }
    try:
        rows, features, plain = benchmark_features(examples, columns, (tokenizers[0], tokenizers[1]), settings)
        for peaked in (False, True):
            rows += benchmark_decoding(examples, columns, features, plain, peaked, settings)
        rows += benchmark_scoring(examples, settings)
    except DifferenceError as error:
        print(f"The two ways do not find the same. {error}", file=sys.stderr)
        return 1
    contexts = len(set(columns["context"]))
    print(f"{len(examples):,} examples, {contexts:,} contexts, {len(features):,} windows; {settings.rounds} rounds.\n")
    print("| what | ours, examples/s | plain, examples/s | ratio | in any round | target |")
    print("|---|---|---|---|---|---|")
    print("\n".join(map(str, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
