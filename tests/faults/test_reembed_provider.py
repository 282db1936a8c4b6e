"""The provider fails in every way while the real command runs: exit code, embedding cache, collection and bill."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from lib.clients.embeddings.cache import SUM_BYTES
from tests.matrix import matrix
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, Operator, Result
from tests.reembed_support import Points, assert_migrated, embeddable, points_of, upgrade
from tests.sandbox.vectors import vectors_for

pytestmark = pytest.mark.qdrant

BATCH, WORKERS = 10, 4
MEMORIES = 120
PACE = ("--batch-size", str(BATCH), "--workers", str(WORKERS))
# The script with shorter timeouts: a request of a second is late, eight seconds of failures count as ten minutes.
_SHORT_TIMEOUTS = """
from lib.clients.embeddings import client
client.EmbeddingClient.__init__.__kwdefaults__.update(timeout_seconds={timeout}, max_wait_seconds={max_wait})
client.FIRST_PAUSE_SECONDS, client.LONGEST_PAUSE_SECONDS = 0.02, 0.2
"""


@dataclass
class Rig:
    operator: Operator
    before: Points
    url: str = ""
    timeout: float = 20.0
    max_wait: float = 8.0

    @property
    def openai(self):
        return self.operator.servers.openai

    def reembed(self, *words: str, expect: int) -> Result:
        short_timeouts = _SHORT_TIMEOUTS.format(timeout=self.timeout, max_wait=self.max_wait)
        url = {"OPENAI_BASE_URL": self.url} if self.url else {}
        process = self.operator.start("reembed_embeddings", *PACE, *words, prelude=short_timeouts, **url)
        out, err = process.communicate(timeout=300)
        assert process.returncode == expect, f"exit {process.returncode}\n{err}\n{out}"
        assert "Traceback" not in err, err
        return Result(process.returncode, out, err)

    def cached(self) -> int:
        """How many vectors the embedding cache holds; checks that each is the endpoint's vector of its text."""
        folder = self.operator.backups / "embeddings"
        plan = next(folder.glob(f"{self.operator.collection}-*.sqlite3"))
        with contextlib.closing(sqlite3.connect(plan)) as db:
            db.execute("ATTACH DATABASE ? AS bought", [str(folder / "vectors.sqlite3")])
            total = db.execute("SELECT count(*) FROM bought.vectors").fetchone()[0]
            found = db.execute(
                "SELECT DISTINCT m.content, v.vector FROM memories m JOIN bought.vectors v ON v.key = m.key"
            ).fetchall()
        assert len(found) == total
        if found:
            stored = np.vstack([np.frombuffer(blob[:-SUM_BYTES], "<f4") for _, blob in found])
            assert np.array_equal(stored, vectors_for(LARGE, [text for text, _ in found], NEW_SIZE))
        return total

    def assert_untouched(self) -> None:
        after = points_of(self.operator)
        assert after.keys() == self.before.keys()
        assert all((after[one][1] == vector).all() for one, (_, vector) in self.before.items())
        assert self.operator.info()["config"]["params"]["vectors"]["size"] == OLD_SIZE
        assert self.operator.collections() == [self.operator.collection]

    def assert_done(self, *, but: set = frozenset()) -> None:
        assert_migrated(self.operator, self.before, but=but)
        self.cached()


@pytest.fixture
def rig(operator) -> Rig:
    operator.load(MEMORIES)
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    operator.servers.openai.reset()
    return Rig(operator, points_of(operator))


# --- temporary faults -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passing:
    """A fault that ends, and how many texts it may make the run pay for twice."""

    fault: dict
    paid_twice: int = 0
    timeout: float = 20.0


PASSING = {
    "a storm of 429s": Passing({"status": 429, "code": "rate_limit_exceeded", "retry_after": 0.05, "times": 40}),
    "429s that do not say how long": Passing({"status": 429, "after": 2, "times": 2}),
    "500s": Passing({"status": 500, "after": 2, "times": 12}),
    "503s from the first request": Passing({"status": 503, "times": 6}),
    "a proxy's 200 with a 502 in it": Passing({"status": 200, "code": 502, "after": 2, "times": 4}),
    "timeouts": Passing({"hang_seconds": 40, "after": 2, "times": 3}, paid_twice=3 * BATCH, timeout=6.0),
    "half an answer": Passing({"cut": 0.5, "after": 1, "times": 4}, paid_twice=4 * BATCH),
    "headers and no answer": Passing({"cut": 0.0, "after": 1, "times": 4}, paid_twice=4 * BATCH),
    "too few vectors": Passing({"wrong_count": True, "after": 2, "times": 3}, paid_twice=3 * BATCH),
    "no index that is 0": Passing({"omit_zero": True}),
    "NaN": Passing({"nan": True, "after": 2, "times": 3}, paid_twice=3 * BATCH),
    "vectors of another length": Passing({"not_unit": 2.0, "after": 2, "times": 3}, paid_twice=3 * BATCH),
    "another order": Passing({"wrong_order": True}),
    "lists of numbers": Passing({"no_base64": True}),
    "no announced limits": Passing({"no_headers": True}),
}


@pytest.mark.parametrize("name", matrix(PASSING, "too few vectors"))
def test_what_passes_costs_time_alone(rig, name):
    case = PASSING[name]
    rig.timeout, rig.max_wait = case.timeout, 120.0
    rig.openai.fault(**case.fault)
    done = rig.reembed("--json", expect=0)
    assert done.json["refused"] == []
    rig.assert_done()
    stats = rig.openai.stats()
    assert stats["paid_twice"] <= case.paid_twice
    assert done.json["bought"]["texts"] == stats["distinct_texts"]


# --- permanent faults -------------------------------------------------------------------------------------------

QUOTA = [
    "insufficient_quota",
    "credit_balance_exhausted",
    "organization_usage_limit_exceeded",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
]
LASTING = {
    **{code: ({"status": 429, "code": code}, 6, code) for code in QUOTA},
    "quota as a type": ({"status": 429, "error_type": "insufficient_quota"}, 6, "insufficient_quota"),
    "401 mid-way": ({"status": 401, "code": "invalid_api_key"}, 6, "invalid_api_key"),
    "402": ({"status": 402, "message": "out of credit"}, 6, "out of credit"),
    "403": ({"status": 403, "code": "unsupported_country"}, 6, "unsupported_country"),
    "a model that is gone": ({"status": 404, "code": "model_not_found"}, 6, "model_not_found"),
    "429s without end": ({"status": 429, "retry_after": 0.3}, 6, "Rate limit exceeded during re-embedding"),
    "a rate limit of an hour": ({"status": 429, "retry_after": 3600}, 6, "Rate limit exceeded"),
    "500s without end": ({"status": 500}, 6, "no good answer"),
    "only NaN from now on": ({"nan": True}, 6, "cannot embed even a plain word"),
    "always too few": ({"wrong_count": True}, 6, "cannot embed even a plain word"),
    "400 to everything": ({"status": 400}, 6, "cannot embed even a plain word"),
    "another width": ({"wrong_width": NEW_SIZE // 2}, 2, f"VECTOR_SIZE is {NEW_SIZE}"),
}
PAID_FOR_NOTHING = {"only NaN from now on", "always too few", "another width"}


@pytest.mark.parametrize("name", matrix(LASTING, "401 mid-way"))
def test_lasting_errors_end_the_run_and_preserve_paid_vectors(rig, name):
    fault, code, expected = LASTING[name]
    rig.max_wait = 4.0
    rig.openai.fault(**fault, after=5)
    done = rig.reembed(expect=code)
    assert expected in done.err
    assert "next:" in done.err
    rig.assert_untouched()
    assert rig.cached() == 5 * BATCH
    if name not in PAID_FOR_NOTHING:
        assert rig.openai.stats()["texts"] == 5 * BATCH
    rig.openai.clear_faults()
    before = rig.openai.stats()["paid_twice"]
    rig.reembed(expect=0)
    if name not in PAID_FOR_NOTHING:
        assert rig.openai.stats()["paid_twice"] == before == 0
    rig.assert_done()


def test_a_provider_that_hangs_without_end(rig):
    """Each request that hangs is charged, so few are sent: one per worker, repeated until the timeout."""
    rig.timeout, rig.max_wait = 2.0, 4.0
    rig.openai.fault(hang_seconds=300, after=5)
    done = rig.reembed(expect=6)
    assert "no answer in time" in done.err
    rig.assert_untouched()
    assert rig.cached() == 5 * BATCH


def test_a_wrong_key_from_the_first_request(rig):
    rig.operator.export(OPENAI_API_KEY="sk-wrong-key-of-somebody")
    done = rig.reembed("--json", expect=6)
    assert "sk-wrong" not in done.err + done.out
    assert done.json["exit_code"] == 6
    rig.assert_untouched()
    assert rig.openai.stats()["texts"] == 0


# --- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", matrix([{}, {"nan": True}, {"wrong_count": True}, {"status": 422}, {"status": 500}], {})
)
def test_a_poisoned_row_is_found_and_named_and_all_others_are_there(rig, fault):
    victim = str(min(embeddable(rig.operator), key=str))
    rig.operator.cypher("MATCH (m:Memory {id: $id}) SET m.content = 'poison in here'", id=victim)
    rig.openai.fault(poisoned_text="poison", **fault)
    done = rig.reembed("--json", expect=3)
    assert [one["label"] for one in done.json["refused"]] == [victim]
    assert f"memory {victim} was not embedded" in done.err
    rig.assert_done(but={victim})
    rig.openai.clear_faults()
    rig.reembed("--only-missing", expect=0)
    rig.assert_done()


def test_a_long_memory_is_cut_and_named_before_and_after(rig):
    victim = str(min(embeddable(rig.operator), key=str))
    rig.operator.cypher("MATCH (m:Memory {id: $id}) SET m.content = $text", id=victim, text="long " * 9000)
    dry = rig.reembed("--dry-run", "--json", expect=0)
    assert f"embedded without their end: {victim}" in dry.err
    plan = dry.json["plan"]
    assert plan["too_long"] == [victim]
    done = rig.reembed("--json", expect=0)
    assert done.json["cut"] == [victim]
    assert f"memory {victim} is longer than the model takes" in done.err
    # The announced tokens are the billed ones: those of the cut text, not of the whole one.
    assert plan["tokens"] == rig.openai.stats()["tokens"]


# --- the network ------------------------------------------------------------------------------------------------


@dataclass
class Resetting:
    """A proxy to the endpoint that answers chosen requests with a TCP reset: before they are passed on, or after."""

    port: int
    resets: int
    after_it_was_paid: bool
    hits: int = field(default=0, init=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @contextlib.contextmanager
    def open(self) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=self._accept, args=[listener], daemon=True).start()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=self._serve, args=[near], daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError), near, socket.create_connection(("127.0.0.1", self.port)) as far:
            threading.Thread(target=self._upwards, args=[near, far], daemon=True).start()
            while data := far.recv(65536):
                if self.after_it_was_paid and data.startswith(b"HTTP/1.1") and self._takes():
                    _reset(near)
                    return
                near.sendall(data)

    def _upwards(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                if not self.after_it_was_paid and data.startswith(b"POST") and self._takes():
                    _reset(near)
                    far.shutdown(socket.SHUT_RDWR)
                    return
                far.sendall(data)
            far.shutdown(socket.SHUT_RDWR)

    def _takes(self) -> bool:
        with self._turn:
            self.hits += 1
            return 2 < self.hits <= 2 + self.resets


def _reset(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RD)  # a reader holds it open
    one.close()


@pytest.mark.parametrize("after_it_was_paid", [False, True])
def test_connections_that_are_reset(rig, after_it_was_paid):
    proxy = Resetting(rig.openai.port, resets=6, after_it_was_paid=after_it_was_paid)
    with proxy.open() as rig.url:
        rig.reembed(expect=0)
    assert proxy.hits > 8
    rig.url = ""
    assert rig.openai.stats()["paid_twice"] <= (6 * BATCH if after_it_was_paid else 0)
    after = points_of(rig.operator)
    assert after.keys() == embeddable(rig.operator).keys()
    assert_migrated(rig.operator, rig.before)


def test_every_connection_is_reset(rig):
    rig.max_wait = 2.0
    proxy = Resetting(rig.openai.port, resets=1 << 30, after_it_was_paid=False)
    with proxy.open() as rig.url:
        rig.reembed(expect=6)
    rig.assert_untouched()
    assert rig.cached() == 2 * BATCH
    assert rig.openai.stats()["texts"] == 2 * BATCH
