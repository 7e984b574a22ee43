"""How many windows a process can take at once: as many as its GPU's memory holds."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from qa_dist.config import TrainConfig
from qa_dist.errors import UserError
from qa_dist.tasks.task import FeatureSet, Task
from qa_dist.training.engine import Engine, enable_gradient_checkpointing
from qa_dist.training.varlen import run_model

HEADROOM = 0.92
"""Share of the device's memory that may be planned with; the rest is for the allocator's gaps and the libraries."""


def micro_batch_size(
    settings: TrainConfig, engine: Engine, task: Task, model: nn.Module, features: FeatureSet
) -> tuple[int, list[str]]:
    """The most windows that a process takes at once, the same on all ranks, and notes for the user.

    `train.micro_batch_size`, but no more than a rank's share of a global batch. With auto, on a GPU, the share is
    halved until its longest windows fit beside what training keeps for each weight. `model` is the plain one,
    before it is spread over the processes; it may be moved to the device and back. Raises `UserError` when not even
    one window fits.
    """
    if settings.tokens_per_batch is not None:
        most = max(settings.tokens_per_batch // max(int(features.lengths.min()), 1), 1)
    else:
        most = settings.global_batch_size
    share = -(-most // engine.world_size)
    if isinstance(settings.micro_batch_size, int):
        return min(settings.micro_batch_size, share), []
    if settings.micro_batch_size is None or engine.device.type != "cuda":
        return share, []
    probe = _Probe(settings, engine, task, model, features)
    try:
        size = halved_until(share, probe.fits, engine)
    finally:
        probe.close()
    note = f"micro-batches of {size} windows: {probe.last_gib:.1f} GiB for the longest ones" if size < share else ""
    return size, [note] if note else []


def halved_until(share: int, fits: Callable[[int], bool], engine: Engine) -> int:
    """`share`, halved until it `fits` on every rank. Raises `UserError` on all ranks where not even 1 does."""
    size = share
    while engine.sum(torch.tensor(float(not fits(size)), device=engine.device)).item():
        if size == 1:
            raise UserError(
                "train.micro_batch_size: the memory of the GPU does not hold one window of the longest length. Lower "
                "data.max_length, set train.gradient_checkpointing, use bf16, ZeRO-2 or ZeRO-3 with more GPUs, or a "
                "smaller model"
            )
        size = -(-size // 2)
    return size


class _Probe:
    """Runs forward and backward of the plain model on this rank alone, so that no other one can wait for it."""

    last_gib = 0.0
    """Memory of the last attempt that fitted, in GiB, with what training keeps for the weights."""

    def __init__(self, settings: TrainConfig, engine: Engine, task: Task, model: nn.Module, features: FeatureSet):
        self.engine, self.task, self.features = engine, task, features
        self.model = model.to(engine.device).train()
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        self.longest = np.argsort(-features.lengths, kind="stable")
        self.total = torch.cuda.get_device_properties(engine.device).total_memory
        count = sum(parameter.numel() for parameter in model.parameters())
        self.states = count * engine.strategy.bytes_per_parameter(engine.world_size)

    def fits(self, size: int) -> bool:
        device = self.engine.device
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        weights = torch.cuda.memory_allocated(device)
        try:
            batch = self.engine.staged(self.features.collate(self.longest[:size])).to(device)
            with self.engine.accelerator.autocast():
                output = run_model(self.model, batch)
            self.task.loss(output, batch).sum().backward()
        except torch.OutOfMemoryError:
            return False
        finally:
            peak = torch.cuda.max_memory_allocated(device)
            self.model.zero_grad(set_to_none=True)
        needed = peak - weights + self.states
        self.last_gib = needed / 2**30
        return needed < HEADROOM * self.total

    def close(self) -> None:
        self.model.to("cpu")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.engine.device)
