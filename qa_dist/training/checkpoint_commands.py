"""`qa-dist checkpoint list`, `checkpoint verify` and `checkpoint export`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qa_dist.checkpoint.progress import Progress
from qa_dist.checkpoint.store import Found, checkpoints, verified
from qa_dist.errors import UserError
from qa_dist.training.export import export_checkpoint
from qa_dist.training.resume import DIRECTORY


def run(command: str, args: Sequence[str], usage: str, show: Callable[[str], None], say: Callable[[str], None]) -> int:
    """Run one of the three commands and return its exit code: 1 where a checkpoint is damaged, 2 for wrong arguments.

    `usage` describes the arguments, `show` prints results and `say` prints messages. Raises `UserError`.
    """
    positional, dtype = list(args), "float32"
    if "--dtype" in positional[:-1]:
        place = positional.index("--dtype")
        dtype = positional[place + 1]
        del positional[place : place + 2]
    if len(positional) != (2 if command == "checkpoint export" else 1) or positional[0].startswith("-"):
        say(f"usage: qa-dist {command} …\n{usage}")
        return 0 if positional in (["-h"], ["--help"]) else 2
    path = Path(positional[0])
    if command == "checkpoint export":
        target = Path(positional[1])
        export_checkpoint(path, target, dtype)
        size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
        show(f"exported {path} to {target} ({dtype}, {size:,.1f} MB)")
        return 0
    root = path / DIRECTORY if (path / DIRECTORY).is_dir() else path
    found = list(verified(root) if command == "checkpoint verify" else checkpoints(root))
    if not found:
        raise UserError(f"{path}: holds no checkpoints; name a run directory")
    table = _table(found, "verified" if command == "checkpoint verify" else "complete")
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
    return 1 if any(one.problem for one in found) else 0


def _epoch(progress: Progress) -> str:
    """Return the epoch of the last step that is done, and how much of the epoch is done as far as it is known."""
    if progress.batches_done == 0:
        return f"{progress.epoch - 1} (end)"
    if progress.batches_done == progress.batches_in_epoch:
        return f"{progress.epoch} (end)"
    total = progress.batches_in_epoch
    return f"{progress.epoch} ({progress.batches_done}/{total})" if total else str(progress.epoch)


def _table(found: Sequence[Found], good: str) -> Table:
    """A row for each checkpoint; `good` is the state of those without a problem."""
    table = Table("checkpoint", "epoch", "score", "MB", "written by", "state")
    for one in found:
        manifest, cells = one.manifest, ["", "", "", ""]
        if manifest is not None:
            score = "" if manifest.score is None else f"{manifest.score:.3f}"
            size = sum(file.size for file in manifest.files.values()) / 1e6
            cells = [_epoch(manifest.progress), score, f"{size:,.1f}", str(manifest.launch)]
        table.add_row(one.path.name, *cells, one.problem or good)
    return table
