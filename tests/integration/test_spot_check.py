"""`--limit N`: a sample next to the live collection, compared with it, and nothing left of it."""

from __future__ import annotations

import json
from base64 import b64encode
from itertools import pairwise
from urllib.parse import urlsplit

import pytest
import requests

from lib.journal import open_journals
from tests.faulty_proxy import Fault, FaultyProxy, answer
from tests.http_proxy import HttpProxy, Request
from tests.kill_support import run_killed
from tests.matrix import matrix
from tests.operator_support import LARGE, NEW_SIZE, SMALL
from tests.reembed_support import embeddable, points_of, upgrade

pytestmark = pytest.mark.qdrant


def journals(operator, command="spot_check"):
    return sorted(operator.backups.glob(f"journal_*_{command}.jsonl"))


def same_points(left, right):
    return left.keys() == right.keys() and all(
        left[one][0] == right[one][0] and (left[one][1] == right[one][1]).all() for one in left
    )


@pytest.mark.matrix
def test_a_sample_is_compared_and_leaves_only_cached_vectors(operator):
    operator.load(240)
    upgrade(operator)
    before, openai = points_of(operator), operator.servers.openai
    openai.reset()
    done = operator.run("reembed_embeddings", "--limit", "40", "--json").json
    assert (done["memories"], done["points"]) == (40, 40)
    recall = done["recall"]
    assert recall["queries"] == 40
    assert recall["neighbours"] == 10
    # Both models rate texts by shared words; random results would agree in a quarter.
    assert 0.5 < recall["overlap"] <= 1
    assert 0 < recall["live_score"] <= 1
    assert 0 < recall["side_score"] <= 1
    assert openai.stats()["texts"] == done["bought"]["texts"] <= 40
    assert operator.collections() == [operator.collection]
    assert same_points(points_of(operator), before)
    assert operator.info()["config"]["params"]["vectors"]["size"] != NEW_SIZE
    assert [path.name for path in (operator.backups / "embeddings").glob("*check*")] == []
    assert "removed" in journals(operator)[0].read_text().splitlines()[-1]
    operator.run("backup_automem")
    operator.run("reembed_embeddings")
    stats = openai.stats()
    assert stats["paid_twice"] == 0
    assert points_of(operator).keys() == embeddable(operator).keys()


def upgraded(operator) -> tuple[str, int]:
    """Load memories and ask for the new size. Returns Qdrant's host and port."""
    operator.load(30)
    upgrade(operator)
    url = urlsplit(operator.servers.qdrant_url)
    return url.hostname, url.port


class Gateway(HttpProxy):
    """A gateway in front of Qdrant that asks for a login, and repeats it if it is `broken`."""

    broken = False

    def open(self) -> None:
        pass

    def answer(self, request: Request, body: bytes) -> None:
        login = f"Basic {b64encode(b'me:s3cret').decode()}"
        if request.headers["Authorization"] != login:
            request.reply(401, [], b"")
        elif self.broken and request.path.endswith("/points/query"):
            request.reply(500, [], b"me:s3cret\nfailed")
        else:
            request.reply(*request.forward(body))


def test_its_searches_go_the_way_of_all_requests(operator):
    """With the login of QDRANT_URL, and through no proxy to this machine: it would get the key."""
    with Gateway(*upgraded(operator)) as gateway:
        through = {"QDRANT_URL": gateway.url.replace("//", "//me:s3cret@"), "HTTP_PROXY": "http://127.0.0.1:1"}
        done = operator.run("reembed_embeddings", "--limit", "5", "--json", env=through).json
        assert done["recall"]["queries"] == 5
        gateway.broken = True
        failed = operator.run("reembed_embeddings", "--limit", "5", env=through, expect=1)
    assert "answered 500: ***:***\\nfailed" in failed.err


class Forgetting(HttpProxy):
    """AutoMem deletes the memories just before they are searched for."""

    def open(self) -> None:
        pass

    def answer(self, request: Request, body: bytes) -> None:
        if request.path.endswith("/points/query"):
            ids = json.loads(body)["filter"]["must"][0]["has_id"]
            path = request.path.replace("/query", "/delete?wait=true")
            headers = {"Content-Type": "application/json"}
            url = f"http://{self.target[0]}:{self.target[1]}{path}"
            requests.post(url, json={"points": ids}, headers=headers, timeout=60).raise_for_status()
        request.reply(*request.forward(body))


def test_points_that_vanish_meanwhile_are_not_compared(operator):
    with Forgetting(*upgraded(operator)) as proxy:
        done = operator.run("reembed_embeddings", "--limit", "5", "--json", env={"QDRANT_URL": proxy.url}).json
    assert done["recall"] is None


@pytest.mark.matrix
def test_more_than_there_is_means_all(operator):
    operator.load(60)
    upgrade(operator)
    done = operator.run("reembed_embeddings", "--limit", "5000", "--json").json
    assert done["memories"] == done["points"] == len(embeddable(operator))


@pytest.mark.matrix
def test_the_sample_is_spread_over_all_memories(operator):
    operator.load(200)
    upgrade(operator)
    operator.run("reembed_embeddings", "--limit", "10")
    assert operator.servers.openai.stats()["texts"] >= 10
    cache = next((operator.backups / "embeddings").glob(f"{operator.collection}-*.sqlite3"))
    import sqlite3

    with sqlite3.connect(cache) as db:
        db.execute("ATTACH DATABASE ? AS b", [str(cache.with_name("vectors.sqlite3"))])
        rows = "SELECT m.id - (SELECT min(id) FROM memories) FROM memories m JOIN b.vectors v ON v.key = m.key"
        places = sorted(place for (place,) in db.execute(rows))
    assert max(after - place for place, after in pairwise(places)) <= 40


def test_the_same_model_finds_the_same_neighbours(operator):
    """What is compared is recall: the model that made the live vectors agrees with itself."""
    operator.load(120)
    operator.export(VECTOR_SIZE=48, EMBEDDING_MODEL=SMALL)
    recall = operator.run("reembed_embeddings", "--limit", "30", "--json").json["recall"]
    assert recall["overlap"] > 0.98
    assert recall["live_score"] == pytest.approx(recall["side_score"], abs=1e-4)


def test_without_a_live_collection_nothing_is_compared(operator):
    operator.load(30)
    operator.call("DELETE", "")
    upgrade(operator)
    done = operator.run("reembed_embeddings", "--limit", "10", "--json").json
    assert (done["points"], done["recall"]) == (10, None)
    assert operator.collections() == []


def test_it_costs_no_more_than_was_allowed(operator):
    operator.load(60)
    upgrade(operator)
    operator.servers.openai.reset()
    refused = operator.run("reembed_embeddings", "--limit", "20", "--max-cost", "0", expect=2)
    assert "--max-cost is $0" in refused.err
    assert operator.servers.openai.stats()["requests"] == 0
    assert journals(operator) == []


def test_a_memory_that_the_provider_refuses_is_listed(operator):
    operator.load(30)
    upgrade(operator)
    operator.cypher("MATCH (m:Memory) WITH m ORDER BY id(m) LIMIT 1 SET m.content = 'poison here'")
    operator.servers.openai.fault(poisoned_text="poison")
    done = operator.run("reembed_embeddings", "--limit", "30", "--json", expect=3).json
    assert len(done["refused"]) == 1
    assert done["points"] == done["memories"] - 1


@pytest.mark.parametrize(
    "where",
    matrix(
        [
            "after side collection announced",
            "called spot check's collection made",
            "called spot check's points written",
            "called spot check compared",
            "before removed",
            "entering spot check's collection deleted",
            "called spot check's collection deleted",
        ],
        "called spot check's points written",
    ),
)
def test_a_kill_leaves_nothing_after_the_next_start(operator, where):
    operator.load(60)
    upgrade(operator)
    before = points_of(operator)
    if where == "before removed":
        where = "before closed"
    run_killed(operator, where, "reembed_embeddings", "--limit", "20")
    assert same_points(points_of(operator), before)
    again = operator.run("reembed_embeddings", "--dry-run")
    assert "a run of reembed_embeddings.py is unfinished" in again.err
    assert operator.collections() == [operator.collection]
    assert list((operator.backups / "embeddings").glob("*check*")) == []
    assert all("closed" in path.read_text().splitlines()[-1] for path in journals(operator))
    assert same_points(points_of(operator), before)


@pytest.mark.parametrize(
    "flags",
    [
        ("--limit", "5", "--only-missing"),
        ("--limit", "5", "--dry-run"),
        ("--limit", "5", "--fresh"),
        ("--limit", "5", "--prune-spool"),
        ("--fresh", "--dry-run"),
        ("--fresh", "--only-missing"),
    ],
)
def test_flags_that_do_not_go_together(operator, flags):
    refused = operator.run("reembed_embeddings", *flags, expect=2)
    assert "do not go together" in refused.err


@pytest.mark.matrix
def test_another_model_at_the_same_size_is_compared_too(operator):
    operator.load(80)
    operator.export(VECTOR_SIZE=48, EMBEDDING_MODEL=LARGE)
    recall = operator.run("reembed_embeddings", "--limit", "40", "--json").json["recall"]
    assert 0.3 < recall["overlap"] < 1


@pytest.mark.parametrize(("header", "code"), [("Retry-After: 1\r\n", 0), ("Retry-After: soon\r\n", 1), ("", 1)])
def test_a_rate_limit_of_the_searches_is_waited_out(operator, header, code):
    """The official client, which searches here, only reports it. Without a time to wait the answer is an error."""
    upgraded(operator)
    limit = answer(429, '{"status": {"error": "Rate limiting exceeded: Read rate limit exceeded"}}', header)
    fault = Fault(rb"^POST /collections/\S+/points/query", skip=1, answer=limit, hang_up=True)
    with FaultyProxy(int(urlsplit(operator.servers.qdrant_url).port or 0), fault) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        done = operator.run("reembed_embeddings", "--limit", "5", expect=code, env={"QDRANT_URL": url})
    assert fault.hits == 1
    assert ("Read rate limit exceeded" in done.err or "Retry-After" in done.err) is bool(code)
    assert ("(5 queries)" in done.out) is not bool(code)
    assert operator.collections() == [operator.collection]
    assert open_journals(operator.backups) == []
