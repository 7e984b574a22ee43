"""What is known of a model before its weights are read: where it is, its config, and in which direction it reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from qa_dist.config import ModelConfig
from qa_dist.errors import UserError

SECONDS_TO_REACH_THE_HUB = 5.0
BIDIRECTIONAL_LANGUAGE_MODELS = {"xlnet"}
"""Types that transformers lists with a head for the next token only, and whose tokens see each other all the same."""


def pretrained_config(settings: ModelConfig) -> PretrainedConfig:
    """Return the config of the model that `model.name` names. Raises `UserError` where there is none."""
    name = settings.name
    assert name is not None
    require_model(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # whatever a config that came from elsewhere makes transformers raise
        raise UserError(_not_loaded("model.name", name, _first_line(error))) from None


def require_model(name: str) -> None:
    """Raise `UserError` unless `model.name` is a directory with a model, or an id on a Hub that answers."""
    if not Path(name).is_dir():
        require_reachable("model.name", name, ("config.json",))
    elif not (Path(name) / "config.json").is_file():
        hint = f"; did you mean {Path(name) / 'model'}?" if (Path(name) / "model" / "config.json").is_file() else ""
        raise UserError(f"model.name: {name} holds no config.json, so it is not a model directory{hint}")


def require_reachable(key: str, name: str, files: Sequence[str]) -> None:
    """Raise `UserError` unless `name` is a directory, or an id on the Hub that is cached or whose Hub answers.

    `key` is the setting that `name` is the value of; one of `files` is in the cache if it was loaded before. The Hub is
    asked once, for a few seconds. Transformers would ask again and again for each file that a model may have, and
    report that the last of them is missing.
    """
    if Path(name).is_dir():
        return
    if looks_like_path(name):
        raise UserError(f"{key}: {name}: there is no such directory")
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return
        if constants.HF_HUB_OFFLINE:
            reason = f"it is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set"
        else:
            get_session().head(hf_hub_url(name, files[0]), timeout=SECONDS_TO_REACH_THE_HUB)
            return
    except HFValidationError:
        raise UserError(f"{key}: {name}: there is no such directory, and no id on the Hub looks like this") from None
    except Exception as error:  # whatever the client for HTTP raises
        reason = f"the Hub ({constants.ENDPOINT}) cannot be reached: {_first_line(error)}"
    raise UserError(_not_loaded(key, name, reason))


def _not_loaded(key: str, name: str, reason: str) -> str:
    return (
        f"{key}: {name!r} cannot be loaded: there is no such directory here ({Path(name).absolute()}), and as an id on "
        f"the Hub (such as google-bert/bert-base-cased) {reason}. Correct the name, or point {key} at a directory"
        if not Path(name).is_dir()
        else f"{key}: {name!r} cannot be loaded: {reason}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")


def looks_like_path(name: str) -> bool:
    """Return whether `name` can only be meant as a directory, not as an id on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def is_causal(settings: ModelConfig) -> bool:
    """Return whether the tokens of the model that `settings` describe see only those before them.

    Raises `UserError` where `model.name` is no model. A `model.config` that is invalid is not causal: building the
    model reports it.
    """
    if settings.name is not None:
        return reads_left_to_right(pretrained_config(settings))
    values: dict[str, Any] = dict(settings.config or {})
    try:
        return reads_left_to_right(AutoConfig.for_model(values.pop("model_type", None), **values))
    except Exception:  # each config class validates its values in its own way
        return False


def reads_left_to_right(model_config: PretrainedConfig) -> bool:
    """Return whether a model's tokens see only those before them, so that nothing a text holds depends on what follows.

    By the type: decoders are those that transformers lists as models for the next token and not for masked ones. The
    configs of some types switch it on or off.
    """
    if model_config.is_encoder_decoder or getattr(model_config, "is_causal", None) is False:
        return False
    if getattr(model_config, "is_decoder", False) or getattr(model_config, "causal", False):
        return True
    kind = model_config.model_type
    code = getattr(model_config, "auto_map", None) or {}  # of types that transformers does not know
    next_token = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in code
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or "AutoModelForMaskedLM" in code
    return next_token and not masked and kind not in BIDIRECTIONAL_LANGUAGE_MODELS
