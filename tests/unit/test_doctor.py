"""What the doctor computes, and what it says of launches that cannot work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_dist.cli import main
from qa_dist.config import RunConfig
from qa_dist.doctor import activations_per_window, needs
from qa_dist.training.launch_environment import LaunchEnvironment
from tests.helpers import TINY_BERT

ALONE = LaunchEnvironment.read()


def test_memory_of_the_engines():
    by_name = {need.engine: need.states for need in needs(1000, 100, processes=8)}
    assert by_name["ddp"] == 20_000  # float32 weights, gradients, two moments, and the buckets
    assert by_name["zero1"] == 7500
    assert by_name["zero3_offload"] < by_name["zero3"] < by_name["zero2"] < by_name["zero1"]
    assert needs(1000, 100, processes=1)[0].states == 16_000


@pytest.mark.parametrize("nodes", [1, 2])
def test_memory_is_what_deepspeed_estimates(nodes: int):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero_2

    found = {need.engine: need.states for need in needs(4800, 100, processes=4 * nodes)}
    assert found["zero2"] == zero_2(4800, 4, nodes, cpu_offload=False)[1]
    assert found["zero3"] == zero_3(4800, 100, 4, nodes, cpu_offload=False, cpu_offload_params=False)[1]
    assert found["zero3_offload"] == zero_3(4800, 100, 4, nodes, cpu_offload=True, cpu_offload_params=True)[1]


def test_engines_where_deepspeed_is_not_installed():
    found = {need.engine: need.states for need in needs(1000, 100, processes=8, has_deepspeed=False)}
    assert found == {"ddp": 20_000, "fsdp2": 2400}


def test_activations_are_estimated_about_right():
    """Against the tensors that a real model keeps for its backward pass."""
    changes = {"num_hidden_layers": 12, "num_attention_heads": 1, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    settings: Any = TINY_BERT | changes | dropout
    config = AutoConfig.for_model(**settings)
    model = AutoModelForQuestionAnswering.from_config(config).train()
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(
            input_ids=torch.ones(1, 128, dtype=torch.long), attention_mask=torch.ones(1, 128, dtype=torch.long)
        )
    estimate = activations_per_window(12, config.hidden_size, 128, bytes_per_value=4)
    assert output.start_logits.requires_grad
    assert 0.5 < sum(kept.values()) / estimate < 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"is_split": True}, "this one was started alone"),
        ({"mixed_precision": "fp16", "on_cpu": True}, "fp16 (from the launch config) does not exist on a CPU"),
        ({"mixed_precision": "fp8"}, "mixed_precision: fp8 (from the launch config) is not supported; set it to bf16"),
    ],
)
def test_launches_that_cannot_work(changes: dict, expected: str):
    (problem,) = replace(ALONE, **changes).problems(RunConfig())
    assert expected in problem.message


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    (problem,) = replace(ALONE, local_world_size=8, on_cpu=False).problems(RunConfig())
    assert "asks for 8 GPUs on this machine, which has 2; set num_processes to 2" in problem.message
    assert not replace(ALONE, local_world_size=2, on_cpu=False).problems(RunConfig())


def test_a_deepspeed_file_that_says_what_the_run_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps({"train_batch_size": 12, "gradient_clipping": "auto", "zero_optimization": {"stage": 2}})
    )
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    (problem,) = ALONE.problems(RunConfig())
    assert problem.message.startswith(f"train_batch_size: 12 (in {file}) would be ignored: train.global_batch_size")
    file.write_text("{")
    (problem,) = ALONE.problems(RunConfig())
    assert "cannot be read" in problem.message


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        ({"model": {"attention": "varlen"}}, {"on_cpu": True}, "model.attention: varlen needs an NVIDIA GPU"),
        ({"train": {"global_batch_size": 3}}, {"world_size": 4}, "is less than one window for each of the 4 processes"),
        (
            {},
            {"use_fsdp": True, "mixed_precision": "fp16"},
            "fp16 (from the launch config) is not supported under FSDP",
        ),
        ({"train": {"compile": True}}, {"use_fsdp": True}, "train.compile: is not supported for a sharded model"),
    ],
)
def test_settings_that_do_not_fit_the_launch(settings: dict, changes: dict, expected: str):
    launch = replace(ALONE, **changes)
    config = RunConfig.model_validate(settings)
    messages = [problem.message for problem in (*launch.problems(config), *launch.training_problems(config))]
    assert any(expected in message for message in messages), messages


def test_the_doctor_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(TINY_BERT | {"vocab_size": 99, "architectures": ["BertModel"]}))
    with pytest.raises(SystemExit) as exit_:
        main(
            ["doctor", "--model", str(tmp_path), "--data.max_length", "128", "--run.output_dir", str(tmp_path / "run")]
        )
    shown = capsys.readouterr().out
    assert exit_.value.code == 0, shown
    for expected in ("torch 2.", "GiB free", "DeepSpeed ops", "recommended: configs/accelerate/", "nothing is wrong"):
        assert expected in shown
    assert not (tmp_path / "run").exists()


def test_the_doctor_names_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--model", str(tmp_path / "none")])
    assert exit_.value.code == 2
    assert "there is no such directory" in capsys.readouterr().err
