"""What tests push to their Hub: small checkpoints and models, by the real client."""

import contextlib
import json
from pathlib import Path

import torch

from qa_dist.checkpoint.hub import Repository, sha256_of
from qa_dist.checkpoint.manifest import File, Manifest, TensorSpec
from qa_dist.checkpoint.publication import Identity, Publication
from qa_dist.checkpoint.push_queue import Lane, Push, PushQueue, Summary
from qa_dist.checkpoint.store import directory_name, write_manifest, write_shard
from tests.helpers import make_manifest
from tests.hub_server import HubServer

REPO = "alice/model"
STATES = "training-state"


def make_state(directory: Path, step: int, *, shards: int = 2) -> Manifest:
    """A small checkpoint."""
    directory.mkdir(parents=True)
    files, tensors = {}, {}
    for rank in range(shards):
        name = f"state-{rank:05d}-of-{shards:05d}.safetensors"
        own = {f"weight/w{rank}": torch.full((64,), float(step * 10 + rank))}
        files[name] = write_shard(directory, name, own)
        tensors |= {key: TensorSpec(dtype="F32", shape=list(tensor.shape)) for key, tensor in own.items()}
    (directory / "config.json").write_text("{}")
    files["config.json"] = File.of(directory / "config.json")
    manifest = make_manifest(step, world_size=shards, run_id="r", tensors=tensors, files=files)
    write_manifest(directory, manifest)
    return manifest


def make_model(directory: Path, step: int, **files: str) -> Path:
    directory.mkdir(parents=True)
    content = {"model.safetensors": f"weights {step}", "config.json": "{}", "README.md": f"# Model of step {step}\n"}
    for name, text in (content | files).items():
        path = directory / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return directory


class Runner:
    """A run's pushes, one after the other."""

    def __init__(
        self,
        tmp_path: Path,
        run: str = "r",
        *,
        keep: int = 2,
        keep_models: int | None = None,
        repo_id: str = REPO,
        settled: bool = True,
    ):
        self.tmp_path = tmp_path
        self.count = 0
        self.repository = Repository(repo_id)
        self.repository.create(private=True)
        self.publication = Publication(self.repository, Identity(run, is_settled=settled), STATES, keep, keep_models)

    def make(self, lane: Lane, step: int, **files: str) -> Push:
        self.count += 1
        directory = self.tmp_path / f"{self.publication.identity.attempt}-{self.count}"
        if lane == "state":
            make_state(directory, step)
        else:
            make_model(directory, step, **files)
        return Push(lane, step, directory)

    def push(self, lane: Lane, step: int, **files: str) -> None:
        self.publication.push(self.make(lane, step, **files), lambda: None)

    def queued(self, *pushes: Push, seconds: float = 60) -> Summary:
        with contextlib.closing(PushQueue(self.publication.push)) as queue:
            for one in pushes:
                queue.submit(one)
            return queue.drain(seconds)


def require_whole(hub: HubServer, *steps: int) -> None:
    """The branch of states holds exactly these, newest first, and every file is what its manifest says."""
    repo = hub.repo(REPO)
    files = repo.files(STATES)
    folders = {path.partition("/")[0] for path in files if "/" in path}
    assert folders == {directory_name(step) for step in steps}
    pointer = json.loads(repo.read("pushed.json", STATES))
    assert list(pointer["states"]) == [directory_name(step) for step in steps]
    for folder in folders:
        content = repo.read(f"{folder}/manifest.json", STATES)
        assert sha256_of(content) == pointer["states"][folder]
        manifest = Manifest.parse(content, folder)
        for name, file in manifest.files.items():
            assert sha256_of(repo.read(f"{folder}/{name}", STATES)) == file.sha256
