"""The model on its devices: Accelerate with DDP or DeepSpeed, whichever the launch config says.

Differences between the engines end here. Outside of this file there is a model that can be called, losses that
can be sent backward, an update, and collectives.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from qa_dist.config import TrainConfig
from qa_dist.errors import UserError
from qa_dist.training.launch_environment import LaunchEnvironment

Result = TypeVar("Result")


class Engine:
    """One process's part in a run.

    `start` joins the processes; `prepare` puts a model (and its optimizer) on them.
    """

    model: nn.Module
    """The wrapped model: call it as the plain one."""

    def __init__(self, launch: LaunchEnvironment):
        """Join the process group. Raises `UserError` when fewer processes found each other than were started."""
        _quieten()
        if launch.on_cpu and launch.use_deepspeed:
            # Without a backend named, Accelerate chooses none on a machine without accelerators, and every
            # process takes itself for the only one. cpu=True would switch DeepSpeed off.
            with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has built an extension
                self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
        else:
            self.accelerator = Accelerator(cpu=launch.on_cpu)
        # Under ZeRO-3 transformers would build models in shards, with collectives in every layer's constructor.
        # Models are built whole here, on the host, so that new weights are the same under every engine.
        unset_hf_deepspeed_config()
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        self._check_world(launch)

    def _check_world(self, launch: LaunchEnvironment) -> None:
        alone = self.accelerator.distributed_type == DistributedType.NO
        if self.world_size != launch.world_size or (alone and launch.world_size > 1):
            raise UserError(
                f"{launch.world_size} processes were started, but this one sees {self.world_size}: they would train "
                "apart. On a CPU use distributed_type MULTI_GPU with use_cpu, or DEEPSPEED (see configs/accelerate)"
            )

    @property
    def is_deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def _deepspeed(self) -> DeepSpeedPlugin:
        plugin = self.accelerator.deepspeed_plugin
        assert plugin is not None
        return plugin

    @property
    def description(self) -> str:
        """One line on device, engine, precision and processes, for people."""
        name = self.accelerator.distributed_type.name
        if self.is_deepspeed:
            name = f"DeepSpeed ZeRO-{self._deepspeed.zero_stage}"
        elif name.startswith("MULTI_"):
            name = "DDP"
        else:
            name = "no sharding"
        precision = {"no": "float32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{name}, {precision}, {processes} on {self.device.type}"

    # ------------------------------------------------------------------------------------------- training

    def prepare(self, model: nn.Module, settings: TrainConfig) -> None:
        """Shard `model` for training, with AdamW."""
        optimizer = torch.optim.AdamW(
            parameter_groups(model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            fused=self.device.type == "cuda",
        )
        self._max_grad_norm = settings.max_grad_norm
        if self.is_deepspeed:
            # The batches are ours: DeepSpeed only multiplies these numbers. Accumulation is controlled by the
            # boundary passed to backward(), and losses arrive scaled, so it must not divide them again.
            config = self._deepspeed.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = 1
            config["gradient_accumulation_steps"] = 1
            config["train_batch_size"] = self.world_size
            config["gradient_clipping"] = settings.max_grad_norm
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def prepare_for_evaluation(self, model: nn.Module) -> None:
        """Put `model` on the device, whole, in the precision in which training would evaluate it."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.is_deepspeed and self.accelerator.mixed_precision in dtypes:
            model = model.to(dtypes[self.accelerator.mixed_precision])  # DeepSpeed casts, the others autocast
            self.model = model.to(self.device)
        elif self.is_deepspeed:
            self.model = model.to(self.device)
        else:
            self.model = self.accelerator.prepare_model(model, evaluation_mode=True)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: gradients are exchanged only with the `last` one."""
        self.accelerator.sync_gradients = last
        if last or self.is_deepspeed:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, which is averaged over the ranks and summed over micro-batches. Under
        DeepSpeed the last micro-batch's call also updates the weights, so set the learning rate before."""
        self.accelerator.backward(loss)

    def update(self) -> float:
        """Clip, update the weights, clear the gradients. Returns the gradients' norm before clipping."""
        if self.is_deepspeed:
            wrapped = self.accelerator.deepspeed_engine_wrapped
            assert wrapped is not None
            return float(wrapped.get_global_grad_norm() or 0.0)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self._max_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm) if norm is not None else 0.0

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    # ---------------------------------------------------------------------------------------- collectives

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_rows(self, tensor: Tensor, fill: int) -> Tensor:
        """The rows of all ranks, [world_size, rows, …]. Ranks with fewer rows than others are filled up."""
        padded = self.accelerator.pad_across_processes(tensor, dim=0, pad_index=fill)
        gathered = self.accelerator.gather(padded)
        assert isinstance(gathered, Tensor)
        return gathered.view(self.world_size, -1, *tensor.shape[1:])

    def broadcast(self, value: Result) -> Result:
        """The main process's `value`, on all ranks."""
        return broadcast_object_list([value])[0] if self.world_size > 1 else value

    def require_same(self, value: str, what: str) -> None:
        """Raise `UserError` on all ranks unless all have the same `value`."""
        values = gather_object([value]) if self.world_size > 1 else [value]
        if len(set(values)) > 1:
            raise UserError(
                f"{what} differ between processes: the nodes do not see the same files, or not the same versions "
                "of the packages"
            )

    def local_main_first(self, function: Callable[[], Result]) -> Result:
        """Call `function` on one process of each node, then on the others, which find its results in the cache.

        A `UserError` on any rank is raised on all of them, so that none waits for one that has gone.
        """
        result, error = None, None
        for turn in (True, False):
            if self.accelerator.is_local_main_process == turn:
                try:
                    result = function()
                except UserError as raised:
                    error = str(raised)
            errors = gather_object([error]) if self.world_size > 1 else [error]
            if found := [message for message in errors if message]:
                raise UserError(found[0])
        return result  # pyright: ignore[reportReturnType] -- every rank had its turn

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay; biases and normalization weights, all of them vectors, do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank), so that no random state ever has to be stored."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def _quieten() -> None:
    """Keep the libraries' running commentary from burying what the user needs to see."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
