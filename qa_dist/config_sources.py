"""From YAML files and command-line flags to a `RunConfig`, with every problem reported at once.

A `Source` is a nested dictionary of settings that knows where each one was written. `resolve` lays sources
over each other, later ones winning, validates the result as a whole, and names for each problem the key, the
value, the place and the remedy.
"""

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qa_dist.config import RunConfig, Section
from qa_dist.errors import UserError
from qa_dist.installed import shipped_configs


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the settings."""

    keys: tuple[str, ...]
    """The dotted keys it is about."""
    message: str
    """What is wrong and what to do."""


class ConfigError(UserError):
    """The settings cannot be used; carries every problem that was found."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  - {problem.message}" for problem in problems)
        super().__init__(f"{count} with the settings:\n{lines}")


@dataclasses.dataclass
class Source:
    """Settings from one origin."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Nested settings, as written."""
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    """Dotted key -> where it was written, for messages."""
    problems: list[Problem] = dataclasses.field(default_factory=list)
    """What is wrong with the source itself."""

    def put(self, key: str, value: Any, place: str) -> None:
        """Set a dotted `key`."""
        *parents, leaf = key.split(".")
        node = self.values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
        self.places[key] = place


# ---------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML takes `1e-5` for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.[\d_]+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
# Integers stay integers: their resolver has to be asked before the one for floats.
_Loader.yaml_implicit_resolvers = {
    first: sorted(resolvers, key=lambda item: item[0] == "tag:yaml.org,2002:float")
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def settings_file(name: str) -> Path:
    """Return the file that `--config` names: a path, or the name of a file in configs/ without `.yaml`."""
    path, shipped = Path(name), shipped_configs() / f"{name}.yaml"
    return shipped if not path.exists() and path.name == name and shipped.is_file() else path


def from_yaml(path: Path) -> Source:
    """Read a YAML file; what is wrong with the file is in the source's problems."""
    source = Source()

    def problem(message: str, line: int | None = None, key: str | None = None) -> None:
        keys = () if key is None else (key,)  # none: what the file would have set is not known
        source.problems.append(Problem(keys, f"{path}{f':{line}' if line else ''}: {message}"))

    def walk(node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        own = [str(key.value) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        loader.flatten_mapping(node)  # merges: <<: *anchor, which the mapping's own keys follow
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if "." in key or not isinstance(key_node, yaml.ScalarNode):
                section, _, rest = key.partition(".")
                problem(f"{key} is not a key; write `{section}:` and below it, indented, `{rest or '…'}:`", line, key)
                continue
            if key in result and own.count(key) > 1:
                problem(f"{prefix}{key} is set twice; keep one of them", line, prefix + key)
            source.places[prefix + key] = f"{path}:{line}"
            if isinstance(value_node, yaml.MappingNode):
                result[key] = walk(value_node, f"{prefix}{key}.")
            else:
                result[key] = loader.construct_object(value_node, deep=True)
        return result

    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            source.values = walk(root, "")
        elif root is not None:
            problem("a config is a mapping of sections (data:, model:, train:, …), not a list or a text")
    except FileNotFoundError:
        problem("no such config file; check the path")
    except OSError as error:
        problem(f"cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        problem("is not UTF-8 text")
    except (ValueError, RecursionError) as error:  # an impossible date, a number of 5,000 digits, a loop of anchors
        problem(f"holds a value that cannot be read ({type(error).__name__}: {error})")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem(f"is not YAML: {getattr(error, 'problem', None) or error}", mark.line + 1 if mark else None)
    return source


# ------------------------------------------------------------------------------------------------- flags


def leaves(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field)."""
    for name, field in section.model_fields.items():
        if inner := _section_of(field):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _section_of(field: FieldInfo) -> type[Section] | None:
    candidates = [field.annotation, *typing.get_args(field.annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _takes_several(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is tuple


def _metavar(field: FieldInfo) -> str:
    def name(annotation: Any) -> str:
        if typing.get_origin(annotation) is Literal:
            return "|".join(map(str, typing.get_args(annotation)))
        if typing.get_origin(annotation) is Annotated:
            inner, *about = typing.get_args(annotation)
            return next((text for text in about if isinstance(text, str)), None) or name(inner)
        if typing.get_origin(annotation) is dict:
            return "JSON"
        if typing.get_origin(annotation) is tuple:
            return f"{name(typing.get_args(annotation)[0])} ..."
        if args := [a for a in typing.get_args(annotation) if a is not type(None)]:
            return "|".join(map(name, args))
        return {bool: "true|false", str: "TEXT", Path: "PATH"}.get(annotation) or annotation.__name__.upper()

    return name(field.annotation)


def default_text(field: FieldInfo) -> str:
    """A setting's default for help texts and tables."""
    default = field.get_default(call_default_factory=True)
    return "none" if default in (None, (), {}) else str(default).lower() if isinstance(default, bool) else str(default)


@functools.cache
def _flags_of(section: type[Section], extra: tuple[tuple[str, str], ...] = ()) -> type:
    """A dataclass like `section` whose leaves are unparsed texts: tyro gives the help and reads the command
    line, and all validation stays in one place."""
    fields: list[tuple[str, Any, Any]] = [
        (name, Annotated[str | None, tyro.conf.arg(help=text, metavar="PATH", help_behavior_hint="")], None)
        for name, text in extra
    ]
    for name, field in section.model_fields.items():
        if inner := _section_of(field):
            flags = _flags_of(inner)
            fields.append((name, flags, dataclasses.field(default_factory=flags)))
        else:
            text = " ".join((field.description or "").split())
            annotation = tyro.conf.arg(
                help=text, metavar=_metavar(field), help_behavior_hint=f"(default: {default_text(field)})"
            )
            texts = tuple[str, ...] if _takes_several(field) else str
            fields.append((name, Annotated[texts | None, annotation], None))
    flags = dataclasses.make_dataclass(section.__name__, fields)
    flags.__doc__ = section.__doc__
    return flags


def from_flags(
    args: Sequence[str], prog: str, description: str, extra: dict[str, str]
) -> tuple[Source, dict[str, str | None]]:
    """Read dotted flags (`--train.epochs 3`), and the `extra` path options of the command (name -> help).

    Returns the settings and the extra options. `--help` and a flag without its value end the process.
    """
    source = Source()
    # `--model DIR` is what everybody types.
    args = [re.sub(r"^--model(?=$|=)", "--model.name", arg) for arg in args]
    flags = _flags_of(RunConfig, tuple(extra.items()))
    parsed, unknown = tyro.cli(
        flags, args=args, prog=prog, description=description, return_unknown_args=True, use_underscores=True
    )
    options = {name: getattr(parsed, name) for name in extra}
    for key, field in leaves():
        value = functools.reduce(getattr, key.split("."), parsed)
        if value is not None:
            source.put(key, _from_text(value, field), f"--{key} on the command line")
    known = [key for key, _ in leaves()] + list(extra)
    previous_was_flag = False
    for arg in unknown:
        if arg.startswith("--"):
            key = arg[2:].split("=")[0].replace("-", "_")
            source.problems.append(Problem((key,), f"--{key}: there is no such setting{_suggest(key, known)}"))
        elif not previous_was_flag:
            source.problems.append(Problem((arg,), f"{arg!r}: unexpected; settings are given as --section.key value"))
        previous_was_flag = arg.startswith("--") and "=" not in arg
    return source, options


def _from_text(text: str | tuple[str, ...], field: FieldInfo) -> Any:
    if isinstance(text, tuple):
        return list(text)
    optional = type(None) in typing.get_args(field.annotation)
    if optional and text.lower() in ("none", "null"):
        return None
    if "dict" in str(field.annotation):
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError:
            return text
    return text


def _suggest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    close = close or [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f"; did you mean {close[0]}?" if close else "; `qa-dist train --help` lists them all"


# ----------------------------------------------------------------------------------------------- resolving

Check = Callable[[RunConfig], list[Problem]]


def resolve(sources: Sequence[Source], checks: Sequence[Check] = ()) -> RunConfig:
    """Lay `sources` over each other, later ones winning, and validate the whole.

    `checks` look at settings together; they run even when single values are wrong, so that everything is
    reported in one go. Raises `ConfigError`.
    """
    problems = [problem for source in sources for problem in source.problems]
    places = {key: place for source in sources for key, place in source.places.items()}
    values: dict[str, Any] = {}
    for source in sources:
        _merge(values, source.values)
    config, wrong = _validate(values, places)
    problems += wrong
    wrong_keys = {key for problem in wrong for key in problem.keys}
    for check in checks:
        problems += [problem for problem in check(config) if not wrong_keys.intersection(problem.keys)]
    if problems:
        raise ConfigError(problems)
    return config


def _merge(target: dict[str, Any], update: dict[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = _copy(value)


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _validate(values: dict[str, Any], places: dict[str, str]) -> tuple[RunConfig, list[Problem]]:
    """The config without what is wrong (so that further checks can run), and what is wrong."""
    problems: list[Problem] = []
    known = [key for key, _ in leaves()]
    for _ in range(len(known) + 1):  # every round removes at least one setting
        try:
            return RunConfig.model_validate(values), problems
        except ValidationError as error:
            for item in error.errors():
                path = [str(part) for part in item["loc"]]
                # pydantic appends the union's branch to the path: keep what stands in the settings
                while len(path) > 1 and not _remove(values, path, dry=True):
                    path.pop()
                key = ".".join(path)
                place = places.get(key, "default")
                problems.append(Problem((key,), f"{place}: {_explain(key, item, known)}"))
            for problem in problems:
                _remove(values, problem.keys[0].split("."))
    raise AssertionError("validation does not end")


def _remove(values: dict[str, Any], path: Sequence[str], dry: bool = False) -> bool:
    node: Any = values
    for part in path[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    found = isinstance(node, dict) and path[-1] in node
    if found and not dry:
        del node[path[-1]]
    return found


def _explain(key: str, item: Any, known: Sequence[str]) -> str:
    if item["type"] == "extra_forbidden":
        sections = sorted({k.rsplit(".", 1)[0] for k in known if "." in k})
        return f"{key}: there is no such setting{_suggest(key, [*known, *sections])}"
    value = item["input"]
    fields = dict(leaves())
    expected = f"; it takes {_metavar(fields[key])}" if key in fields else ""
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"{key}: {value!r} is not a section; write its settings as `key: value` lines below it"
    return f"{key}: {value!r} is not valid: {item['msg'][0].lower()}{item['msg'][1:]}{expected}"


def to_yaml(config: RunConfig) -> str:
    """The complete config as YAML, in the order of the model."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def reference() -> str:
    """All settings as a Markdown table."""
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key, field in leaves():
        text = " ".join((field.description or "").split())
        takes = _metavar(field).replace("|", "\\|")
        rows.append(f"| `{key}` | {takes} | {default_text(field)} | {text} |")
    return "\n".join(rows) + "\n"
