"""Nothing that an installation takes depends on what is released later: every package is pinned."""

import re
import tomllib
from importlib.metadata import distribution

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


def closure(requirements: list[str]) -> dict[str, str]:
    """Return package -> installed version of all that `requirements` need on this machine, directly or not."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        installed = distribution(name)
        versions[name] = installed.version
        for own in {"", *requirement.extras}:
            if (name, own) not in seen:
                seen.add((name, own))
                waiting += [(Requirement(text), own) for text in installed.requires or []]
    return versions


def wanted() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    build = [*PROJECT["build-system"]["requires"], "setuptools", "wheel"]
    return [*build, *PROJECT["project"]["dependencies"], *(text for texts in extras.values() for text in texts)]


def test_every_package_that_is_installed_is_pinned():
    try:
        versions = closure(wanted())
    except ModuleNotFoundError as error:
        pytest.skip(f"not all extras are installed: {error}")
    pins = pinned()
    assert len(versions) > 90
    assert {name: version.partition("+")[0] for name, version in versions.items()} == {
        name: pins.get(name, "not pinned") for name in versions
    }


def test_what_installs_and_builds_is_pinned():
    assert {"pip", "setuptools", "wheel", "torch", "deepspeed"} <= pinned().keys()


def test_the_pins_satisfy_the_lower_bounds():
    pins = pinned()
    for requirement in map(Requirement, wanted()):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
