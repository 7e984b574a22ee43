"""Names of runs without one, and what the package's own names are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qa_dist.cli import main
from qa_dist.config_sources import Source, from_flags, resolve
from qa_dist.reporting.run_name import default_name
from tests.helpers import ROOT, environment


def named(command: str, *args: str, config: str | None = None) -> str:
    flags, _ = from_flags(args, "qa-dist", "", {})
    return resolve([default_name(command, config, [flags])]).run.name or ""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two run directories with models, and two files of data of the same name."""
    for name in ("runs/first", "runs/second"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model/config.json").write_text("{}")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_named_after_their_directory_or_config_file(place: Path):
    assert named("train") == "train"
    assert named("train", config="configs/large.yaml") == "large"
    assert named("train", "--run.output_dir", "runs/first", config="configs/large.yaml") == "first"
    assert named("evaluate", "--run.output_dir", "runs/on-dev/") == "on-dev"
    assert named("train", "--run.output_dir", ".") == place.name
    assert named("config show") == "train"


def test_evaluations_are_named_after_model_and_data(place: Path):
    def of(model: str, *files: str, command: str = "evaluate", more: tuple[str, ...] = ()) -> str:
        data = ("--data.validation_file", *files) if files else ()
        return named(command, "--model", model, *data, *more, config="large.yaml")

    first = of("runs/first", "a/dev.json")
    assert re.fullmatch(r"evaluate-first-dev-[0-9a-f]{8}", first)
    same = [
        of("runs/first/model", "a/dev.json"),
        of(str(place / "runs/first"), str(place / "a/dev.json")),
        of("runs/../runs/first", "./a/dev.json", more=("--data.train_file", "x.json", "--evaluation.batch_size", "64")),
        of("runs/first", "a/dev.json", more=("--run.timeout_minutes", "5", "--data.cache_dir", "elsewhere")),
    ]
    assert set(same) == {first}
    others = [
        of("runs/second", "a/dev.json"),
        of("runs/first", "b/dev.json"),
        of("runs/first", "a/dev.json", "b/dev.json"),
        of("runs/first", "a/dev.json", command="predict"),
        of("runs/first", "a/dev.json", more=("--evaluation.max_answer_length", "9")),
        of("runs/first", "a/dev.json", more=("--data.max_validation_samples", "9")),
        of("user/first", "a/dev.json"),
        of("other/first", "a/dev.json"),
        of("runs/first", more=("--data.dataset", "user/set")),
        of("runs/first", more=("--data.dataset", "other/set")),
        of("runs/first", more=("--data.synthetic.seed", "1")),
    ]
    assert len({first, *others}) == 1 + len(others)
    for odd in ("/tmp/ü ü/$(x)\n'\"", "x" * 300, "..", "模型"):
        name = of(odd, f"{odd}.json.gz", "*.json")
        assert re.fullmatch(r"evaluate-[A-Za-z0-9._-]+-[0-9a-f]{8}", name) and len(name) < 110, name


def test_an_evaluation_of_the_same_is_refused_with_what_to_do_and_of_other_data_is_not(place: Path, capsys):
    """Before the model is looked at, which is none here."""
    output = place / "runs" / named("evaluate", "--model", "runs/first", "--data.validation_file", "a/dev.json")
    output.mkdir()
    (output / "predictions.json").write_text("{}")
    (output / "status.json").write_text('{"state": "completed", "step": 0}')

    def refusal(data: str) -> str:
        with pytest.raises(SystemExit):
            main(["evaluate", "--model", "runs/first", "--data.validation_file", data])
        return capsys.readouterr().err

    found = refusal("a/dev.json")
    assert f"runs/{output.name} holds the results of this model on these data (completed), and nothing is" in found
    assert "set --run.output_dir to another directory, or move that one away" in found
    assert "--resume" not in found
    assert "nothing is overwritten" not in refusal("b/dev.json")


def test_settings_that_are_wrong_still_have_a_name():
    wrong = Source()
    wrong.put("data.max_length", "many", "here")
    assert default_name("evaluate", None, [wrong]).values == {"run": {"name": "evaluate"}}


def test_the_package_lists_its_classes_without_loading_torch():
    program = "import sys, qa_dist; print('torch' in sys.modules, *sorted(set(dir(qa_dist)) & set(qa_dist.__all__)))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment(), check=True
    )
    assert found.stdout.split() == ["False", "QuestionAnswerer", "TokenClassifier"]
