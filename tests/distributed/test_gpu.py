"""What only a GPU can show. Skipped, with the reason, where there is none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_dist.training.varlen import obstacle, packed, run_model, switch_on
from tests.benchmarks.gpu import RandomWindows, squad_lengths
from tests.helpers import TINY_BERT, Launch, Launcher, jsonl, tiny_flags

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def train(launcher: Launcher, engine: str, precision: str, output_dir: Path, **changes: str) -> Launch:
    launch = launcher.train(
        engine, 1, output_dir, *tiny_flags(**changes), mixed_precision=precision, use_cpu=False, timeout=280
    )
    assert launch.code == 0, launch.output
    return launch


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_engines_and_precisions_follow_one_curve(engine: str, precision: str, launcher: Launcher, tmp_path: Path):
    train(launcher, "ddp", "no", tmp_path / "expected")
    launch = train(launcher, engine, precision, tmp_path / "run")
    assert "on cuda" in launch.output
    found, expected = (jsonl(tmp_path / name / "metrics.jsonl") for name in ("run", "expected"))
    for line, reference in zip(found, expected, strict=True):
        if line["kind"] == "train" and not line["skipped_steps"]:
            assert line["loss"] == pytest.approx(reference["loss"], rel=0.03)
            assert line["peak_memory_gib"] > 0
            assert ("loss_scale" in line) == (precision == "fp16")


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_packed_attention_equals_the_padded(precision: torch.dtype):
    device = torch.device("cuda")
    shape: dict[str, Any] = TINY_BERT | {"hidden_size": 64, "max_position_embeddings": 384}
    features = RandomWindows(squad_lengths(16), pad_all=False, vocabulary=500)
    torch.manual_seed(0)
    model: Any = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(**shape, vocab_size=500))
    model = model.to(device).eval()
    batch = features.collate(np.arange(16))
    with torch.no_grad():
        exact = run_model(model, batch.to(device))
        with torch.autocast("cuda", precision):
            padded = run_model(model, batch.to(device))
            assert obstacle(model, device, "bf16") is None
            switch_on(model)
            flash = run_model(model, packed(batch, 0).to(device))
    real = batch.inputs["attention_mask"].bool().to(device)
    allowed = 3 * (padded.start_logits - exact.start_logits)[real].abs().max() + 1e-3
    assert (flash.start_logits - exact.start_logits)[real].abs().max() < allowed


def test_training_on_packed_windows(launcher: Launcher, tmp_path: Path):
    launch = train(launcher, "ddp", "bf16", tmp_path / "run", **{"model.attention": "varlen"})
    assert "varlen is not used" not in launch.output
    train(launcher, "ddp", "bf16", tmp_path / "padded")
    found, expected = (jsonl(tmp_path / name / "metrics.jsonl") for name in ("run", "padded"))
    for line, reference in zip(found, expected, strict=True):
        if line["kind"] == "train":
            assert line["padding"] == 0
            assert line["loss"] == pytest.approx(reference["loss"], rel=0.03)


def test_float32_falls_back_with_a_warning(launcher: Launcher, tmp_path: Path):
    launch = train(launcher, "ddp", "no", tmp_path / "run", **{"model.attention": "varlen"})
    assert "varlen is not used: it needs mixed_precision bf16 or fp16" in launch.output


def test_the_micro_batch_is_found(launcher: Launcher, tmp_path: Path):
    train(launcher, "ddp", "bf16", tmp_path / "run", **{"train.micro_batch_size": "auto"})
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "completed"
