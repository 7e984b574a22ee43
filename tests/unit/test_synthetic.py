import hashlib
import subprocess
import sys

from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering.synthetic import generate, texts
from tests.helpers import TINY_BERT, environment

CONFIG = SyntheticConfig(train_examples=400, validation_examples=200, unanswerable_share=0.3)


def test_answers_stand_where_they_should_and_have_distractors():
    examples = generate(CONFIG, "train")
    assert len(examples) == len({e.id for e in examples}) == 400
    for example in examples:
        for text, start in zip(example.answers, example.answer_starts, strict=True):
            assert example.context[start : start + len(text)] == text
            assert example.context.count(text) == 1
            assert text not in example.question
    share = sum(not e.answers for e in examples) / len(examples)
    assert 0.2 < share < 0.4
    assert all(e.answers for e in generate(SyntheticConfig(train_examples=100), "train"))


def test_held_out_contexts_are_not_trained_on():
    held_out = {e.context for e in generate(CONFIG, "validation")}
    assert held_out.isdisjoint(e.context for e in generate(CONFIG, "train"))


def test_some_contexts_are_long_and_questions_vary():
    examples = generate(CONFIG, "train")
    long = [e for e in examples if len(e.context.split()) > 160]
    assert 0.03 < len(long) / len(examples) < 0.25
    assert len({e.question.split()[0] for e in examples}) >= 5


def test_corpus_and_tokenizer_are_the_same_in_every_process():
    """A tokenizer that differed between ranks would train them on different inputs."""
    program = f"""
import hashlib
from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering.synthetic import generate, texts
from qa_dist.tasks.tokenizer import train_tokenizer
corpus = texts(generate(SyntheticConfig(train_examples=400), "train"))
tokenizer = train_tokenizer(corpus, 1000, {TINY_BERT!r})
print(hashlib.sha256("".join(corpus).encode() + tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment() | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, parallel in (("1", "false"), ("2", "true"))
    }
    assert len(digests) == 1
    corpus = "".join(texts(generate(SyntheticConfig(train_examples=400), "train")))
    assert len(hashlib.sha256(corpus.encode()).hexdigest()) == len(digests.pop().strip())
