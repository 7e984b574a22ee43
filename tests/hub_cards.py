"""What the tests' Hub demands of the metadata at the head of a model card."""

import re
from typing import Any

import yaml

from tests.hub_http import Call, Response, route

_MODEL_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Response:
    try:
        metadata = _front_matter(call.json["content"])
        problems = _problems(metadata)
    except yaml.YAMLError as error:
        metadata, problems = None, [f"Invalid YAML: {error}"]
    errors = [{"message": problem} for problem in problems]
    warnings = [] if metadata or errors else [{"message": "empty or missing yaml metadata in repo card"}]
    return Response.json({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def card_data(card: str) -> dict[str, Any]:
    """The metadata as the Hub shows them, which leaves out what it cannot read."""
    try:
        metadata = _front_matter(card)
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _front_matter(card: str) -> Any:
    """The metadata, whatever they are; None where the card has none."""
    match = re.match(r"\s*---[ \t\r]*\n(.*?)^---[ \t\r]*$", card, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(match[1]) if match else None


def _problems(metadata: Any) -> list[str]:
    if metadata is None:
        return []
    if not isinstance(metadata, dict):
        return ["The metadata should be a YAML mapping"]
    problems: list[str] = []
    for key in ("license", "language", "tags", "datasets", "metrics", "base_model"):
        value = metadata.get(key, "")
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            problems.append(f'"{key}" must be a string or an array of strings')
    base_models = metadata.get("base_model", [])
    for base_model in [base_models] if isinstance(base_models, str) else base_models or []:
        if not _MODEL_ID.fullmatch(str(base_model)):
            problems.append(f'"base_model" with value "{base_model}" is not valid. Use a model id from the Hub.')
    return problems + _index_problems(metadata.get("model-index", []))


def _index_problems(index: Any) -> list[str]:
    """`model-index`: names, and results that each say task, dataset and metrics."""
    problems: list[str] = []

    def listed(value: Any, where: str) -> list[tuple[str, Any]]:
        if not isinstance(value, list):
            problems.append(f'"{where}" must be an array')
            return []
        return [(f"{where}[{i}]", element) for i, element in enumerate(value)]

    def field(value: Any, where: str, key: str) -> Any:
        found = value.get(key) if isinstance(value, dict) else None
        if found is None:
            problems.append(f'"{where}.{key}" is required')
        return found

    def text(value: Any, where: str, *keys: str) -> None:
        for key in keys:
            found = field(value, where, key)
            if found is not None and not isinstance(found, str):
                problems.append(f'"{where}.{key}" must be a string')

    for where, model in listed(index, "model-index"):
        text(model, where, "name")
        for at, result in listed(field(model, where, "results"), f"{where}.results"):
            text(field(result, at, "task"), f"{at}.task", "type")
            text(field(result, at, "dataset"), f"{at}.dataset", "type", "name")
            for metric_at, metric in listed(field(result, at, "metrics"), f"{at}.metrics"):
                text(metric, metric_at, "type")
                field(metric, metric_at, "value")
    return problems
