"""Loads checkpoints, one after the other, into one engine, and says which losses follow."""

import json
import os
import sys
from pathlib import Path

from qa_dist.checkpoint.manifest import Manifest
from qa_dist.config import RunConfig
from qa_dist.reporting.run_directory import RunDirectory
from qa_dist.reporting.tracker import Tracker
from qa_dist.tasks import load_task
from qa_dist.training.checkpointer import Digests
from qa_dist.training.engine import Engine
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.loop import Training
from qa_dist.training.models import build_model
from qa_dist.training.preemption import StopRequest
from qa_dist.training.publishing import Publisher
from qa_dist.training.resume import Checkpoint

STEPS = 6


def main() -> None:
    target, *paths = (Path(arg) for arg in sys.argv[1:])
    launch = LaunchEnvironment.read()
    launch.announce()
    engine = Engine(launch, timeout_minutes=2)
    config = RunConfig.model_validate(Manifest.read(paths[0]).config)
    task = load_task(config)
    features = task.features("train")
    assert features is not None
    model, _ = build_model(config, task)
    engine.prepare(model, config)
    run = RunDirectory(target.parent, is_main=False)
    tracker = Tracker(run, task.headline)
    share = config.train.global_batch_size
    publisher = Publisher(config.hub, run, None)
    training = Training(
        config,
        engine,
        task,
        run,
        tracker,
        StopRequest(),
        {"train": features},
        share,
        None,
        Digests("", None),
        publisher,
    )
    found = {}
    for path in paths:
        training.resume(Checkpoint(path, Manifest.read(path)), in_place=False)
        progress = training.progress.model_copy()
        batches = training.plan.batches(progress.epoch)[progress.batches_done :]
        losses = []
        for i, batch in enumerate(batches[:STEPS]):
            rate = training.plan.learning_rate(progress.epoch, progress.batches_done + i)
            losses.append(training.step.run(progress.step + i, rate, batch, training.step.collate(batch)).loss)
        found[str(path)] = losses
    if engine.is_main:
        target.write_text(json.dumps(found))
    engine.close()
    sys.stdout.flush()
    os._exit(0)  # as qa_dist/__main__.py does, and says why


if __name__ == "__main__":
    main()
