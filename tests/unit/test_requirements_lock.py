"""requirements.lock: hashed, complete, and in step with the files that list what is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SYSTEMS = (
    {"sys_platform": "linux", "platform_machine": "x86_64"},
    {"sys_platform": "darwin", "platform_machine": "arm64"},
)
_ENTRY = re.compile(r"^(\S.*?) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)


@pytest.fixture(scope="module")
def locked() -> list[Requirement]:
    return [Requirement(found[1]) for found in _ENTRY.finditer(LOCK.read_text())]


def needed(name: str) -> Iterator[Requirement]:
    """The requirements of a file, and of those that it names with -r."""
    for line in (ROOT / name).read_text().splitlines():
        words = line.partition("#")[0].strip()
        if words.startswith("-r "):
            yield from needed(words[3:])
        elif words:
            yield Requirement(words)


def environment(python: str, system: dict[str, str]) -> dict[str, str]:
    return {"python_version": python, "python_full_version": f"{python}.9", "extra": "", **system}


def applies(marker: Marker | None, where: dict[str, str]) -> bool:
    return marker is None or marker.evaluate(where)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system["sys_platform"])
@pytest.mark.parametrize("python", PYTHONS)
def test_each_requirement_is_locked_once_at_a_version_that_it_allows(locked, python, system):
    where = environment(python, system)
    for wanted in needed("requirements-dev.txt"):
        if not applies(wanted.marker, where):
            continue
        name = canonicalize_name(wanted.name)
        found = [one for one in locked if canonicalize_name(one.name) == name and applies(one.marker, where)]
        assert len(found) == 1, wanted
        (pin,) = found[0].specifier
        assert pin.operator == "=="
        assert wanted.specifier.contains(pin.version), f"make lock: {wanted}, locked {pin}"


def test_what_the_locked_packages_need_is_locked_too(locked):
    """The installed versions; with hashes, pip refuses packages that are not in the file."""
    here = {canonicalize_name(one.name) for one in locked if applies(one.marker, {"extra": ""})}
    missing = set()
    for name in here:
        try:
            needs = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:  # installed otherwise than by `make venv`
            continue
        missing |= {canonicalize_name(one.name) for one in needs if applies(one.marker, {"extra": ""})} - here
    assert missing == set()


def test_every_line_is_a_hashed_entry_and_names_no_index(locked):
    text = LOCK.read_text()
    left = _ENTRY.sub("", text)
    assert [line for line in left.splitlines() if line and not line.startswith("#")] == []
    assert len(locked) > 100
    assert "://" not in text
    assert "--index" not in text


def test_floors_are_past_known_holes():
    floors = {canonicalize_name(one.name): str(one.specifier) for one in needed("requirements.txt")}
    assert floors["requests"] == ">=2.32.4"  # CVE-2024-47081: credentials of ~/.netrc to another host
    assert floors["urllib3"] == ">=2.6.3"  # CVE-2025-66418 and its like: compressed answers without bound


def test_the_lock_is_what_is_installed():
    assert "--require-hashes -r requirements.lock" in (ROOT / "Makefile").read_text()
