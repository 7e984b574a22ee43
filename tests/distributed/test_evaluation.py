"""Evaluation counts each feature once and gives the same figures on any number of processes."""

import json
from pathlib import Path

import pytest

from tests.distributed import evaluation_worker
from tests.helpers import Launcher, tiny_flags


@pytest.mark.parametrize(("engine", "processes"), [("ddp", 1), ("ddp", 2), ("zero2", 4)])
def test_each_feature_counts_once_for_every_size(engine: str, processes: int, launcher: Launcher, tmp_path: Path):
    launch = launcher.run(engine, processes, "-m", evaluation_worker.__name__, str(tmp_path / "result.json"))
    assert launch.code == 0, launch.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"world_size": processes, "checked": 3 * processes * evaluation_worker.BATCH_SIZE + 1}


def test_figures_do_not_depend_on_the_number_of_processes(launcher: Launcher, tmp_path: Path):
    trained = tmp_path / "trained"
    launch = launcher.train("zero2", 2, trained, *tiny_flags(**{"data.synthetic.validation_examples": "41"}))
    assert launch.code == 0, launch.output
    expected = json.loads((trained / "metrics.json").read_text())
    for engine, processes in (("ddp", 1), ("ddp", 4), ("zero3", 2)):
        output_dir = tmp_path / f"{engine}-{processes}"
        data = tiny_flags(**{"data.synthetic.validation_examples": "41"})[:6]
        flags = ["--model", str(trained / "model"), *data, "--run.output_dir", str(output_dir)]
        launch = launcher.run(engine, processes, "-m", "qa_dist", "evaluate", *flags)
        assert launch.code == 0, launch.output
        figures = json.loads((output_dir / "metrics.json").read_text())
        assert figures == {name: expected[name] for name in ("exact_match", "f1", "loss")}
        for name in ("predictions.json", "nbest_predictions.json"):
            assert (output_dir / name).read_bytes() == (trained / name).read_bytes()
