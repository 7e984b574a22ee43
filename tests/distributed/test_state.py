"""The state of every strategy and world size, restored under every other one: all values equal, and training goes on as
it would have. Initial weights are the same under all of them."""

import json
import subprocess
from typing import Any

import pytest

from tests.distributed import state_worker
from tests.helpers import FORK_SERVER, ROOT, environment

CELLS = [
    ("ddp", 1, "no", "fused"),
    ("ddp", 1, "no", "plain"),
    ("ddp", 3, "no", "fused"),
    ("zero1", 4, "no", "fused"),
    ("zero2", 3, "no", "fused"),
    ("zero2", 3, "no", "plain"),
    ("zero3", 1, "no", "fused"),
    ("zero3", 2, "no", "fused"),
    ("zero3", 3, "no", "fused"),
    ("zero3", 4, "no", "fused"),
    ("zero2_offload", 3, "no", "fused"),
    ("zero3_offload", 3, "no", "fused"),
    ("fsdp2", 3, "no", "fused"),
    ("fsdp2", 4, "no", "fused"),
    ("zero0", 3, "bf16", "fused"),
    ("zero2", 3, "bf16", "fused"),
    ("zero3", 3, "bf16", "fused"),
    ("zero3_offload", 2, "bf16", "fused"),
    ("fsdp2", 3, "bf16", "fused"),
]
"""Strategy, processes, precision and implementation of AdamW."""
NAMES = ["-".join(map(str, cell)) for cell in CELLS]
CORE = ["ddp-1-no-fused", "ddp-1-no-plain", "zero2-3-no-fused", "zero3-3-no-fused", "zero3-4-no-fused"]
CORE += ["zero3_offload-3-no-fused", "fsdp2-3-no-fused", "zero3-3-bf16-fused"]
"""Those of the default tier: each sharded strategy, on numbers of processes that divide no parameter."""
MATRIX = [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
INITIAL = ["ddp-1-no-fused", "ddp-3-no-fused", "zero1-4-no-fused", "zero2-3-no-fused", "zero3-3-no-fused"]
INITIAL += [
    "zero3-4-no-fused",
    "zero3_offload-3-no-fused",
    "fsdp2-3-no-fused",
    "zero0-3-bf16-fused",
    "zero3-3-bf16-fused",
]
"""Those in which initial weights are looked at."""
SECONDS = 900
"""For all cells; the first use of DeepSpeed on a machine compiles an extension."""


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each cell has found when it saved its state, restored the states of all, and made a new model.

    Only those of the default tier and of the tests that were selected run."""
    directory = tmp_path_factory.mktemp("state")
    selected = "\n".join(item.name for item in request.session.items if item.path == request.path)
    names = {name for name in NAMES if name in CORE or name in selected}
    paths = [str(directory / f"{name}.safetensors") for name in NAMES if name in names]
    plan = []
    for what in ("save", "restore", "initial"):
        for i, (engine, processes, precision, optimizer) in enumerate(CELLS):
            if NAMES[i] not in (set(INITIAL) & names if what == "initial" else names):
                continue
            cell = {"engine": engine, "processes": processes, "precision": precision, "fused": optimizer == "fused"}
            cell |= {"reordered": processes == 3}
            own = str(directory / f"{NAMES[i]}.safetensors")
            plan.append(cell | {"name": f"{what}-{NAMES[i]}", "what": what, "save": own, "restore": paths})
    path = directory / "plan.json"
    path.write_text(json.dumps(plan))
    command = [FORK_SERVER.python, "-m", state_worker.__name__, str(path), str(directory)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    if "failed" in done.stdout or done.returncode:
        print(done.stdout)
    return {cell["name"]: json.loads((directory / f"{cell['name']}.json").read_text()) for cell in plan}


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("saved", MATRIX)
@pytest.mark.parametrize("restored", MATRIX)
def test_a_state_is_the_same_wherever_it_is_restored(restored: str, saved: str, results: dict[str, Any]):
    assert results[f"save-{saved}"] is not None, f"{saved} could not train or save"
    assert results[f"restore-{restored}"] is not None, f"{restored} could not restore"
    found, expected = results[f"restore-{restored}"][saved], results[f"save-{saved}"]
    assert found["same"], "a value of the state has changed"
    assert found["forward"], "the forward pass sees other weights"
    if restored == saved:
        assert found["after"] == expected["after"]
        assert found["end"] == expected["end"]
    elif not (restored + saved).count("bf16"):
        assert found["after"] == pytest.approx(expected["after"], rel=0, abs=1e-5)


def test_initial_weights_are_the_same_everywhere(results: dict[str, Any]):
    """Under every strategy and world size, though the ranks' random generators differ, and on three processes the
    order in which the model's parts are made."""
    found = {name: results[f"initial-{name}"] for name in INITIAL if f"initial-{name}" in results}
    assert None not in found.values(), found
    assert len({result["weights"] for result in found.values()}) == 1, found


def test_both_implementations_of_adamw_are_used(results: dict[str, Any]):
    """They round differently, and a state goes on with the one that it is given."""
    fused, plain = results["save-ddp-1-no-fused"], results["save-ddp-1-no-plain"]
    assert fused["end"] != plain["end"]
    assert fused["after"] == pytest.approx(plain["after"], abs=1e-5)
