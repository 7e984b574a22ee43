"""The model on its devices: Accelerate with DDP or DeepSpeed, whichever the launch config says.

Differences between the engines end here. Outside of this file there is a model that can be called, losses that
can be sent backward, an update, and collectives.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
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

SUPPORTED = {
    DistributedType.NO,
    DistributedType.DEEPSPEED,
    # all of these are DDP
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_HPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
}


class Engine:
    """One process's part in a run.

    `start` joins the processes; `prepare` puts a model (and its optimizer) on them.
    """

    model: nn.Module
    """The wrapped model: call it as the plain one."""

    def __init__(self, launch: LaunchEnvironment, timeout_minutes: int):
        """Join the process group. Raises `UserError` when fewer processes found each other than were started, or
        the launch config names an engine that is not supported."""
        _quieten()
        # Without a backend named, Accelerate chooses none for DeepSpeed on a machine without accelerators, and
        # every process takes itself for the only one. cpu=True would switch DeepSpeed off.
        deepspeed_on_cpu = launch.on_cpu and launch.use_deepspeed
        group = InitProcessGroupKwargs(
            backend="gloo" if deepspeed_on_cpu else None, timeout=timedelta(minutes=timeout_minutes)
        )
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints that it has built an extension
            self.accelerator = Accelerator(cpu=launch.on_cpu and not deepspeed_on_cpu, kwargs_handlers=[group])
        # Under ZeRO-3 transformers would build models in shards, with collectives in every layer's constructor.
        # Models are built whole here, on the host, so that new weights are the same under every engine.
        unset_hf_deepspeed_config()
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        self._check_world(launch)

    def _check_world(self, launch: LaunchEnvironment) -> None:
        kind = self.accelerator.distributed_type
        if kind not in SUPPORTED:
            raise UserError(
                f"distributed_type: {kind.name} (from the launch config) is not supported; use DEEPSPEED or MULTI_GPU"
            )
        alone = kind == DistributedType.NO
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
        model.train()  # transformers hands out pretrained models with dropout switched off
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

        An error on any rank ends all of them, so that none waits for one that has gone.
        """
        is_local_main = self.accelerator.is_local_main_process
        first = self._agreeing(function if is_local_main else None)
        others = self._agreeing(None if is_local_main else function)
        return first if is_local_main else others  # pyright: ignore[reportReturnType] -- every rank had its turn

    def on_main(self, function: Callable[[], object]) -> None:
        """Call `function` on the main process, such as to write files; an error there ends all ranks."""
        self._agreeing(function if self.is_main else None)

    def _agreeing(self, function: Callable[[], Result] | None) -> Result | None:
        result, error, message = None, None, None
        if function is not None:
            try:
                result = function()
            except OSError as raised:  # a full disk, a directory that is gone
                error = UserError(f"{raised.filename or 'a file'}: {raised.strerror or raised}")
            except Exception as raised:
                error = raised
            if error is not None:
                message = str(error) if isinstance(error, UserError) else f"process {self.rank} failed: {error!r}"
        messages = gather_object([message]) if self.world_size > 1 else [message]
        if error is not None:
            raise error
        if found := [text for text in messages if text]:
            raise UserError(found[0])
        return result

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


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has ended."""
    text = str(error)
    return isinstance(error, dist.DistError) or ("gloo" in text and ("onnection" in text or "peer" in text))


def _quieten() -> None:
    """Keep the libraries' running commentary from burying what the user needs to see."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
