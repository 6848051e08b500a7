"""What the README's command installs: all of it pinned by constraints.txt."""

import re
from importlib import metadata
from pathlib import Path

import peft
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_transmiter.tuners import registration


ROOT = Path(__file__).parents[1]
LOCK = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]


def installed(requirement: str) -> dict[str, str]:
    """Names and versions of all that a requirement brings, its own dependencies and theirs."""
    found, waiting = {}, [Requirement(requirement)]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            pytest.fail(f"{name} is required and not installed")
        known = found.setdefault(name, set())
        extras = {"", *wanted.extras} - known
        known |= extras
        for line in package.requires or () if extras else ():
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)
    return {name: metadata.version(name) for name in found if name != "hf-transmiter"}


def pins(name: str) -> list[Requirement]:
    """Lines of the lock about a package that apply to this Python and platform."""
    return [
        line
        for line in LOCK
        if canonicalize_name(line.name) == name and (line.marker is None or line.marker.evaluate())
    ]


def test_everything_that_is_installed_is_pinned():
    for name in ("torch", "transformers", "peft", "pillow", "pytest"):
        if not all(metadata.version(name) in pin.specifier for pin in pins(name)):
            pytest.skip(f"not installed with constraints.txt: {name} {metadata.version(name)}")
    found = installed("hf-transmiter[test]")
    assert {"torch", "transformers", "peft", "numpy", "pytest", "markupsafe"} <= found.keys()
    # A build of torch for CPUs needs none of the CUDA packages; those are pinned all the same.
    assert any(line.name.startswith("nvidia-") for line in LOCK)
    assert {name: len(pins(name)) for name in found} == dict.fromkeys(found, 1)


def test_every_line_of_the_lock_is_one_version():
    assert len(LOCK) > 100
    for line in LOCK:
        assert re.fullmatch(r"==[^,*]+", str(line.specifier)), line


def test_the_lock_is_within_the_ranges_of_the_package():
    for line in metadata.distribution("hf-transmiter").requires:
        wanted = Requirement(line)
        if wanted.name == "hf-transmiter" or wanted.name in ("open-clip-torch", "ray"):
            continue
        found = [pin for pin in LOCK if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
        assert found, f"{wanted.name} is not in constraints.txt: run .ci/lock"
        for pin in found:
            assert str(pin.specifier).removeprefix("==") in wanted.specifier, f"{pin}: run .ci/lock"


@pytest.mark.parametrize("owner, name", [(owner, name) for owner, names in registration._INTERNALS for name in names])
def test_a_peft_without_what_registration_needs_is_named_at_import(owner, name, monkeypatch):
    registration.check_peft()
    monkeypatch.delattr(owner, name)
    if hasattr(owner, name):  # a base class of its own has it too
        pytest.skip("inherited")
    with pytest.raises(ImportError, match=rf"peft {peft.__version__}, which has no \S+\.{name}: install a pair that"):
        registration.check_peft()
