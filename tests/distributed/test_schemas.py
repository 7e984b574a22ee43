"""Checkpoints that earlier versions wrote resume, with the losses that followed then."""

import json
from pathlib import Path

import pytest

from tests.helpers import ROOT, Launcher, jsonl

FIXTURES = ROOT / "tests/fixtures"


@pytest.mark.parametrize("schema", [1])
@pytest.mark.parametrize(("engine", "processes"), [("zero2", 2), ("ddp", 3)])
def test_a_checkpoint_of_every_schema_resumes(
    schema: int, engine: str, processes: int, launcher: Launcher, tmp_path: Path
):
    """Dropout depends on the rank, so only the world size that wrote the checkpoint gives the same losses."""
    fixture = FIXTURES / f"schema_{schema}"
    run, checkpoint = tmp_path / "run", next(fixture.glob("step_*"))
    flags = (fixture / "flags.txt").read_text().splitlines()
    launch = launcher.train(engine, processes, run, *flags, "--resume", str(checkpoint))
    assert launch.code == 0, launch.output
    assert (f"written by an earlier version of qa_dist (schema {schema})" in launch.output) == (schema == 1)
    found = {line["step"]: line["loss"] for line in jsonl(run / "metrics.jsonl") if line["kind"] == "train"}
    expected = {int(step): loss for step, loss in json.loads((fixture / "losses.json").read_text()).items()}
    assert found.keys() == expected.keys()
    if engine == "zero2":
        assert found == pytest.approx(expected, rel=1e-5)
