"""Initial weights as a function of (seed, module name)."""

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Set all weights of `model` that were not loaded to values that depend on `seed` and the names of their modules
    alone: not on the order in which modules were made, nor on what else the random number generator was used for.

    Every module is initialized by the model's own `_init_weights`, after the generator was seeded for that module.
    Modules come before those that contain them, as in transformers, because some models correct weights of a module
    when they initialize one that contains it. Weights that transformers has marked as loaded (`_is_hf_initialized`)
    are left untouched. What a model initializes nowhere but in its constructors keeps its values.
    """
    from transformers import PreTrainedModel
    from transformers.initialization import guard_torch_init_functions

    if all(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters()):
        return
    modules = list(model.named_modules(remove_duplicate=False))
    owners = {name: module for name, module in modules if isinstance(module, PreTrainedModel)}
    with torch.random.fork_rng(devices=[]), guard_torch_init_functions():
        for name, module in sorted(modules, key=lambda item: (-_depth(item[0]), item[0])):
            owner = _owner(name, owners)
            if owner is not None:
                torch.manual_seed(seed_of(seed, name))
                module._is_hf_initialized = False  # pyright: ignore[reportArgumentType] -- a mark, not a weight
                owner._initialize_weights(module, owner.is_custom_code())


def seed_of(seed: int, name: str) -> int:
    """Return the seed for the weights of the module called `name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _owner(name: str, owners: "dict[str, PreTrainedModel]") -> "PreTrainedModel | None":
    """Return the innermost model that the module called `name` is or belongs to: a part of a model that is a model of
    its own class is initialized by that class."""
    while name not in owners and name:
        name = name.rpartition(".")[0]
    return owners.get(name)
