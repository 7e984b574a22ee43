"""What each entry point imports: no more than it uses, as every process waits for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, tiny_flags

HEAVY = {
    *("accelerate", "datasets", "deepspeed", "evaluate", "huggingface_hub", "jinja2", "matplotlib", "numpy", "pandas"),
    *("psutil", "pyarrow", "pydantic", "rich", "tensorboard", "tokenizers", "torch", "transformers", "tyro"),
    *("torch._dynamo", "torch.distributed.fsdp", "torch.utils.cpp_extension", "torch.utils.tensorboard"),
    *("transformers.generation.continuous_batching", "transformers.modeling_utils"),
    *("qa_dist.training.strategies.deepspeed", "qa_dist.training.strategies.fsdp2"),
}
"""Modules whose import takes long, and parts of ours that only some runs need."""

COMMAND_LINE = {"psutil", "pydantic", "rich", "tyro"}
ASKING = COMMAND_LINE | {"huggingface_hub", "jinja2", "numpy", "pyarrow", "tokenizers", "torch", "transformers"}
"""What a question needs before a model is loaded."""
TRAINING = ASKING | {
    *("accelerate", "datasets", "jinja2", "pandas", "tensorboard", "torch.utils.tensorboard"),
    # transformers imports these with its models
    *(
        "torch._dynamo",
        "torch.distributed.fsdp",
        "transformers.generation.continuous_batching",
        "transformers.modeling_utils",
    ),
}

ENTRY_POINTS = {
    "import qa_dist": set(),
    "import qa_dist.cli": COMMAND_LINE,
    "import qa_dist.launching.command": COMMAND_LINE,
    "import qa_dist.scoring": COMMAND_LINE,
    "from qa_dist import QuestionAnswerer": ASKING,
    "from qa_dist import TokenClassifier": ASKING,
}

FIRST_STEP = """
import json, os, sys
from torch.optim.optimizer import register_optimizer_step_pre_hook
from qa_dist.cli import main

def end(*_):
    print("\\n" + json.dumps(sorted(sys.modules)), flush=True)
    os._exit(0)

register_optimizer_step_pre_hook(end)
main(sys.argv[1:])
"""


def heavy_modules(*program: str) -> set[str]:
    """Return those that a program has imported when it prints the names of all, in a process of its own."""
    done = subprocess.run([sys.executable, *program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("statement", ENTRY_POINTS)
def test_an_entry_point_imports_what_it_uses(statement: str):
    found = heavy_modules("-c", f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))")
    assert found - ENTRY_POINTS[statement] == set()


def test_training_under_ddp_up_to_its_first_step(tmp_path: Path):
    found = heavy_modules("-c", FIRST_STEP, "train", *tiny_flags(), "--run.output_dir", str(tmp_path / "run"))
    assert found - TRAINING == set()
    assert "torch" in found


def test_importing_the_package_costs_next_to_nothing():
    """Nothing but a few of our own modules."""
    program = "import sys; before = {*sys.modules}; import qa_dist; print(*sorted({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert packages - set(sys.stdlib_module_names) == {"qa_dist"}
