"""What a machine and a container report about their memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib import child_process as memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    return tmp_path


def test_without_a_word_nothing_is_known(machine: Path):
    assert memory.free_memory() is None


def test_the_kernels_estimate_counts(machine: Path):
    (machine / "meminfo").write_text("MemTotal:  8000000 kB\nMemFree:  100 kB\nMemAvailable:  2097152 kB\n")
    assert memory.free_memory() == 2 * GIB


@pytest.mark.parametrize(("limit", "free"), [("max", 2 * GIB), (str(GIB), GIB // 2), (str(4 * GIB), 2 * GIB)])
def test_a_containers_limit_counts_if_it_is_lower(machine: Path, limit: str, free: int):
    (machine / "meminfo").write_text("MemAvailable:  2097152 kB\n")
    (machine / "memory.max").write_text(f"{limit}\n")
    (machine / "memory.current").write_text(f"{3 * GIB // 4}\n")
    (machine / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 4}\nactive_file 7\n")
    assert memory.free_memory() == free


def test_a_container_over_its_limit_has_nothing(machine: Path):
    (machine / "memory.max").write_text("1000\n")
    (machine / "memory.current").write_text("5000\n")
    assert memory.free_memory() == 0
