"""What every strategy has to do alike, on real processes."""

import json
from typing import Any

import pytest

from tests.helpers import Launcher


def worker(launcher: Launcher, engine: str, processes: int, what: str) -> list[dict[str, Any]]:
    result = launcher.directory / "result.json"
    launch = launcher.run(engine, processes, "-m", "tests.distributed.strategy_worker", str(result), what)
    assert launch.code == 0, launch.output
    return json.loads(result.read_text())


@pytest.mark.parametrize("engine", ["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"])
def test_an_infinite_gradient_changes_no_weight(engine: str, launcher: Launcher):
    """One rank's gradient is infinite: all ranks hear of it, and the weights stay what they were."""
    for result in worker(launcher, engine, 2, "spoiled"):
        assert result["raised"]
        assert result["kept"]
        assert result["names"] == ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight"]
        assert result["norm"] == pytest.approx(worker_norm(), rel=1e-5)


def worker_norm() -> float:
    """The norm of the first step's gradient, averaged over two ranks, in one process."""
    import torch

    from tests.distributed.strategy_worker import Model

    model = Model()
    loss = (model(torch.full((2, 4), 1.0)).sum() + model(torch.full((2, 4), 2.0)).sum()) / 2
    loss.backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def test_the_ranks_agree_on_the_micro_batch(launcher: Launcher):
    results = worker(launcher, "ddp", 2, "micro_batch")
    assert [result["size"] for result in results] == [3, 3]
    assert [result["tried"] for result in results] == [[12, 6, 3], [12, 6, 3]]
    assert all("does not hold one window" in result["message"] for result in results)


@pytest.mark.parametrize(("engine", "processes"), [("ddp", 2), ("ddp", 4), ("zero2", 3), ("zero3", 2), ("fsdp2", 3)])
def test_no_size_of_anything_hangs(engine: str, processes: int, launcher: Launcher):
    results = worker(launcher, engine, processes, "sweep")
    assert all(result == results[0] for result in results)
    assert results[0]["evaluations"] == 3 * (2 * processes + 3)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_checkpoints_where_each_node_has_a_disk_of_its_own(engine: str, launcher: Launcher):
    results = worker(launcher, engine, 2, "disks")
    for rank, result in enumerate(results):
        assert result["kept"]
        shard = f"checkpoints/step_00000002/state-{rank:05d}-of-00002.safetensors"
        assert set(result["files"]) >= {shard, "checkpoints/step_00000002/manifest.json"}
        assert f"state-{1 - rank:05d}" not in str(result["files"])
        assert "none of them can be used" in result["refusal"]
        assert "state-00001-of-00002.safetensors is missing" in result["refusal"]
