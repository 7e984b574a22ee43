"""Make, train, save and restore models under many strategies and world sizes.

One process imports the libraries and forks the ranks of one cell (a strategy on a number of processes) after the other:
importing takes several times longer than a cell.
"""

import hashlib
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, BertForQuestionAnswering

from qa_dist.checkpoint.state import HostCopies, full_weights, restore
from qa_dist.config import RunConfig
from qa_dist.training.engine import Engine
from qa_dist.training.extension_lock import use_kernel_locks
from qa_dist.training.initial_weights import initialize
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.strategies import DataParallel
from tests.head_first import HeadFirst
from tests.helpers import TINY_BERT

ROWS = 12
"""Of the global batch: all world sizes up to 4 divide it."""
BEFORE, AFTER = 3, 3
"""Steps up to the saved state, and from it on."""
LIMIT = 60
"""Seconds for one cell."""


class Odd(nn.Module):
    """Parameters that no world size from 2 to 4 divides, some smaller than it, and some that are frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Linear(6, 5)
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 5)])
        self.head = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(5, 2)
        for parameter in (*self.frozen.parameters(), self.layers[2].bias):
            parameter.requires_grad_(False)
        self.register_buffer("count", torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.to(self.embedding.weight.dtype))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x) * self.scale + self.frozen(x)


def batch(number: int, engine: Engine) -> Tensor:
    """Return this rank's rows of global batch `number`."""
    rows = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(number))
    return rows[engine.rank :: engine.world_size]


def losses(engine: Engine, first: int, count: int) -> list[float]:
    """Train on `count` global batches, and return their losses."""
    found = []
    for number in range(first, first + count):
        engine.set_learning_rate(1e-2 / (1 + number))
        with engine.strategy.accumulating(last=True):
            loss = engine.model(batch(number, engine)).float().square().mean()
            engine.strategy.backward(loss)
        engine.strategy.update()
        found.append(engine.sum(loss.detach().double()).item() / engine.world_size)
    return found


def state(engine: Engine) -> dict[str, Tensor]:
    """Return the whole state, put together from what each rank would write into its shard."""
    copies = HostCopies(engine.rank, engine.world_size)
    captured = {name: tensor.clone() for name, tensor in copies.capture(engine.strategy).items()}
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    shapes = {name: spec.shape for name, spec in copies.specs.items()}
    for part in engine.gather(captured):
        for key, tensor in part.items():
            name, _, start = key.partition(":")
            target = whole.setdefault(name, torch.full((math.prod(shapes[name]),), math.nan, dtype=tensor.dtype))
            target[int(start or 0) :][: tensor.numel()] = tensor.flatten()
            filled[name] = filled.get(name, 0) + tensor.numel()
    assert filled == {name: math.prod(shape) for name, shape in shapes.items()}
    return {name: tensor.view(shapes[name]) for name, tensor in whole.items()}


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def low_precision_is_of(engine: Engine, whole: dict[str, Tensor]) -> bool:
    """Whether the forward pass sees the weights of `whole`: its result is that of a plain model, also after rounding
    to the precision of the strategy's copies."""
    plain = Odd()
    plain.load_state_dict({key.partition("/")[2]: value for key, value in whole.items() if not key.startswith("exp")})
    x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        expected = (plain.bfloat16() if engine.strategy.casts_weights else plain)(x)
        is_bf16 = engine.accelerator.mixed_precision == "bf16"
        found = engine.model(x)
    return torch.allclose(found.float(), expected.float(), atol=0.05 if is_bf16 else 1e-6)


def as_kept_by(engine: Engine, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with frozen weights rounded where the strategy keeps them in low precision alone."""
    if engine.accelerator.deepspeed_plugin is None or not engine.strategy.casts_weights:
        return whole
    frozen = {f"weight/{name}" for name, parameter in Odd().named_parameters() if not parameter.requires_grad}
    return {name: value.bfloat16().float() if name in frozen else value for name, value in whole.items()}


def saved_by(engine: Engine, target: Path) -> dict[str, Any]:
    """Train from the start, write the state after `BEFORE` steps to `target`, and go on."""
    before = losses(engine, 0, BEFORE)
    whole = state(engine)
    names = {name for name, p in Odd().named_parameters() if p.requires_grad}
    assert {key.partition("/")[2] for key in whole if key.startswith("exp_avg/")} == names
    # what each rank writes is what the collective operations give
    weights = engine.broadcast(full_weights(engine.strategy, engine.is_main)) or {}
    assert all(torch.equal(weights[name], whole[f"weight/{name}"]) for name, _ in Odd().named_parameters())
    if engine.is_main:
        save_file(whole, target)
    after = losses(engine, BEFORE, AFTER)
    return {"before": before, "after": after, "end": digest(state(engine))}


def restored_by(engine: Engine, paths: list[Path]) -> dict[str, Any]:
    """Restore each state, and train from there."""
    losses(engine, 50, 1)  # an optimizer has no state before its first step
    found = {}
    for path in paths:
        whole = load_file(path)
        restore(engine.strategy, whole.__getitem__)
        engine.strategy.set_step_count(BEFORE)
        found[path.stem] = {
            "same": digest(state(engine)) == digest(as_kept_by(engine, whole)),
            "forward": low_precision_is_of(engine, whole),
            "after": losses(engine, BEFORE, AFTER),
            "end": digest(state(engine)),
        }
    return found


def initial_weights(engine: Engine, is_reordered: bool) -> dict[str, Any]:
    """Make a model whose generator is in another state on every rank, and return what the strategy makes of it."""
    torch.manual_seed(100 + engine.rank)
    shape: dict[str, Any] = TINY_BERT | {"vocab_size": 61}
    kind = HeadFirst if is_reordered else BertForQuestionAnswering
    config: Any = AutoConfig.for_model(**shape)
    model = kind(config)
    initialize(model, seed=3)
    engine.prepare(model, RunConfig())
    return {"weights": digest(full_weights(engine.strategy, engine.is_main) or {})}


def trained(engine: Engine, cell: dict[str, Any]) -> dict[str, Any]:
    engine.prepare(Odd(), RunConfig(), fused=cell["fused"])
    assert all(group["fused"] is cell["fused"] for group in engine.strategy.optimizer.param_groups)
    if cell["what"] == "restore":
        return restored_by(engine, [Path(path) for path in cell["restore"]])
    return saved_by(engine, Path(cell["save"]))


def rank_main(cell: dict[str, Any], result: Path) -> None:
    launch = LaunchEnvironment.read()
    launch.announce()
    engine = Engine(launch, timeout_minutes=1)
    found = initial_weights(engine, cell["reordered"]) if cell["what"] == "initial" else trained(engine, cell)
    assert isinstance(engine.strategy, DataParallel) == (cell["engine"] == "ddp")
    if engine.is_main:
        result.write_text(json.dumps(found))
    engine.close()


def environment(cell: dict[str, Any], rank: int, port: int) -> dict[str, str]:
    """Return what `accelerate launch` and torchrun would put into the environment of a rank."""
    engine, processes = cell["engine"], cell["processes"]
    values = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_MIXED_PRECISION": cell["precision"],
    }
    if engine == "fsdp2":
        values |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    elif engine.startswith("zero"):
        stage, offloads = engine[4], engine.endswith("offload")
        device = "cpu" if offloads else "none"
        values |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": device,
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": device if stage == "3" else "none",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }
    return values


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_cell(cell: dict[str, Any], result: Path) -> None:
    """Fork the ranks of a cell and wait for them; a rank that fails ends the others."""
    port = free_port()
    children = []
    for rank in range(cell["processes"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ |= environment(cell, rank, port)
                rank_main(cell, result)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(pid)
    deadline, failed = time.monotonic() + LIMIT, False
    while children and not failed and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.02)
            continue
        children.remove(pid)
        failed = status != 0
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if failed or children:
        print(f"failed: {cell}")
        result.write_text("null")


def import_once() -> None:
    """Import what all cells need, and load (at its first use: build) DeepSpeed's extension."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    use_kernel_locks()
    import datasets  # noqa: F401
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load()


def main() -> None:
    import_once()
    plan, directory = Path(sys.argv[1]), Path(sys.argv[2])
    for cell in json.loads(plan.read_text()):
        started = time.monotonic()
        run_cell(cell, directory / f"{cell['name']}.json")
        print(f"{cell['name']}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
