"""A collection snapshot read to its end, both levels of tar, as a stream: is it whole, and of what collection?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lib.vectors.collection import vector_params
from lib.vectors.tar_stream import ByteStream, Entry, Section, Sparse, damaged, entries

JSON_LIMIT = 16 * 1024 * 1024
_SMALL_JSON_LIMIT = 1024 * 1024  # of a shard or a segment
_ENTRIES_LIMIT = 100_000

_SEGMENT = re.compile(r"(\d+)/segments/[^/]+\.tar")
_SHARD_JSON = re.compile(r"(\d+)/(replica_state|shard_config)\.json")
_WAL = re.compile(r"\d+/wal/(?:open|closed)-\d+")
_WAL_MAGIC = b"wal"  # a WAL file that begins otherwise kills the collection that it is restored onto
_WHOLE = "the snapshot"
_Vector = tuple[Any, Any]  # size and distance, as segment.json has them
KeepSegment = Callable[[int, "Section | Sparse"], ByteStream]


@dataclass(frozen=True)
class SnapshotFacts:
    """What a snapshot says of its collection.

    `size` and `distance` are of the unnamed vector (or the first named one), `payload_schema` maps a field to its
    type or parameters, `config` is config.json, `shards` maps every shard to the number of its segments here: none
    where another node holds it.
    """

    size: int
    distance: str
    vectors_named: bool
    shard_number: int
    entries: int
    segments: int
    shards: dict[int, int]
    payload_schema: dict[str, Any]
    config: dict[str, Any] = field(repr=False)

    @property
    def absent_shards(self) -> list[int]:
        """The shards whose points are not in this snapshot."""
        return sorted(shard for shard, segments in self.shards.items() if not segments)


def inspect_snapshot(stream: ByteStream, keep: KeepSegment | None = None) -> SnapshotFacts:
    """Read a snapshot from `stream` to the end and say what it is; memory stays flat, nothing is extracted.

    `keep` gets each segment's shard and content, and gives the content back as it passes to be read here.
    Raises BackupDamaged where it is cut, zeroed or not a snapshot, where a segment is empty or of another dimension,
    where a local shard lacks its segments, and for names and types that lead out of an archive. A segment left out
    or bytes changed within a file show in the sha256 and the count of points only.
    """
    survey = _Survey(keep)
    for entry in entries(Section(stream, None, _WHOLE), needs_end=True):
        survey.see(entry)
    return survey.facts()


class _Survey:
    """What was seen of a snapshot so far."""

    def __init__(self, keep: KeepSegment | None) -> None:
        self._keep = keep
        self._names: set[str] = set()
        self._texts: dict[str, bytes] = {}
        self._local: dict[int, bool] = {}  # whether this node holds a replica of the shard
        self._configured: set[int] = set()
        self._segments: list[tuple[int, _Vector | None]] = []

    def see(self, entry: Entry) -> None:
        """Take in one entry, its content included."""
        if entry.name in self._names and entry.is_file:
            raise damaged(_WHOLE, f"holds '{entry.name}' twice")
        self._names.add(entry.name)
        if len(self._names) > _ENTRIES_LIMIT:
            raise damaged(_WHOLE, f"holds more than {_ENTRIES_LIMIT} entries: refused")
        if not entry.is_file:
            return
        if entry.name in {"config.json", "version.info", "payload_index.json"}:
            self._texts[entry.name] = _text(entry.content, entry.name)
        elif match := _SEGMENT.fullmatch(entry.name):
            shard = int(match[1])
            content = self._keep(shard, entry.content) if self._keep else entry.content
            self._segments.append((shard, _segment(content, entry.name)))
        elif match := _SHARD_JSON.fullmatch(entry.name):
            self._see_shard(int(match[1]), match[2], entry)
        elif _WAL.fullmatch(entry.name) and entry.content.read(len(_WAL_MAGIC)) not in {b"", _WAL_MAGIC}:
            raise damaged(_WHOLE, f"holds a WAL that is none ('{entry.name}')")

    def facts(self) -> SnapshotFacts:
        """The result, when all is seen. Raises BackupDamaged for what is missing or does not fit."""
        for name in ("config.json", "version.info"):
            if not self._texts.get(name):
                raise damaged(_WHOLE, f"has no {name}")
        config = _parse_json(self._texts["config.json"], "config.json")
        params = config.get("params")
        if not isinstance(params, dict) or not isinstance(params.get("vectors"), dict):
            raise damaged(_WHOLE, "has a config.json without params.vectors")
        size, distance, named = vector_params(params["vectors"])
        shards = self._shards(params)
        if not named:
            self._check_segments(size, distance)
        schema = (
            _parse_json(self._texts.get("payload_index.json", b"{}"), "payload_index.json").get("schema") or {}
        )
        return SnapshotFacts(
            size=size,
            distance=distance,
            vectors_named=named,
            shard_number=int(params.get("shard_number") or len(shards)),
            entries=len(self._names),
            segments=len(self._segments),
            shards=shards,
            payload_schema=dict(schema),
            config=config,
        )

    def _see_shard(self, shard: int, kind: str, entry: Entry) -> None:
        content = _parse_json(_text(entry.content, entry.name, _SMALL_JSON_LIMIT), entry.name)
        if kind == "replica_state":
            self._local[shard] = bool(content.get("is_local"))
        else:
            self._configured.add(shard)

    def _shards(self, params: dict[str, Any]) -> dict[int, int]:
        held = [shard for shard, _ in self._segments]
        found = self._configured & self._local.keys()
        counted = params.get("shard_number")
        expected = set(range(counted)) if isinstance(counted, int) else found
        if params.get("sharding_method") == "custom":
            expected = found
        missing = sorted((expected | set(held) | self._configured | self._local.keys()) - found)
        if missing or not found:
            raise damaged(_WHOLE, f"lacks shard {missing[0] if missing else 0}")
        for shard, is_local in self._local.items():
            if is_local and shard not in held:
                raise damaged(_WHOLE, f"lacks the segments of shard {shard}")
        return {shard: held.count(shard) for shard in sorted(found)}

    def _check_segments(self, size: int, distance: str) -> None:
        for shard, vector in self._segments:
            if vector is not None and vector != (size, distance):
                raise damaged(_WHOLE, f"holds a segment of another size or distance in shard {shard}")


def _segment(content: ByteStream, name: str) -> _Vector | None:
    """Read a segment's own tar to its end; size and distance of its unnamed vector, None if it has none."""
    where = f"segment {name}"
    state: dict[str, Any] | None = None
    version = False
    for entry in entries(Section(content, None, where), needs_end=False):
        last = entry.name.rsplit("/", 1)[-1]
        if entry.is_file and last == "segment.json":
            text = _text(entry.content, entry.name, _SMALL_JSON_LIMIT)
            state = _parse_json(text, f"segment.json of {name}")
        version = version or (entry.is_file and last == "version.info")
    if state is None or not version:
        raise damaged(where, "is empty, zeroed or cut: its segment.json or version.info is missing")
    try:
        vector = state.get("config", {}).get("vector_data", {}).get("")
        return None if vector is None else (vector.get("size"), vector.get("distance"))
    except AttributeError:
        raise damaged(where, "has a segment.json that no server writes") from None


def _text(content: Section | Sparse, name: str, limit: int = JSON_LIMIT) -> bytes:
    pieces, size = [], 0
    while piece := content.read(limit):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise damaged(_WHOLE, f"has a {name} of more than {limit} bytes")
    return b"".join(pieces)


def _parse_json(text: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise damaged(_WHOLE, f"has a {name} that is not a JSON object")
    return value
