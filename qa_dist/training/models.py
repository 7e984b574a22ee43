"""Models: pretrained ones and new ones, checked against the tokenizer and the windows before anything runs."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from qa_dist.config import ModelConfig, RunConfig
from qa_dist.errors import UserError, listing
from qa_dist.tasks.model_config import pretrained_config
from qa_dist.tasks.task import Task
from qa_dist.training.initial_weights import initialize


def build_model(config: RunConfig, task: Task, *, trained: bool = False) -> tuple[nn.Module, list[str]]:
    """The model that the config names, in float32, with the task's head, and notes for the user.

    New weights are a function of `train.seed` and the names of their modules, so they are the same on all ranks and
    under every strategy. With `trained`, a head that would be new is an error. Raises `UserError` for a model that
    cannot be loaded, has no such head, or does not fit the tokenizer or `data.max_length`.
    """
    settings = config.model
    torch.manual_seed(config.train.seed)
    if settings.name is None:
        model_config = _new_config(settings.config or {}, task.tokenizer)
        _check_head(model_config, task, "model.config")
        _check_fit(model_config, task.tokenizer, config.data.max_length)
        task.fit_head(model_config)
        try:
            model = task.auto_model.from_config(model_config, dtype=torch.float32, **_attention(settings))
        except Exception as error:  # sizes that do not divide each other and the like
            raise UserError(f"model.config: no model can be built from it: {_first_line(error)}") from None
        initialize(model, config.train.seed)
        return model, _try_out(model, task, config.data.max_length)
    model_config = pretrained_config(settings)
    _check_head(model_config, task, settings.name)
    _check_fit(model_config, task.tokenizer, config.data.max_length)
    task.fit_head(model_config)
    try:
        model, info = task.auto_model.from_pretrained(
            settings.name,
            config=model_config,
            dtype=torch.float32,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with both sizes
            **_attention(settings),
        )
    except Exception as error:  # a truncated file raises whatever its reader raises
        raise UserError(
            f"model.name: the weights of {settings.name!r} cannot be loaded: {_first_line(error)}"
        ) from None
    new = _new_weights(model, model_config, info, settings.name, task, trained)
    initialize(model, config.train.seed)
    notes = [f"new weights: {listing(new)}"] if new else []
    return model, notes + _try_out(model, task, config.data.max_length)


def _new_weights(
    model: nn.Module, model_config: PretrainedConfig, info: dict[str, Any], name: str, task: Task, trained: bool
) -> list[str]:
    """Return the names of the weights that the files of the model `name` lack. Raises `UserError` for weights of other
    sizes, for a head of another kind of task, and with `trained` for a head that is missing. `info`: what transformers
    has found in the files."""
    if others := sorted(info["mismatched_keys"]):
        sizes = [f"{name} is {tuple(stored)}, and has to be {tuple(needed)}" for name, stored, needed in others]
        raise UserError(
            f"model.name: the weights of {name!r} have other sizes than those of a model for "
            f"{task.name.replace('_', ' ')}: {listing(sizes)}. If it was trained for something else, start from the "
            "model that it was made of"
        )
    new = sorted(info["missing_keys"])
    if new and trained:
        raise UserError(
            f"model.name: {name!r} has no weights for {listing(new)}: it has not been trained for "
            f"{task.name.replace('_', ' ')}. Train it first (qa-dist train --model.name {name} …)"
        )
    kinds = model_config.architectures or []
    if not new and kinds and type(model).__name__ not in kinds:
        raise UserError(
            f"model.name: {name!r} is a {listing(kinds)}, whose head would be taken for that of a model for "
            f"{task.name.replace('_', ' ')}, as their weights have the same names and sizes; start from the model that "
            "it was made of"
        )
    return new


def _attention(settings: ModelConfig) -> dict[str, str]:
    """What is said of it to transformers. Packed attention replaces it later, on the device."""
    return {"attn_implementation": settings.attention} if settings.attention in ("sdpa", "eager") else {}


def _new_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    values = dict(values)
    model_type = values.pop("model_type", None)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
    # models that know these tokens by other names
    special |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    try:
        known = AutoConfig.for_model(model_type)
        for key in values:
            # Configs take settings that they do not list, so only what looks like a slip is refused.
            close = difflib.get_close_matches(key, known.to_dict(), n=1, cutoff=0.85)
            if not hasattr(known, key) and close:
                raise UserError(f"model.config: {model_type} has no setting {key}; did you mean {close[0]}?")
        return AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **special, **values})
    except UserError:
        raise
    except Exception as error:  # each config class validates its values in its own way
        raise UserError(f"model.config: is not a valid {model_type!r} config: {_first_line(error)}") from None


def _check_head(model_config: PretrainedConfig, task: Task, name: str) -> None:
    if type(model_config) in task.auto_model._model_mapping or hasattr(model_config, "auto_map"):
        return
    raise UserError(
        f"{name}: transformers has no {task.name.replace('_', ' ')} model of type {model_config.model_type!r}; "
        "use an encoder such as bert, roberta, deberta-v2, electra or modernbert"
    )


def _check_fit(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    vocabulary = getattr(model_config, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens but the model only {vocabulary:,} embeddings: "
            "model.tokenizer and the model do not belong together"
        )
    longest = longest_window(model_config)
    if longest is not None and max_length > longest:
        raise UserError(
            f"data.max_length: {max_length} is more than the {longest} positions that the model has; set it to "
            f"{longest} or less"
        )


def longest_window(model_config: PretrainedConfig) -> int | None:
    """Tokens for which the model has positions; None where it has no such limit."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    # RoBERTa's family counts positions from pad_token_id + 1
    taken = (model_config.pad_token_id or 0) + 1 if "roberta" in model_config.model_type else 0
    return positions - taken


def _try_out(model: nn.Module, task: Task, max_length: int) -> list[str]:
    """Run one window of the full length. On a GPU, positions or tokens without an embedding would end the run
    with an assertion on the device, in whichever step the first long window comes.

    Weights that play no part in it, such as XLNet's embedding of masks, are frozen: DDP would wait for their gradients,
    and optimizers have no state for them. Returns notes for the user.
    """
    texts: Any = (*["a"] * (task.texts - 1), "a " * max_length)
    cut = "only_first" if task.texts == 1 else "only_second"
    settings: Any = {"truncation": cut, "max_length": max_length, "return_tensors": "pt", "verbose": False}
    inputs = task.tokenizer(*texts, **settings)
    try:
        output = model.eval()(**inputs)
    except Exception as error:  # whatever the model's code raises
        raise UserError(
            f"the model cannot process a window of {max_length} tokens: {_first_line(error)}. Lower data.max_length, "
            "or use another model or tokenizer"
        ) from None
    reached = _weights_behind([value for value in output.values() if isinstance(value, torch.Tensor)])
    unused = [name for name, weight in model.named_parameters() if weight.requires_grad and weight not in reached]
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    del output, reached  # the graph holds as much memory as a step of training
    notes = [f"not trained, as the model makes no use of them: {listing(unused)}"] if unused else []
    return notes + task.try_out(model)


def _weights_behind(outputs: Sequence[torch.Tensor]) -> set[torch.Tensor]:
    """The tensors that gradients of `outputs` would reach, found without computing any."""
    found: set[torch.Tensor] = set()
    to_visit: list[Any] = [output.grad_fn for output in outputs]
    visited = set(to_visit)
    while to_visit:
        node = to_visit.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):  # where gradients are accumulated
            found.add(node.variable)
        to_visit += [parent for parent, _ in node.next_functions if parent not in visited]
        visited |= {parent for parent, _ in node.next_functions}
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
