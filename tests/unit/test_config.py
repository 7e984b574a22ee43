import json
from pathlib import Path

import pytest
import yaml

from qa_dist.cli import main
from qa_dist.config import RunConfig
from qa_dist.config_sources import ConfigError, from_flags, from_yaml, leaves, reference, resolve, to_yaml
from tests.helpers import ROOT


def flags(*args: str):
    return from_flags(args, "qa-dist train", "", {"config": "YAML file"})[0]


def messages(error: ConfigError) -> str:
    return "\n".join(problem.message for problem in error.problems)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["config", "show", "--config", str(path)])
    assert exit_.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["run"]["name"] == path.stem
    assert RunConfig.model_validate(shown)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_launch_config_is_one_for_accelerate(path: Path):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes >= 1


def test_shown_config_gives_the_same_config_again(tmp_path: Path):
    config = resolve([flags("--data.synthetic.seed", "3", "--model.config", '{"model_type": "bert", "eps": 1e-12}')])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert resolve([from_yaml(tmp_path / "c.yaml")]) == config


def test_flags_win_over_the_file(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("train: {epochs: 5, seed: 7}\n")
    config = resolve([from_yaml(tmp_path / "c.yaml"), flags("--train.epochs", "9", "--model", "some/model")])
    assert (config.train.epochs, config.train.seed, config.model.name) == (9, 7, "some/model")


def test_yaml_merges(tmp_path: Path):
    (tmp_path / "d.yaml").write_text("data:\n  <<: {max_length: 99, stride: 7}\n  stride: 8\n")
    assert resolve([from_yaml(tmp_path / "d.yaml")]).data.model_dump(include={"max_length", "stride"}) == {
        "max_length": 99,
        "stride": 8,
    }


def test_none_on_the_command_line_unsets(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("train: {micro_batch_size: 4}\n")
    assert (
        resolve([from_yaml(tmp_path / "c.yaml"), flags("--train.micro_batch_size", "none")]).train == RunConfig().train
    )


def test_numbers_in_exponent_form_are_numbers(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(
        "train: {learning_rate: 3e-5}\nmodel: {config: {model_type: bert, eps: 1e-12, n: 12}}\n"
    )
    config = resolve([from_yaml(tmp_path / "c.yaml")])
    assert config.train.learning_rate == 3e-5
    assert config.model.config == {"model_type": "bert", "eps": 1e-12, "n": 12}


def test_all_problems_are_reported_at_once_with_place_value_and_remedy(tmp_path: Path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(
        "data:\n  max_length: many\n  strid: 3\n  train_file: nowhere.json\ntrain:\n  epochs: 0\n  epochs: 2\n"
        "model:\n  config: {hidden_size: 4}\n  name: x\n"
    )
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config", str(path), "--train.sead", "1", "--train.learning_rate", "fast", "stray"])
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    for part in (
        f"{path}:2: data.max_length: 'many' is not valid",
        f"{path}:3: data.strid: there is no such setting; did you mean data.stride?",
        "data.train_file: nowhere.json: there is no such file",
        f"{path}:7: train.epochs is set twice",
        "--train.sead: there is no such setting; did you mean train.seed?",
        "--train.learning_rate on the command line: train.learning_rate: 'fast' is not valid",
        "it takes FLOAT",
        "model.config: has no model_type",
        "model.config: describes a new model, model.name a pretrained one",
        "'stray': unexpected",
    ):
        assert part in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- a\n- b\n", "a config is a mapping of sections"),
        ("data: [1, 2\n", "is not YAML"),
        ("data: 3\n", "data: 3 is not a section"),
        ("data: {synthetic: {seed: -1}}\n", "data.synthetic.seed: -1 is not valid"),
        ("train: {epochs: 1.5}\n", "train.epochs: 1.5 is not valid"),
        ("run: {export: worst}\n", "it takes last|best"),
        ("train.epochs: 3\n", "write `train:` and below it, indented, `epochs:`"),
        ("? [a, b]\n: 3\n", "is not a key"),
        ("run: {name: 2024-13-45}\n", "holds a value that cannot be read"),
        ("data: &d {max_length: *d}\n", "cannot be read"),
        ("train: {seed: 99999999999999999999999}\n", "train.seed: 99999999999999999999999 is not valid"),
        ("model: {config: {model_type: bert, x: !!binary aGk=}}\n", "model.config"),
    ],
)
def test_what_can_be_wrong_in_a_file(tmp_path: Path, content: str, expected: str):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        resolve([from_yaml(tmp_path / "c.yaml")])
    assert expected in messages(error.value)
    assert str(tmp_path / "c.yaml") in messages(error.value)


def test_missing_config_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such config file"):
        resolve([from_yaml(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--data.stride", "400"], "data.stride: 400 is not smaller than data.max_length"),
        (["--data.synthetic.seed", "1", "--data.train_file", "pyproject.toml"], "generates both splits"),
        (["--data.synthetic.unanswerable_share", "0.5"], "set data.unanswerable to allow"),
        (["--train.micro_batch_size", "64"], "is more than train.global_batch_size"),
        (["--run.output_dir", "pyproject.toml"], "is a file; name a directory"),
        ([], "data.train_file: is not set"),
        ([], "model.name: is not set"),
    ],
)
def test_impossible_combinations_are_refused_before_anything_starts(
    args: list[str], expected: str, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        main(["train", *args])
    assert exit_.value.code == 2
    assert expected in capsys.readouterr().err


def test_fp16_on_a_cpu_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config", str(ROOT / "configs/demo.yaml")])
    assert exit_.value.code == 2
    assert "fp16 (from the launch config) does not exist on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "local_rank", "waits"), [(0, 0, []), (1, 1, [10]), (2, 0, [])])
def test_one_process_of_each_node_speaks_first(rank: int, local_rank: int, waits: list[int], capsys, monkeypatch):
    """The others wait until they have been ended, or their error has turned out to be theirs alone."""
    waited: list[int] = []
    monkeypatch.setattr("qa_dist.cli.time.sleep", waited.append)
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as exit_:
        main(["train"])
    assert exit_.value.code == 2
    assert waited == waits
    message = capsys.readouterr().err
    assert "model.name: is not set" in message
    assert (f"rank {rank}]" in message) == bool(waits)


def test_config_show_checks_combinations(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["config", "show", "--data.stride", "999"])
    assert exit_.value.code == 2
    assert "data.stride: 999 is not smaller" in capsys.readouterr().err


def test_unknown_command_and_help(capsys):
    for args, code in ((["trian"], 2), ([], 2), (["--help"], 0), (["config"], 2)):
        with pytest.raises(SystemExit) as exit_:
            main(args)
        assert exit_.value.code == code
        output = capsys.readouterr()
        assert "usage: qa-dist COMMAND" in output.out + output.err


def test_every_setting_says_what_it_is():
    described = {key: field.description for key, field in leaves()}
    assert all(described.values()), [key for key, text in described.items() if not text]
    assert json.dumps(RunConfig().model_dump(mode="json"))


def test_the_readme_has_the_reference():
    assert reference() in (ROOT / "README.md").read_text(encoding="utf-8")
