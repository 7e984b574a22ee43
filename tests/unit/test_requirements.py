"""Nothing that an installation takes depends on what is released later: every package is pinned."""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from types import MappingProxyType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = (ROOT / "launch/constraints.txt").read_text()


def pinned() -> dict[str, str]:
    """Return package -> version of launch/constraints.txt."""
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert None not in pins, [line for line, pin in zip(lines, pins, strict=True) if pin is None]
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


@cache
def installed(name: str) -> tuple[str, list[Requirement]]:
    """Return the version of a package, "" where it is not installed, and what it needs."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return "", []
    return found.version, [Requirement(text) for text in found.requires or []]


def closure(requirements: list[str], environment: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return package -> installed version ("" for none) of all that `requirements` need, directly or not; on this
    machine, but for what `environment` says of it."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        versions[name], needs = installed(name)
        for own in {"", *requirement.extras}:
            if (name, own) not in seen:
                seen.add((name, own))
                waiting += [(needed, own) for needed in needs]
    return versions


def wanted() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    build = [*PROJECT["build-system"]["requires"], "setuptools", "wheel"]
    optional = [text for texts in extras.values() for text in texts if not text.startswith("qa_dist[")]
    return [*build, *PROJECT["project"]["dependencies"], *optional]


def test_every_package_that_is_installed_is_pinned():
    versions = closure(wanted())
    if missing := [name for name, version in versions.items() if not version]:
        pytest.skip(f"not all extras are installed: {', '.join(missing)}")
    pins = pinned()
    assert len(versions) > 90
    assert {name: version.partition("+")[0] for name, version in versions.items()} == {
        name: pins.get(name, "not pinned") for name in versions
    }


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("machine", ["Linux x86_64", "Linux aarch64", "Darwin arm64"])
def test_other_pythons_and_machines_take_nothing_that_is_not_pinned(python: str, machine: str):
    system, _, processor = machine.partition(" ")
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_system": system,
        "sys_platform": system.lower(),
        "platform_machine": processor,
    }
    assert not closure(wanted(), environment).keys() - pinned().keys()


def test_what_installs_and_builds_is_pinned():
    assert {"pip", "setuptools", "wheel", "torch", "deepspeed"} <= pinned().keys()


def test_the_pins_satisfy_the_lower_bounds():
    pins = pinned()
    for requirement in map(Requirement, wanted()):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
