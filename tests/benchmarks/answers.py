"""`QuestionAnswerer` on a list of questions beside a plain loop, on one core.

The plain loop is what the removed pipeline did: a question at a time, each window padded to `max_length` (or, as it did
by default, not padded), one forward pass, NumPy on the whole table of starts and ends. Both are asked by turns in one
run, and their answers have to be the same. What is counted is processor time, since cores may be shared.

    python -m tests.benchmarks.answers
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from qa_dist import QuestionAnswerer
from qa_dist.config import DataConfig
from qa_dist.tasks.question_answering.splits import Split

SHARED = Path(__file__).parents[3] / "shared"
TARGET = 2.0


def plain_answer(answerer: QuestionAnswerer, question: str, context: str, padded: bool) -> tuple[str, float]:
    """The best answer and its score, as one would write it."""
    tokenizer, settings = answerer.task.tokenizer, answerer.task.config.data
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=settings.max_length,
        stride=settings.stride,
        padding="max_length" if padded else False,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    scores: dict[str, list[Any]] = {}
    for window in range(len(encoded["input_ids"])):
        names = [name for name in tokenizer.model_input_names if name in encoded]
        with torch.no_grad():
            output = answerer.reader.model(**{name: torch.tensor([encoded[name][window]]) for name in names})
        allowed = np.array([part == 1 for part in encoded.sequence_ids(window)])
        allowed[0] = True
        start, end = (_softmax(logits[0].numpy(), allowed) for logits in (output.start_logits, output.end_logits))
        start[0] = end[0] = 0.0
        table = np.tril(np.triu(np.outer(start, end)), answerer.max_answer_length - 1)
        best = np.argpartition(-table, 12, axis=None)[:12]
        encoding: Any = encoded[window]
        for place in best[np.argsort(-table.flat[best])]:
            first, last = divmod(int(place), len(start))
            if not (allowed[first] and allowed[last] and table[first, last] > 0):
                continue
            words: list[Any] = encoding.word_ids
            begin, _ = encoding.word_to_chars(words[first], 1)
            _, stop = encoding.word_to_chars(words[last], 1)
            text = context[begin:stop]
            scores.setdefault(text.lower(), [text, 0.0])[1] += table[first, last]
    text, score = max(scores.values(), key=lambda own: own[1])
    return text, min(score, 1.0)


def _softmax(logits: Any, allowed: Any) -> Any:
    values = np.where(allowed, logits, -10000.0)
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", default=str(SHARED / "models" / "minilm-l6"), help="without a head it gets a new one"
    )
    parser.add_argument("--data", default=str(SHARED / "data" / "squad_v1" / "train.json"))
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not Path(options.data).is_file():
        print(f"{options.data}: there is no such file; name one with --data", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answerer = _answerer(options.model)
    items = Split(DataConfig(train_file=(options.data,), unanswerable="allow"), "train").loaded.items
    items = items[: options.questions]
    pairs = [(item.question, item.context) for item in items]
    ways: dict[str, Callable[[], list[tuple[str, float]]]] = {
        "QuestionAnswerer": lambda: [(own["answer"], own["score"]) for own in answerer(pairs)],
        "one at a time, padded": lambda: [plain_answer(answerer, *pair, padded=True) for pair in pairs],
        "one at a time, not padded": lambda: [plain_answer(answerer, *pair, padded=False) for pair in pairs],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[tuple[str, float]]] = {}
    for _ in range(options.rounds):
        for name, ask in ways.items():
            begin = time.process_time()
            found[name] = ask()
            seconds[name].append(time.process_time() - begin)
    ours, *others = ways
    print(f"{len(pairs):,} questions, {options.rounds} rounds, one core\n")
    print("| way | questions/s | ratio | in any round | same answers | largest difference of scores |")
    print("|---|---|---|---|---|---|")
    print(f"| {ours} | {len(pairs) / statistics.median(seconds[ours]):.1f} | | | | |")
    good = True
    for name in others:
        ratios = [theirs / own for theirs, own in zip(seconds[name], seconds[ours], strict=True)]
        same = sum(a[0] == b[0] for a, b in zip(found[name], found[ours], strict=True))
        worst = max(abs(a[1] - b[1]) for a, b in zip(found[name], found[ours], strict=True) if a[0] == b[0])
        print(
            f"| {name} | {len(pairs) / statistics.median(seconds[name]):.1f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} | {same:,} | {worst:.1e} |"
        )
        good &= same >= 0.999 * len(pairs)
    return 0 if good else 1


def _answerer(model: str) -> QuestionAnswerer:
    from qa_dist.errors import UserError

    with contextlib.suppress(UserError):
        return QuestionAnswerer.from_pretrained(model, device="cpu", decoding="pipeline")
    import tempfile

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        made = transformers.AutoModelForQuestionAnswering.from_pretrained(model, dtype=torch.float32)
        made.get_submodule("qa_outputs").weight.data.normal_()  # peaked, as a trained one's
        made.save_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(model).save_pretrained(directory)
        return QuestionAnswerer.from_pretrained(directory, device="cpu", decoding="pipeline")


if __name__ == "__main__":
    sys.exit(main())
