"""Where each node has a disk of its own: its shards are uploaded from there, and the main process commits them.

What has been uploaded is told through a store that all nodes reach, by the shard's hash, so that nothing has to be
agreed on: the main process commits a state once the store knows all its shards.
"""

import time
from collections.abc import Callable, Mapping

from huggingface_hub import CommitOperationAdd
from huggingface_hub.lfs import UploadInfo
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] -- documented

from qa_dist.checkpoint.hub import Repository
from qa_dist.checkpoint.hub_client import HubError
from qa_dist.checkpoint.manifest import File, Manifest
from qa_dist.checkpoint.push_queue import Push
from qa_dist.checkpoint.store import directory_name

PATIENCE = 30.0
"""Seconds that one try waits for the other nodes."""
POLL = 0.5


class NodeUploads:
    """What the nodes tell each other of their uploads."""

    def __init__(self, store: Store, repository: Repository):
        self.store = store
        self.repository = repository

    def upload(self, push: Push, count_commit: Callable[[], None]) -> None:
        """Upload the shards that this node has of a state. Raises `HubError`."""
        manifest = Manifest.read(push.directory)
        own = {name: push.directory / name for name in manifest.files if (push.directory / name).is_file()}
        folder = directory_name(push.step)
        try:
            self.repository.upload(
                {f"{folder}/{name}": path for name, path in own.items()},
                {f"{folder}/{name}": manifest.files[name].sha256 for name in own},
            )
        except HubError as error:
            for name in own:
                self.store.set(f"trouble/{manifest.files[name].sha256}", str(error))
            raise
        for name in own:
            self.store.set(f"uploaded/{manifest.files[name].sha256}", "yes")

    def wait_for(self, shards: Mapping[str, File]) -> tuple[dict[str, CommitOperationAdd], str]:
        """The shards (path -> file) that other nodes have uploaded, after some waiting for them; and, where some are
        missing, what is the matter."""
        end = time.monotonic() + PATIENCE
        while True:
            there = {path: file for path, file in shards.items() if self.store.check([f"uploaded/{file.sha256}"])}
            if len(there) == len(shards) or time.monotonic() > end:
                break
            time.sleep(POLL)
        troubles = [f"trouble/{file.sha256}" for path, file in shards.items() if path not in there]
        known = [self.store.get(key).decode() for key in troubles if self.store.check([key])]
        return {path: _uploaded(path, file) for path, file in there.items()}, known[0] if known else ""


def _uploaded(path: str, file: File) -> CommitOperationAdd:
    """A file to commit that this process does not have: only its name, size and hash are sent.

    The client makes such operations itself when another of its calls has uploaded a file; it has no public way to
    say so of another process.
    """
    operation = CommitOperationAdd(path, b"")
    operation.upload_info = UploadInfo(size=file.size, sample=b"", sha256=bytes.fromhex(file.sha256))
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation
