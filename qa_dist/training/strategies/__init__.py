"""How a model is spread over processes: whole on each (DDP), by DeepSpeed ZeRO, or by PyTorch's FSDP2.

A strategy wraps a model, updates it, and gives and takes its state. What differs between the three ends here.
"""

from typing import TYPE_CHECKING

import torch.distributed as dist

from qa_dist.training.strategies.base import NO_CLIPPING, NonFiniteGradientError, Strategy, Update
from qa_dist.training.strategies.data_parallel import DataParallel

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["NO_CLIPPING", "DataParallel", "NonFiniteGradientError", "Strategy", "Update", "strategy_for"]


def strategy_for(accelerator: "Accelerator", use_fsdp: bool) -> Strategy:
    """The strategy that the launch config names."""
    if accelerator.deepspeed_plugin is not None:
        from qa_dist.training.strategies.deepspeed import DeepSpeed

        return DeepSpeed(accelerator)
    if use_fsdp and accelerator.num_processes > 1 and dist.is_initialized():
        from qa_dist.training.strategies.fsdp2 import FullyShardedDataParallel

        return FullyShardedDataParallel(accelerator)
    return DataParallel(accelerator)
