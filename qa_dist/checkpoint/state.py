"""The state of a live engine as named tensors, whichever engine it is."""

from collections.abc import Callable

from torch import Tensor, nn


def full_weights(model: nn.Module, whole: Callable[[nn.Parameter], Tensor], is_main: bool) -> dict[str, Tensor] | None:
    """The model's whole weights by name, float32, on the CPU: the master weights where training keeps a copy in
    low precision. On the main process; None on the others, all of which must call it too.

    `model` is the plain one, whose parameters may be shards; `whole` makes one of them whole, float32, on the CPU.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter)
        if is_main:
            weights[name] = tensor
    if not is_main:
        return None
    # names that belong to the state but not to the parameters: buffers, and tied weights under a second name
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights:
            continue
        shared = next((n for n, p in model.named_parameters() if p is tensor), None)
        weights[name] = weights[shared] if shared else tensor.detach().cpu()
    return weights
