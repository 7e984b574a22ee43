"""The processes of a run, and the model on their devices, as Accelerate's launch config says.

Outside of this file and `strategies` there is a model that can be called, losses that can be sent backward, an
update, and collectives.
"""

import contextlib
import errno
import io
import logging
import math
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage] -- documented
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from qa_dist.checkpoint.manifest import Launch
from qa_dist.config import RunConfig
from qa_dist.errors import NotPushedError, TrainingError, UserError
from qa_dist.tasks.task import Batch
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.strategies import NO_CLIPPING, DataParallel, Strategy, strategy_for
from qa_dist.training.varlen import obstacle, packed, run_model, switch_on
from qa_dist.training.watchdog import Watchdog

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


COMPILED_MULTIPLE = 64
"""Lengths are padded to multiples of this where the model is compiled for each shape: six shapes up to 384 tokens."""
COMPILED_SHAPES = 64
"""Most shapes that a model is compiled for; beyond them PyTorch would go on uncompiled, without a word."""


PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EAGAIN}
"""Errors of files that are no mistake of the user's: a disk of the network that was away."""


class Engine:
    """One process's part in a run.

    Making one joins the processes; `prepare` puts a model (and its optimizer) on them.
    """

    strategy: Strategy
    """How the model is spread over the processes."""
    model: nn.Module
    """The wrapped model; `forward` calls it."""
    first_position: int | None = None
    """Of the model, where its windows are laid end to end without padding."""
    multiple = 8
    """Lengths of batches are padded to multiples of this: tensor cores work in tiles of 8."""

    def __init__(self, launch: LaunchEnvironment, timeout_minutes: float, watchdog: Watchdog | None = None):
        """Join the process group. Raises `UserError` when fewer processes found each other than were started, or
        the launch config names an engine that is not supported. `watchdog`: one that is watching already."""
        _quieten()
        if launch.use_deepspeed:  # which compiles an extension
            from qa_dist.training.extension_lock import use_kernel_locks

            use_kernel_locks()
        self.watchdog = watchdog or Watchdog(launch.rank, launch.world_size, math.inf, math.inf)
        self.watchdog.joining()
        # Without a backend named, Accelerate chooses none for DeepSpeed on a machine without accelerators, and
        # every process takes itself for the only one. cpu=True would switch DeepSpeed off.
        deepspeed_on_cpu = launch.on_cpu and launch.use_deepspeed
        # The watchdog is to be the first to speak.
        timeout = timedelta(minutes=timeout_minutes + 2)
        group = InitProcessGroupKwargs(backend="gloo" if deepspeed_on_cpu else None, timeout=timeout)
        # Told of FSDP, Accelerate would use its own on GPUs, and on CPUs let every process train apart.
        os.environ.pop("ACCELERATE_USE_FSDP", None)
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
        self.is_local_main: bool = self.accelerator.is_local_main_process
        # For threads that talk while the training thread does: over connections of their own.
        self._background = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None
        self.store = self._shared_store()
        if self.store is not None:
            self.watchdog.talk_through(self.store)
        self.watchdog.phase("the start")
        self.strategy = strategy_for(self.accelerator, launch.use_fsdp)

    def _shared_store(self) -> Store | None:
        """A store that all processes reach, at any time and from any thread; None for one process."""
        if self.world_size == 1:
            return None
        host = os.environ["MASTER_ADDR"]
        timeout = timedelta(seconds=60)
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if self.is_main else None
        # Over gloo: the first collective on GPUs is where a wrong network interface shows, and that is to be watched.
        port: list[Any] = [store.port if store else 0]
        dist.broadcast_object_list(port, group=self._background)  # pyright: ignore[reportArgumentType]
        return store or TCPStore(host, port[0], is_master=False, timeout=timeout)

    def _check_world(self, launch: LaunchEnvironment) -> None:
        kind = self.accelerator.distributed_type
        if kind not in SUPPORTED:
            raise UserError(
                f"distributed_type: {kind.name} (from the launch config) is not supported; use MULTI_GPU, DEEPSPEED "
                "or FSDP"
            )
        alone = kind == DistributedType.NO
        if self.world_size != launch.world_size or (alone and launch.world_size > 1):
            raise UserError(
                f"{launch.world_size} processes were started, but this one sees {self.world_size}: they would train "
                "apart. On a CPU use distributed_type MULTI_GPU with use_cpu, or DEEPSPEED (see configs/accelerate)"
            )

    @property
    def description(self) -> str:
        """One line on strategy, precision, processes and device, for people."""
        return str(self.launch)

    @property
    def launch(self) -> Launch:
        """Strategy, precision, processes and device of this run."""
        precision = {"no": "float32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)
        return Launch(
            strategy=self.strategy.name, precision=precision, world_size=self.world_size, device=self.device.type
        )

    # ------------------------------------------------------------------------------------------- the model

    def use_packed_attention(self, model: nn.Module) -> list[str]:
        """Have `model` compute attention without padding, where it can. Returns notes for the user."""
        why_not = obstacle(model, self.device, self.accelerator.mixed_precision)
        if why_not:
            return [f"model.attention: varlen is not used: {why_not}"]
        self.first_position = switch_on(model)
        dropout = getattr(model.config, "attention_probs_dropout_prob", getattr(model.config, "attention_dropout", 0))
        return ["model.attention: varlen leaves out the dropout of attention weights"] if dropout else []

    @property
    def prefers_fused(self) -> bool:
        """Whether a new run updates its weights with PyTorch's fused AdamW: several times faster, and with other
        rounding. Not in float16: given an overflow, the fused one skips its step without reporting it."""
        return self.device.type in ("cpu", "cuda") and not self.is_half

    def prepare(self, model: nn.Module, config: RunConfig, fused: bool | None = None) -> None:
        """Spread `model` over the processes for training, with AdamW. `fused`: whether the run that is resumed has used
        PyTorch's fused implementation, which then goes on if it works here; None for a new run."""
        settings = config.train
        set_tf32(settings.tf32)
        model.train()  # transformers hands out pretrained models with dropout switched off
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if settings.compile:
            self.multiple = COMPILED_MULTIPLE
            # once for each length, in training and in evaluation, and for the short last batches
            torch._dynamo.config.recompile_limit = COMPILED_SHAPES  # pyright: ignore[reportAttributeAccessIssue]
            model.compile(dynamic=False)  # in place, so that names of weights stay

        def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.AdamW(
                parameter_groups(model, settings.weight_decay),
                lr=settings.learning_rate,
                betas=(settings.adam_beta1, settings.adam_beta2),
                eps=settings.adam_epsilon,
                fused=self.prefers_fused and fused is not False,
            )

        self.strategy.max_grad_norm = settings.max_grad_norm or NO_CLIPPING
        self.strategy.prepare(model, make_optimizer)
        self.model = self.strategy.model

    def prepare_for_evaluation(self, model: nn.Module, config: RunConfig) -> None:
        """Put `model` on the device, whole, in the precision in which training would evaluate it."""
        set_tf32(config.train.tf32)
        if self.strategy.casts_weights:
            low = torch.float16 if self.accelerator.mixed_precision == "fp16" else torch.bfloat16
            self.model = model.to(self.device, low)
        elif isinstance(self.strategy, DataParallel):
            self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        else:
            self.model = model.to(self.device)

    def forward(self, batch: Batch) -> tuple[Any, Batch]:
        """The model's output for a batch from the host, and the batch on the device."""
        moved = batch.to(self.device)
        return run_model(self.model, moved), moved

    def staged(self, batch: Batch) -> Batch:
        """`batch`, on the host, in the form that `forward` takes."""
        if self.first_position is not None:
            batch = packed(batch, self.first_position)
        return batch.pinned() if self.device.type == "cuda" else batch

    @property
    def cost_of_micro_batch(self) -> int | None:
        """What one micro-batch more costs, in tokens of computation; None where it is not worth thinking of. On a CPU
        small ones are nearly as efficient as large ones, on a GPU they leave it idle."""
        if self.device.type != "cpu" or self.is_compiled:
            return None
        return 128 if self.strategy.exchanges_every_micro_batch else 64

    @property
    def is_compiled(self) -> bool:
        return self.multiple == COMPILED_MULTIPLE

    @property
    def is_half(self) -> bool:
        """Whether gradients are float16, so that an overflow is a matter of the loss scale."""
        return self.accelerator.mixed_precision == "fp16"

    def set_learning_rate(self, value: float) -> None:
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = value

    # ---------------------------------------------------------------------------------------- collectives

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def max(self, value: float) -> float:
        """The largest `value` of all ranks."""
        tensor = torch.tensor(value, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def gather(self, value: Result) -> list[Result]:
        """Every rank's `value`, by rank, on all of them."""
        return gather_object([value]) if self.world_size > 1 else [value]

    def exchange(self, value: Result) -> list[Result]:
        """`gather`, from a thread beside the training thread; one such thread per process, the same on all ranks."""
        if self._background is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._background)
        return values

    def gather_rows(self, tensor: Tensor, fill: int, widen: int | None = None) -> Tensor:
        """The rows of all ranks, [world_size, rows, …]. Ranks with fewer rows than others are filled up, and with
        `widen` also those with shorter rows, with that value."""
        if widen is not None:
            wide = self.accelerator.pad_across_processes(tensor, dim=1, pad_index=widen)
            assert isinstance(wide, Tensor)
            tensor = wide
        padded = self.accelerator.pad_across_processes(tensor, dim=0, pad_index=fill)
        gathered = self.accelerator.gather(padded)
        assert isinstance(gathered, Tensor)
        return gathered.view(self.world_size, -1, *tensor.shape[1:])

    def broadcast(self, value: Result) -> Result:
        """The main process's `value`, on all ranks."""
        return broadcast_object_list([value])[0] if self.world_size > 1 else value

    def require_same(self, value: str, what: str) -> None:
        """Raise `UserError` on all ranks unless all have the same `value`."""
        values = self.gather(value)
        if len(set(values)) > 1:
            raise UserError(
                f"{what} differ between processes: the nodes do not see the same files, or not the same versions "
                "of the packages, or were started in different ways"
            )

    def local_main_first(self, function: Callable[[], Result]) -> Result:
        """Call `function` on one process of each node, then on the others, which find its results in the cache.

        An error on any rank ends all of them, so that none waits for one that has gone.
        """
        first = self._agreeing(function if self.is_local_main else None)
        others = self._agreeing(None if self.is_local_main else function)
        return first if self.is_local_main else others  # pyright: ignore[reportReturnType] -- every rank had its turn

    def on_main(self, function: Callable[[], object]) -> None:
        """Call `function` on the main process, such as to write files; an error there ends all ranks."""
        self.on_ranks(function if self.is_main else None)

    def on_ranks(self, function: Callable[[], object] | None) -> None:
        """Call `function` on the processes that have one; an error there ends all ranks."""
        self._agreeing(function)

    def _agreeing(self, function: Callable[[], Result] | None) -> Result | None:
        result, error, message = None, None, None
        if function is not None:
            try:
                result = function()
            except OSError as raised:  # a full disk, a directory that is gone; or a disk that may be back tomorrow
                kind = TrainingError if raised.errno in PASSING else UserError
                error = kind(f"{raised.filename or 'a file'}: {raised.strerror or raised}")
            except Exception as raised:
                error = raised
            if error is not None:
                told = isinstance(error, UserError)
                code = error.exit_code if told else TrainingError.exit_code
                message = (str(error) if told else f"process {self.rank} failed: {error!r}", code)
        messages = self.gather(message)
        if error is not None:
            raise error
        for text, code in filter(None, messages):
            raise next(kind for kind in (UserError, TrainingError, NotPushedError) if kind.exit_code == code)(text)
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


def set_tf32(allowed: bool) -> None:
    """Whether GPUs that can may multiply float32 matrices with 10 bits of mantissa (NVIDIA's TensorFloat-32)."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep only each layer's input for the backward pass, and compute the rest again. Raises `UserError` for a model
    that cannot."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UserError(f"train.gradient_checkpointing: models of type {kind!r} cannot; leave it off")
    enable: Any = model.activation_checkpointing_enable
    enable({"use_reentrant": False})


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank), so that no random state ever has to be stored."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has ended."""
    text = str(error)
    return isinstance(error, dist.DistError) or ("gloo" in text and ("onnection" in text or "peer" in text))


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host's memory did not suffice."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) or "bad_alloc" in str(error)


def _quieten() -> None:
    """Keep the libraries' running commentary from burying what the user needs to see."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
