"""The batch job that this process is part of, if any."""

import os
from typing import NamedTuple


class BatchJob(NamedTuple):
    """A job of SLURM, which may be requeued: then another attempt at it runs under the same number."""

    number: str
    attempt: str
    """How often it was requeued before."""

    @classmethod
    def of_this_process(cls) -> "BatchJob | None":
        number = os.environ.get("SLURM_JOB_ID")
        return cls(number, os.environ.get("SLURM_RESTART_COUNT", "0")) if number else None

    @property
    def name(self) -> str:
        """What its attempts have in common, in status.json."""
        return f"SLURM {self.number}"

    @property
    def stop_file(self) -> str:
        """The file in a run directory that asks this attempt to stop; one named `stop` asks whichever run there is."""
        return f"stop-{self.number}.{self.attempt}"
