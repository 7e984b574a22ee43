"""A model that is not there is reported as that, at once, and before anything is said of its tokenizer."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qa_dist.config import ModelConfig, RunConfig
from qa_dist.errors import UserError
from qa_dist.tasks import load_task
from qa_dist.tasks.tokenizer import load_tokenizer
from tests.helpers import TINY_BERT
from tests.hub_server import online
from tests.tokenizers import gpt2_tokenizer

TASKS = ("question_answering", "token_classification")


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A Hub that closes each connection; the list has an item for each."""
    tried: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def close_all() -> None:
            while True:
                connection, _ = server.accept()
                if not tried.append(1) and connection.recv(1) == b"!":
                    return
                connection.close()

        thread = threading.Thread(target=close_all)
        thread.start()
        online(monkeypatch, f"http://127.0.0.1:{port}")
        yield tried
        socket.create_connection(("127.0.0.1", port)).sendall(b"!")
        thread.join()


def config(task: str, **model: object) -> RunConfig:
    synthetic = {"synthetic": {"train_examples": 4}} if task == "question_answering" else {"train_file": ["x.conll"]}
    return RunConfig.model_validate({"task": task, "data": synthetic, "model": model})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["out/modle", "modle"])
def test_a_hub_that_does_not_answer_is_asked_once(task: str, name: str, unreachable: list[int]):
    for key, model in (("name", {"name": name}), ("tokenizer", {"tokenizer": name, "config": TINY_BERT})):
        unreachable.clear()
        with pytest.raises(UserError) as error:
            load_task(config(task, **model))
        message = str(error.value)
        assert message.startswith(f"model.{key}: {name!r} cannot be loaded: there is no such directory here")
        assert str(Path(name).absolute()) in message and "such as google-bert/bert-base-cased" in message
        assert "cannot be reached" in message and "the tokenizer of" not in message
        assert len(unreachable) == 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./modle", "model.name: ./modle: there is no such directory"),
        ("a/b/c", "model.name: a/b/c: there is no such directory"),
        ("mo dle", "model.name: mo dle: there is no such directory, and no id on the Hub looks like this"),
        ("out/modle", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_missing_model_is_not_a_missing_tokenizer(task: str, name: str, expected: str):
    with pytest.raises(UserError) as error:
        load_task(config(task, name=name))
    assert expected in str(error.value)


def test_a_directory_without_a_model_is_told_before_its_tokenizer(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no config.json, so it is not a model directory; did you mean .*model"):
        load_tokenizer(ModelConfig(name=str(tmp_path), tokenizer="nobody/nothing"))


def test_a_tokenizer_without_a_token_for_padding_pads_with_that_of_the_end(tmp_path: Path):
    gpt2_tokenizer(["who is it"]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(tokenizer=str(tmp_path)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None
