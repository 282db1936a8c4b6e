"""The data directory: the collections and aliases in it, and what a start makes of a damaged one."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import orjson

from tests.sandbox.qdrant_server.collection import Collection, read_config
from tests.sandbox.qdrant_server.request import (
    StartRefused,
    collection_exists,
    collection_missing,
    wrong_input,
)
from tests.sandbox.qdrant_server.settings import Dialect

Json = dict[str, Any]


class Storage:
    """Everything the server holds; its files lie under `folder` as the real server lays them out.

    With `s3` snapshots are listed and sent as from a server that keeps them in S3.
    """

    def __init__(self, folder: Path, dialect: Dialect, *, s3: bool = False) -> None:
        self.folder = folder
        self.s3 = s3
        self.dialect = dialect
        self.collections: dict[str, Collection] = {}
        self.aliases: dict[str, str] = {}  # alias -> collection
        self._lock = threading.RLock()
        self._aliases_file = folder / "aliases" / "data.json"
        for part in ("collections", "snapshots", "aliases"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        (folder / "tmp").mkdir()
        self.peer = self._read_peer()

    def open(self) -> None:
        """Open what lies in the directory. Raises StartRefused where 1.11.3 would not start."""
        if self._aliases_file.exists():
            self.aliases = orjson.loads(self._aliases_file.read_bytes())
        for folder in sorted((self.folder / "collections").iterdir()):
            if (folder / "config.json").exists():
                self._open_collection(folder)

    def _open_collection(self, folder: Path) -> None:
        config, schema = read_config(folder)
        collection = Collection(folder.name, folder, config, self.dialect, self.peer)
        collection.schema = schema
        try:
            collection.open()
        except Exception as error:  # noqa: BLE001  # the engine raises nothing finer
            if self.dialect.refuses_to_start_damaged:
                raise StartRefused(f"Failed to load local shard {folder / '0'}: {error}") from None
            collection.dead = True  # a dirty shard
        self.collections[folder.name] = collection

    def close(self) -> None:
        """Flush and release every collection."""
        for collection in self.collections.values():
            collection.close()

    def names(self) -> list[str]:
        """The collections, without the aliases."""
        return sorted(self.collections)

    def get(self, name: str) -> Collection:
        """The collection of that name or alias; Refusal (404) if there is none."""
        collection = self.collections.get(self.aliases.get(name, name))
        if collection is None:
            raise collection_missing(name)
        return collection

    def exists(self, name: str) -> bool:
        """Whether there is a collection or alias of that name, dead or alive."""
        return self.aliases.get(name, name) in self.collections

    def create(self, name: str, config: Json) -> Collection:
        """An empty collection; Refusal where the name is taken by a collection (409) or an alias (400)."""
        with self._lock:
            if name in self.aliases:
                said = f"Can't create collection with name {name}. Alias with the same name already exists"
                raise wrong_input(said)
            if name in self.collections:
                raise collection_exists(name)
            folder = self.folder / "collections" / name
            shutil.rmtree(folder, ignore_errors=True)
            collection = Collection(name, folder, config, self.dialect, self.peer)
            collection.create()
            self.collections[name] = collection
            return collection

    def delete(self, name: str) -> bool:
        """Drop a collection and its aliases; False where there is none of that very name."""
        with self._lock:
            collection = self.collections.pop(name, None)
            if collection is None:
                return False
            self.aliases = {alias: target for alias, target in self.aliases.items() if target != name}
            self._save_aliases()
            collection.deleted = True
        self.discard(collection)
        return True

    def discard(self, collection: Collection) -> None:
        """Remove what a deleted collection left on disk; waits for the restore or snapshot that holds it."""
        with collection.lock:
            if not collection.discarded:
                collection.discarded = True
                collection.discard(self.scratch(f"deleted-{collection.name}-"))

    def change_aliases(self, actions: list[Json]) -> None:
        """Create, rename and delete aliases; Refusal (404, 409) leaves the actions before it done."""
        with self._lock:
            for action in actions:
                self._change_alias(action)
            self._save_aliases()

    def _change_alias(self, action: Json) -> None:
        if "create_alias" in action:
            made = action["create_alias"]
            if made["collection_name"] not in self.collections:
                raise collection_missing(made["collection_name"])
            if made["alias_name"] in self.collections:
                raise collection_exists(made["alias_name"])
            self.aliases[made["alias_name"]] = made["collection_name"]
        elif "delete_alias" in action:
            self.aliases.pop(action["delete_alias"]["alias_name"], None)
        elif "rename_alias" in action:
            renamed = action["rename_alias"]
            self.aliases[renamed["new_alias_name"]] = self.aliases.pop(renamed["old_alias_name"])

    def alias_rows(self, name: str | None = None) -> list[Json]:
        """The aliases, of one collection or of all."""
        pairs = sorted(self.aliases.items())
        return [{"alias_name": a, "collection_name": c} for a, c in pairs if name is None or c == name]

    def scratch(self, prefix: str) -> Path:
        """A new folder for a snapshot being built or unpacked; leftovers go with the next start."""
        return Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder / "tmp"))

    def snapshot_folder(self, name: str) -> Path:
        """Where the snapshot files of a collection lie, whether it exists or not."""
        return self.folder / "snapshots" / name

    def _save_aliases(self) -> None:
        partial = self._aliases_file.with_suffix(".partial")
        partial.write_bytes(orjson.dumps(self.aliases))
        partial.replace(self._aliases_file)

    def _read_peer(self) -> int:
        path = self.folder / "raft_state.json"
        if not path.exists():
            path.write_bytes(orjson.dumps({"peer_id": secrets.randbits(52)}))
        return int(orjson.loads(path.read_bytes())["peer_id"])
