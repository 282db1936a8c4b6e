"""backup_automem.py --metrics: what node exporter's textfile collector reads after a backup, and after a failed one."""

from __future__ import annotations

import json
import os
import re
import stat
from datetime import datetime
from pathlib import Path
from unittest.mock import ANY

import pytest

from tests.sandbox.process import free_port

pytestmark = pytest.mark.qdrant
LEVELS = {"checked": 1, "restored": 2}
# https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*",?)*)\} (-?[0-9.e+-]+)')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parsed(path: Path) -> dict[str, dict[str, float]]:
    """The metrics by name; the values of each by its labels but for graph and collection, as text. Strict."""
    found: dict[str, dict[str, float]] = {}
    text = path.read_text()
    assert text.endswith("\n")
    declared = ""
    for line in text.splitlines():
        if comment := re.fullmatch(r"# (HELP|TYPE) (\w+) (.+)", line):
            kind, name, rest = comment.groups()
            assert kind == "HELP" or (rest == "gauge" and name == declared)
            declared = name
            continue
        sample = _SAMPLE.fullmatch(line)
        assert sample, line
        assert sample[1] == declared, "samples of a metric follow its HELP and TYPE"
        labels = dict(_LABEL.findall(sample[2]))
        own = ",".join(value for name, value in labels.items() if name not in {"graph", "collection"})
        assert own not in found.setdefault(declared.removeprefix("automem_backup_"), {})
        found[declared.removeprefix("automem_backup_")][own] = float(sample[3])
    return found


def labels(path: Path) -> set[tuple[tuple[str, str], ...]]:
    """The labels that all samples have in common, as they are written."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {tuple(pair for pair in _LABEL.findall(line) if pair[0] in {"graph", "collection"}) for line in lines}


def test_the_metrics_of_a_backup_and_of_the_failed_ones_after_it(operator, tmp_path):
    operator.load(orphans=3)
    path = tmp_path / "automem.prom"
    operator.run("backup_automem", "--metrics", str(path))
    manifest = json.loads(operator.manifests()[0].read_text())
    first = parsed(path)
    graph, collection = manifest["graph"], manifest["collection"]
    assert 0 < first.pop("last_run_duration_seconds")[""] < 300
    assert first.pop("last_run_exit_code") == {"": 0}
    assert first == {
        "last_success_timestamp_seconds": {"": datetime.fromisoformat(manifest["created"]).timestamp()},
        "last_success_verification_level": {"": min(LEVELS[one["proof"]] for one in (graph, collection))},
        "size_bytes": {"falkordb": graph["file"]["size"], "qdrant": collection["file"]["size"]},
        "graph_nodes": {"": graph["nodes"]},
        "collection_points": {"": collection["points"]},
        "drift_ids": {"falkordb": manifest["drift"]["only_graph"], "qdrant": 3},
    }
    assert labels(path) == {(("graph", operator.graph), ("collection", operator.collection))}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [one.name for one in tmp_path.glob("automem.prom*")] == ["automem.prom"]

    operator.run("backup_automem", "--metrics", str(path), "--no-verify", expect=3)
    assert parsed(path) == {**first, "last_run_duration_seconds": ANY, "last_run_exit_code": {"": 3}}
    operator.call("DELETE", "")
    operator.run("backup_automem", "--metrics", str(path), env={"QDRANT_API_KEY": "s3cret"}, expect=1)
    assert parsed(path) == {**first, "last_run_duration_seconds": ANY, "last_run_exit_code": {"": 1}}
    assert "s3cret" not in path.read_text()


def test_a_backup_of_one_store_has_the_metrics_of_that_store(operator, tmp_path):
    operator.load(40)
    path = tmp_path / "graph.prom"
    operator.run("backup_automem", "--only", "falkordb", "--metrics", str(path))
    found = parsed(path)
    assert set(found["size_bytes"]) == {"falkordb"}
    assert not {"collection_points", "drift_ids"} & set(found)
    assert labels(path) == {(("graph", operator.graph),)}
    operator.run("backup_automem", "--only", "qdrant", "--metrics", str(tmp_path / "collection.prom"))
    assert set(parsed(tmp_path / "collection.prom")["size_bytes"]) == {"qdrant"}
    operator.run("backup_automem", "--metrics", str(path), env={"QDRANT_COLLECTION": "absent"}, expect=1)
    assert set(parsed(path)) == {"last_run_duration_seconds", "last_run_exit_code"}, "there was no backup of both"


@pytest.mark.parametrize("name", ['g"q', "back\\slash", "\u00e9 {x=1}, #"])
def test_names_are_escaped_in_labels(operator, tmp_path, name):
    path = tmp_path / "a.prom"
    operator.export(FALKORDB_GRAPH=name, FALKORDB_PORT=free_port())
    operator.run("backup_automem", "--metrics", str(path), expect=1)
    assert parsed(path)["last_run_exit_code"] == {"": 1}
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    assert labels(path) == {(("graph", escaped), ("collection", operator.collection))}


def test_a_file_that_cannot_be_written_is_reported_before_the_backup_or_as_a_warning(operator, tmp_path):
    operator.load(20)
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)  # as /dev/stdout, which root could replace by a file
    for path in (tmp_path / "absent" / "a.prom", tmp_path, pipe, link):
        refused = operator.run("backup_automem", "--metrics", str(path), expect=2)
        assert f"--metrics {path} cannot be written" in refused.err
    assert not operator.backups.exists()

    (tmp_path / "a.prom.partial").mkdir()
    done = operator.run("backup_automem", "--metrics", str(tmp_path / "a.prom"))
    assert f"warning: the metrics were not written to {tmp_path / 'a.prom'}" in done.err
    assert len(operator.manifests()) == 1
    assert not (tmp_path / "a.prom").exists()


def test_a_link_stays_and_its_file_is_written(operator, tmp_path):
    operator.load(20)
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "a.prom", tmp_path / "there" / "b.prom"
    link.symlink_to(file)
    operator.run("backup_automem", "--metrics", str(link), "--only", "falkordb")
    assert link.is_symlink()
    assert parsed(file)["last_run_exit_code"] == {"": 0}
