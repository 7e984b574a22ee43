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
SECONDS = 300
"""How long to wait: a Hub that does not answer is asked for the model's config."""


@dataclass(frozen=True)
class Probe:
    """What was found."""

    devices: int = 0
    """GPUs of this machine."""
    no_bf16: bool = False
    """Whether they cannot compute in bf16."""
    engine: str = CPU_ENGINE
    """The launch config in configs/accelerate under which the model fits."""


def probe(config: RunConfig, machines: int, processes: int | None) -> Probe:
    """Look at this machine, one of `machines` alike, for a run of `processes` (None: one for each GPU). Raises
    `UserError`."""
    command = [sys.executable, "-m", "qa_dist.launching.probe", str(machines), str(processes or 0)]
    try:
        done = subprocess.run(
            command, input=config.model_dump_json(), stdout=subprocess.PIPE, text=True, timeout=SECONDS
        )
        values = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        raise UserError("the GPUs of this machine could not be examined: see above, and run `qa-dist doctor`") from None
    if problem := values.get("problem"):
        raise UserError(problem)
    return Probe(**values)


def main() -> None:
    import torch

    from qa_dist import doctor

    config = RunConfig.model_validate_json(sys.stdin.read())
    machines, processes = int(sys.argv[1]), int(sys.argv[2])
    values = asdict(Probe())
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        try:
            engine = doctor.fitting_engine(config, processes or devices * machines)
            values = asdict(Probe(devices, not torch.cuda.is_bf16_supported(including_emulation=False), engine))
        except UserError as error:  # on one machine of several it must not end in another engine than theirs
            values = {"problem": f"{error}. Or name a launch config: --config_file"}
    elif torch.accelerator.is_available() and not torch.backends.mps.is_available():
        values = asdict(Probe(torch.accelerator.device_count(), False, "ddp"))
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
