"""What GPUs this machine has, and which engine a run needs on them; looked at by a process of its own.

The launcher lives as long as the run. If it asked CUDA itself, it would hold memory on a GPU, and where GPUs are set to
one process each, the place of the process that is to train there.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from qa_dist.config import RunConfig
from qa_dist.errors import UserError

CPU_ENGINE = "cpu_ddp"


@dataclass(frozen=True)
class Probe:
    """What was found."""

    devices: int = 0
    """GPUs of this machine."""
    no_bf16: bool = False
    """Whether they cannot compute in bf16."""
    engine: str = CPU_ENGINE
    """The launch config in configs/accelerate under which the model fits."""


def probe(config: RunConfig, machines: int) -> Probe:
    """Look at this machine, one of `machines` alike. Raises `UserError`."""
    command = [sys.executable, "-m", "qa_dist.launching.probe", str(machines)]
    done = subprocess.run(command, input=config.model_dump_json(), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the GPUs of this machine could not be looked at (exit code {done.returncode}): see above")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    import torch

    from qa_dist import doctor

    config = RunConfig.model_validate_json(sys.stdin.read())
    machines = int(sys.argv[1])
    found = Probe()
    if torch.accelerator.is_available():
        devices = torch.accelerator.device_count()
        no_bf16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        found = Probe(devices, no_bf16, doctor.fitting_engine(config, devices * machines, machines))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main()
