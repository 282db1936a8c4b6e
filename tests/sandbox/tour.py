"""The whole guide on the sandbox: each command is printed, then run as a process."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.clients.qdrant.transport import Qdrant
from lib.errors import VerificationFailed
from tests.sandbox.process import PROJECT_ROOT, ServerStartError
from tests.sandbox.stack import COLLECTION, GRAPH, TOKEN, Stack
from tests.sandbox.state import State, state_of

SMALL, LARGE = ("text-embedding-3-small", 768), ("text-embedding-3-large", 3072)
VECTOR_MATCH = "by vector"


@dataclass
class Tour:
    """One run through the guide. `checked` lists what was checked, with its figures."""

    stack: Stack
    backups: Path
    show: Callable[[str], None]
    model: str = SMALL[0]
    size: int = SMALL[1]
    checked: list[tuple[str, str]] = field(default_factory=list)

    def check(self, what: str, figure: object, *, ok: bool = True) -> None:
        """Record a check. Raises VerificationFailed if it is not `ok`."""
        if not ok:
            raise VerificationFailed(f"{what}: {figure}", next_step=f"look at the logs in {self.stack.folder}")
        self.checked.append((what, str(figure)))

    def export(self, model: str, size: int) -> None:
        """Change the settings, as the operator does before the next commands."""
        self.model, self.size = model, size
        self.show(f"\n$ export VECTOR_SIZE={size}\n$ export EMBEDDING_MODEL={model}")

    def environ(self) -> dict[str, str]:
        """Build the environment of a command: this process's, with the sandbox's settings."""
        # The sandbox's AutoMem has its own file: the operator's AutoMem may use another provider.
        automem_env = self.stack.folder / "automem.env"
        automem_env.write_text("EMBEDDING_PROVIDER=openai\n", encoding="utf-8")
        files = {"AUTOMEM_BACKUP_DIR": str(self.backups), "AUTOMEM_ENV_FILE": str(automem_env)}
        return {**os.environ, **self.stack.settings(self.size, self.model), **files}

    def run(self, *words: str, expect: int = 0) -> str:
        """Print a command, run it as the operator would, and return its output."""
        self.show(f"\n$ {shlex.join('python' if word == sys.executable else word for word in words)}")
        done = subprocess.run(words, cwd=PROJECT_ROOT, env=self.environ(), capture_output=True, text=True, check=False)
        self.show((done.stderr + done.stdout).rstrip())
        if done.returncode != expect:
            self.check(f"exit code of {words[-1]}", f"{done.returncode}, expected {expect}", ok=False)
        return done.stdout + done.stderr

    def script(self, name: str, *words: str, expect: int = 0) -> str:
        """Run one of the scripts."""
        return self.run(sys.executable, f"scripts/{name}.py", *words, expect=expect)

    def recall(self, query: str) -> str:
        """Run the guide's recall, as GET: released versions answer 405 to POST. Returns how each result matched."""
        assert self.stack.automem is not None
        url = f"{self.stack.automem.url}/recall"
        parts = ["-G", url, "-H", f"Authorization: Bearer {TOKEN}", "--data-urlencode", f"query={query}"]
        answer = self.curl(*parts, "--data-urlencode", "limit=3")
        found = [
            f"  {one['final_score']:.3f}  {VECTOR_MATCH if one['match_type'] == 'vector' else one['match_type']}"
            f"  {one['memory']['content'][:80]}"
            for one in answer.get("results", [])
        ]
        self.show("\n".join(found))
        return "\n".join(found)

    def curl(self, *words: str) -> dict[str, Any]:
        """Run a curl command of the guide. Returns its JSON answer; the caller shows a part of it."""
        if shutil.which("curl") is None:
            self.check("curl", "is not installed", ok=False)
        command = ["curl", "-sS", *words]
        self.show(f"\n$ {shlex.join(command)}")
        answer = subprocess.run(command, capture_output=True, check=True).stdout
        return dict(json.loads(answer))

    def state(self) -> State:
        """Read the current state of both stores."""
        return state_of(self.stack.falkordb.address, GRAPH, Qdrant(self.stack.qdrant.url), COLLECTION)


def walk(tour: Tour) -> None:
    """Run the whole guide: upgrade, verify, recall, roll back, downgrade. Raises VerificationFailed."""
    before = tour.state()
    archive, rdb = _back_up(tour)
    _fail_fast(tour)
    _upgrade(tour, before)
    _recall(tour)
    _roll_back(tour, before, archive, rdb)
    _downgrade(tour)


def _back_up(tour: Tour) -> tuple[str, str]:
    tour.show("\n# 1. Back up")
    tour.script("backup_automem")
    archive = str(max((tour.backups / "qdrant").glob("*.tar.gz")))
    rdb = str(max((tour.backups / "falkordb").glob("*.rdb")))
    tour.check("backup", "both files, verified, one manifest")
    return archive, rdb


def _fail_fast(tour: Tour) -> None:
    tour.show("\n# 2. New configuration: no command mixes dimensions until the migration is done")
    tour.export(*LARGE)
    text = tour.script("verify_migration", expect=2)
    tour.check("fail-fast, scripts", "exit code 2", ok="VECTOR DIMENSION MISMATCH" in text)
    try:
        tour.stack.start_automem(LARGE[1], LARGE[0])
    except ServerStartError as error:
        tour.check("fail-fast, service", "does not start", ok="VECTOR DIMENSION MISMATCH" in str(error))
    else:
        tour.check("fail-fast, service", "it started", ok=False)
    tour.stack.start_automem(SMALL[1], SMALL[0])


def _upgrade(tour: Tour, before: State) -> None:
    tour.show("\n# 3. Re-embed")
    tour.script("reembed_embeddings", "--dry-run")
    paid = tour.stack.openai.stats()["texts"]
    tour.script("reembed_embeddings")
    tour.show("\n# 4. Verify")
    info = tour.curl(f"{tour.stack.qdrant.url}/collections/{COLLECTION}")["result"]
    vectors = info["config"]["params"]["vectors"]
    tour.show(f".result.config.params.vectors: {json.dumps(vectors)}")
    tour.check("size and distance", json.dumps(vectors), ok=vectors == {"size": tour.size, "distance": "Cosine"})
    tour.script("verify_migration")
    after = tour.state()
    lost = before.keys - after.keys
    tour.check("upgrade to 3072d", f"{after.points} points, {tour.stack.openai.stats()['texts'] - paid} texts paid")
    tour.check("payload keys of the old points", f"{len(before.keys)} preserved, {len(lost)} lost", ok=not lost)
    tour.check("graph untouched by the upgrade", after.graph[:16], ok=after.graph == before.graph)


def _recall(tour: Tour) -> None:
    tour.show("\n# 5. Test recall: the service still runs with the old settings, so it finds by keyword only")
    query = "database decision for the project"
    old = tour.recall(query)
    tour.check("recall before the restart", "no vector match", ok=VECTOR_MATCH not in old)
    tour.show("\n# 6. Restart AutoMem with the new settings (here: the stand-in service)")
    tour.stack.start_automem(tour.size, tour.model)
    new = tour.recall(query)
    tour.check("recall after the restart", "vector matches", ok=VECTOR_MATCH in new)
    tour.script("verify_migration", "--after-restart", "--recall", query)
    tour.check("verified at 3072d", "every check passed")


def _roll_back(tour: Tour, before: State, archive: str, rdb: str) -> None:
    tour.show("\n# Rollback: stop the application, restore both files, revert the configuration, start again")
    tour.stack.stop_automem()
    tour.script("restore_from_backup", archive)
    tour.script("restore_from_backup", rdb)
    after = tour.state()
    tour.check("rollback, graph", f"digest {after.graph[:16]} as before", ok=after.graph == before.graph)
    same = (after.points, after.collection) == (before.points, before.collection)
    tour.check("rollback, collection", f"{after.points} ids, payloads and vectors as before", ok=same)
    tour.export(*SMALL)
    tour.stack.start_automem(tour.size, tour.model)
    tour.script("verify_migration", "--after-restart")
    tour.check("verified at 768d", "every check passed")


def _downgrade(tour: Tour) -> None:
    tour.show("\n# Downgrading: first up again (already paid), back up, then down to 768d")
    tour.export(*LARGE)
    paid = tour.stack.openai.stats()["texts"]
    tour.script("backup_automem")
    tour.script("reembed_embeddings")
    again = tour.stack.openai.stats()["texts"] - paid
    tour.check("3072d again", f"{again} texts paid: all were in the embedding cache", ok=again == 0)
    tour.export(*SMALL)
    tour.script("backup_automem")
    tour.script("reembed_embeddings")
    tour.stack.start_automem(tour.size, tour.model)
    tour.script("verify_migration", "--after-restart")
    tour.check("downgrade to 768d", f"{tour.state().points} points, every check passed")
