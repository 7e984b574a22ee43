"""A user's mistakes: a clear message, exit code 2, no traceback, nothing overwritten."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel, GPT2Config

from qa_dist.cli import main
from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering import synthetic
from tests.helpers import TINY_BERT, jsonl
from tests.tokenizers import wordpiece_tokenizer

CONTEXT = "Ada was born in Paris."
GOOD = {
    "id": "q1",
    "question": "Where was Ada born?",
    "context": CONTEXT,
    "answers": [{"text": "Paris", "answer_start": 16}],
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT encoder without a question-answering head."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = wordpiece_tokenizer(synthetic.texts(synthetic.generate(SyntheticConfig(train_examples=20), "train")))
    values = {k: v for k, v in TINY_BERT.items() if k != "model_type"}
    BertModel(BertConfig(vocab_size=len(tokenizer), **values)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def attempt(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return int(exit_.value.code or 0), output.err


def train_flags(tmp_path: Path, model: Path, content: Any = None) -> list[object]:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([GOOD] if content is None else content))
    return [
        *("train", "--data.train_file", data, "--model.name", model, "--run.output_dir", tmp_path / "run"),
        *("--data.max_length", 64, "--data.stride", 16, "--train.epochs", 1, "--data.cache_dir", tmp_path / "cache"),
    ]


def test_bad_data_fails_before_the_first_step_and_can_be_mended(tmp_path: Path, model_dir: Path, capsys):
    bad = GOOD | {"answers": [{"text": "Rome", "answer_start": 2}]}
    flags = train_flags(tmp_path, model_dir, [bad])
    code, message = attempt(capsys, *flags)
    assert code == 2
    assert "does not point at its text" in message
    assert "'q1'" in message
    assert not (tmp_path / "run").exists(), "nothing is left behind of a start that was refused"
    code, message = attempt(capsys, *train_flags(tmp_path, model_dir))
    assert (code, message) == (0, "")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "completed"


def test_a_refused_start_leaves_no_directory_behind(
    tmp_path: Path, model_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    flags = train_flags(tmp_path, model_dir)
    place = flags.index("--run.output_dir")
    flags = [*flags[:place], *flags[place + 2 :], "--data.max_length", 4000]
    code, message = attempt(capsys, *flags)
    assert code == 2
    assert "data.max_length: 4000 is more than the" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.json"]
    # what was there before stays, and says how the attempt ended
    (tmp_path / "runs/train").mkdir(parents=True)
    (tmp_path / "runs/train/notes.txt").write_text("mine")
    assert attempt(capsys, *flags)[0] == 2
    status = json.loads((tmp_path / "runs/train/status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 0, 2)
    assert "data.max_length" in status["reason"]
    assert (tmp_path / "runs/train/notes.txt").read_text() == "mine"


def test_a_run_without_validation_data(tmp_path: Path, model_dir: Path, capsys):
    assert attempt(capsys, *train_flags(tmp_path, model_dir))[0] == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["history"][0]["train_loss"] > 0
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.name", "./nowhere"], "model.name: ./nowhere: there is no such directory"),
        (["--model.name", "nobody/nothing"], "cannot be loaded"),
        (["--model.tokenizer", "./nowhere"], "model.tokenizer: ./nowhere: there is no such directory"),
        (["--data.max_length", 400], "data.max_length: 400 is more than the 128 positions"),
        (["--data.max_length", 12, "--data.stride", 8], "1 questions leave no room for their context: 'q1'"),
        (["--data.train_file", "nowhere.json"], "there is no such file"),
        (["--data.cache_dir", "/proc/nowhere"], "prepared features cannot be stored"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, model_dir: Path, capsys, flags: list[object], expected: str):
    code, message = attempt(capsys, *train_flags(tmp_path, model_dir), *flags)
    assert code == 2
    assert expected in message


def changed(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "changed"))


def test_a_model_type_without_a_head_for_the_task(tmp_path: Path, model_dir: Path, capsys):
    model = changed(model_dir, tmp_path)
    for config, kind in ((GPT2Config(), None), ({"model_type": "vit"}, "vit")):
        content = config if isinstance(config, dict) else config.to_dict() | {"model_type": "clip"}
        (model / "config.json").write_text(json.dumps(content))
        code, message = attempt(capsys, *train_flags(tmp_path, model))
        assert code == 2
        assert "transformers has no question answering model of type" in message
        assert kind is None or kind in message


def test_a_tokenizer_that_is_not_fast(tmp_path: Path, model_dir: Path, capsys, monkeypatch):
    from transformers import AutoTokenizer

    class Slow:
        is_fast = False

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Slow())
    code, message = attempt(capsys, *train_flags(tmp_path, model_dir))
    assert code == 2
    assert "is not a fast one" in message


def test_weights_that_cannot_be_read(tmp_path: Path, model_dir: Path, capsys):
    model = changed(model_dir, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, message = attempt(capsys, *train_flags(tmp_path, model))
    assert code == 2
    assert f"the weights of {str(model)!r} cannot be loaded" in message


def test_a_tokenizer_of_another_model(tmp_path: Path, model_dir: Path, capsys):
    model = changed(model_dir, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    code, message = attempt(capsys, *train_flags(tmp_path, model))
    assert code == 2
    assert "but the model only 100 embeddings" in message


def test_evaluating_a_model_that_was_not_trained(tmp_path: Path, model_dir: Path, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([GOOD]))
    flags = ["--data.validation_file", data, "--run.output_dir", tmp_path / "e", "--data.max_length", 64]
    code, message = attempt(capsys, "evaluate", "--model", model_dir, *flags, "--data.stride", 16)
    assert code == 2
    assert "has no weights for qa_outputs.bias, qa_outputs.weight: it has not been trained" in message


def test_evaluating_with_nothing_said(capsys):
    code, message = attempt(capsys, "evaluate")
    assert code == 2
    assert "data.validation_file: is not set" in message
    assert "name a trained model (--model DIR)" in message


def test_a_diverging_run_says_so(tmp_path: Path, model_dir: Path, capsys):
    model = changed(model_dir, tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][:] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, message = attempt(capsys, *train_flags(tmp_path, model))
    assert code == 1
    assert "the loss is nan at step 1, on rank 0 for q1. The weights" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hiden_size": 16}, "bert has no setting hiden_size; did you mean hidden_size?"),
        ({"num_attention_heads": 3}, "no model can be built from it"),
        ({"hidden_size": -8}, "model.config"),
        ({"model_type": "bertt"}, "is not a valid 'bertt' config"),
        ({"max_position_embeddings": 32}, "is more than the 32 positions"),
        ({"model_type": "camembert", "max_position_embeddings": 64}, "cannot process a window of 64 tokens"),
    ],
)
def test_new_models_that_cannot_be_made(tmp_path: Path, capsys, changes: dict[str, Any], expected: str):
    flags = train_flags(tmp_path, tmp_path)
    config = json.dumps(TINY_BERT | changes)
    code, message = attempt(capsys, *flags, "--model.name", "none", "--model.config", config)
    assert code == 2
    assert expected in message


def test_nothing_but_settings_is_taken_from_a_trained_model(tmp_path: Path, capsys, model_dir: Path):
    """A model directory may come from anywhere: it must not switch on foreign code or choose where to write."""
    from qa_dist.training.export import exported_settings

    model = changed(model_dir, tmp_path)
    settings = {"model.trust_remote_code": True, "run.output_dir": "/tmp/evil", "data.stride": 7}
    (model / "qa_dist.json").write_text(json.dumps({"schema_version": 1, "settings": settings}))
    assert exported_settings(str(model)).values == {"data": {"stride": 7}}
    for content in ('{"schema_version": "1", "settings": {}}', '{"schema_version": 1, "settings": 3}', "[" * 9000):
        (model / "qa_dist.json").write_text(content)
        code, message = attempt(capsys, "evaluate", "--model", model)
        assert code == 2
        assert "cannot be read as the settings of a trained model" in message


def test_a_trained_model_of_a_newer_version(tmp_path: Path, capsys):
    (tmp_path / "qa_dist.json").write_text('{"schema_version": 99, "settings": {}}')
    code, message = attempt(capsys, "evaluate", "--model", tmp_path)
    assert code == 2
    assert "was written by a newer version" in message


# -------------------------------------------------------------------------------- qa-dist prepare


def test_prepare_fills_the_cache_and_shows_what_is_in_the_data(tmp_path: Path, model_dir: Path, capsys):
    examples = [GOOD | {"id": str(i), "context": f"{CONTEXT} {i // 2}"} for i in range(10)]
    flags = [*train_flags(tmp_path, model_dir, examples)[1:], "--data.validation_share", 0.2]
    with pytest.raises(SystemExit) as exit_:
        main(["prepare", *map(str, flags)])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "examples" in shown
    assert "8" in shown
    cached = {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(cached) == 2
    assert not (tmp_path / "run").exists()
    assert attempt(capsys, "train", *flags)[0] == 0
    assert {path.name for path in (tmp_path / "cache").iterdir()} == cached  # training found them


def test_prepare_tells_what_is_wrong(tmp_path: Path, model_dir: Path, capsys):
    code, message = attempt(capsys, "prepare", *train_flags(tmp_path, model_dir, [GOOD, GOOD])[1:])
    assert code == 2
    assert "the id is given to more than one example: 1 ('q1' by " in message


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        (None, [], "no.json: cannot be read: No such file or directory"),
        ("", [], "predictions.json: the file is empty"),
        ("{", [], ".json:1: is not valid JSON"),
        ([], [], "has to be a JSON object that gives a text for every example's id"),
        ({"q1": 3}, [], "1 ids have something else than a text (q1)"),
        ({"other": "x"}, [], "none of its 1 ids (other) is among the 1 examples (q1)"),
        ({"q1": "x"}, ["--null_odds", "no.json"], "--null_odds: belongs to SQuAD 2.0"),
        ({"q1": "x"}, ["--na_prob_thresh", "much"], "--na_prob_thresh: 'much' is not a number"),
    ],
)
def test_predictions_that_cannot_be_scored(tmp_path: Path, capsys, content: Any, flags: list[str], expected: str):
    data, predictions = tmp_path / "data.json", tmp_path / ("no.json" if content is None else "predictions.json")
    data.write_text(json.dumps([GOOD]))
    if content is not None:
        predictions.write_text(content if isinstance(content, str) else json.dumps(content))
    code, message = attempt(capsys, "score", "--predictions", predictions, "--data.validation_file", data, *flags)
    assert code == 2
    assert expected in message


def test_dropout_is_on_from_the_first_step(tmp_path: Path, model_dir: Path, capsys):
    """transformers hands out pretrained models with dropout switched off."""

    def first_loss(name: str, dropout: float) -> float:
        model = tmp_path / name
        shutil.copytree(model_dir, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": dropout}))
        flags = train_flags(tmp_path, model)
        output = tmp_path / f"{name}-run"
        assert attempt(capsys, *flags, "--run.output_dir", output, "--run.log_every", 1)[0] == 0
        return next(line["loss"] for line in jsonl(output / "metrics.jsonl") if line["kind"] == "train")

    assert first_loss("without", 0.0) != first_loss("with", 0.5)
