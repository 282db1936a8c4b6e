"""The report next to the backups: its values against separately computed ones, and what it must not hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.backup.phases import DELETED, DELETING
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.embeddings.worker_pool import EmbedProgress
from lib.console import Console
from lib.dimensions import EmbeddingSpec
from lib.reembed import report as plots
from lib.reembed.embed import MOST_INTERVALS, EmbeddingTotals, Interval, PaidSums
from tests.kill_support import run_killed
from tests.matrix import matrix
from tests.operator_support import KEY, LARGE, NEW_SIZE, OLD_SIZE, SMALL, Operator
from tests.reembed_support import Points, assert_migrated, embeddable, make_ready, points_of

pytestmark = pytest.mark.qdrant
HOSTILE = "<script>alert('1')</script> & \"quoted\" <img src=x onerror=alert(2)> </style></title>"
VOID = {"meta", "br"}
LONG = "5b0c8f6e-11f6-4c5e-9a5e-4d4f3a2b1c00"


class Page(HTMLParser):
    """Parse the page: its texts and its elements; checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


@pytest.fixture
def ready(operator):
    return make_ready(operator)


@dataclass(frozen=True)
class Migrated:
    """A finished migration: what was there before it, and what it printed."""

    operator: Operator
    before: Points
    counted: dict[str, Any]  # by the embeddings endpoint
    printed: dict[str, Any]


@pytest.fixture(scope="module")
def migrated(session_servers, tmp_path_factory) -> Iterator[Migrated]:
    """Every memory begins with what a browser would run, one is too long, and the Qdrant URL holds a login."""
    someone = Operator(session_servers, tmp_path_factory.mktemp("report"))
    session_servers.openai.clear_faults()
    make_ready(someone)
    someone.cypher("MATCH (m:Memory) SET m.content = $text + m.content", text=HOSTILE)
    rows = [
        {
            "id": one,
            "vector": vector.tolist(),
            "payload": {**payload, "content": HOSTILE + payload["content"]},
        }
        for one, (payload, vector) in points_of(someone).items()
    ]
    someone.call("PUT", "/points?wait=true", {"points": rows})
    someone.cypher("CREATE (:Memory {id: $id, content: $text})", id=LONG, text="word " * 9000)
    someone.export(QDRANT_URL=someone.servers.qdrant_url.replace("//", "//me:l0gin-of-a-proxy@"))
    someone.run("backup_automem", "--only", "qdrant", env={"VECTOR_SIZE": str(OLD_SIZE), "EMBEDDING_MODEL": SMALL})
    before = points_of(someone)
    printed = someone.run("reembed_embeddings", "--json", "--batch-size", "30").json
    yield Migrated(someone, before, session_servers.openai.stats(), printed)
    someone.clean_up()


def reports(operator) -> list[Path]:
    return sorted((operator.backups / "reports").glob("*"))


def the_report(operator) -> tuple[dict, Page, str]:
    """Both files of the only report."""
    html, document = reports(operator)
    assert (html.suffix, document.suffix) == (".html", ".json")
    return json.loads(document.read_text()), Page(html.read_text()), html.read_text()


def nearest(points, one, most=10):
    """The ids of the nearest by cosine, computed here, and their scores."""
    ids = list(points)
    matrix = np.vstack([vector for _, vector in points.values()]).astype(np.float64)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    scores = matrix @ matrix[ids.index(one)]
    order = [at for at in np.argsort(-scores) if ids[at] != one][: most + 1]
    return [ids[at] for at in order], [float(scores[at]) for at in order]


def assert_found(near, scores, wanted):
    """The same scores, and the same points except if scores are equal."""
    ids, best = wanted
    assert scores == pytest.approx(best[:10], abs=2e-4)
    sure = {one for one, score in zip(ids, best, strict=True) if score > best[9] + 2e-4}
    assert sure <= set(near)


# --- content ----------------------------------------------------------------------------------------------------


def test_it_reports_what_was_done_and_how_to_undo_it(migrated):
    ready, result = migrated.operator, migrated.printed
    document, shown, _ = the_report(ready)
    assert result["report"] == [str(path) for path in reports(ready)[::-1]]
    assert result["undo"] == document["undo"]
    assert "\n".join(line.strip() for line in document["undo"].splitlines()) in "\n".join(
        line.strip() for text in shown.texts for line in text.splitlines()
    )
    assert (document["format"], document["collection"]) == (1, ready.collection)
    manifest = json.loads(ready.manifests()[-1].read_text())
    assert document["old"] == {
        "size": OLD_SIZE,
        "points": manifest["collection"]["points"],
        "model": SMALL,
        "model_known": manifest["collection"]["model_known"],
    }
    points = points_of(ready)
    assert (document["new"]["size"], document["new"]["model"]) == (NEW_SIZE, LARGE)
    assert document["new"]["points"] == len(points) == result["points"]
    assert document["way"] == result["way"]
    assert document["absent_seconds"] == result["absent_seconds"]
    assert document["absent_known"] == "measured"
    assert document["backup"] == ready.manifests()[-1].name
    assert [one["phase"] for one in document["steps"]][:2] == ["started", "staging"]
    assert ready.collection in shown.text
    assert f"{len(points):,}" in shown.text


def test_the_reported_embeddings_are_what_the_provider_counted(migrated):
    document, shown, _ = the_report(migrated.operator)
    stats, embedded = migrated.counted, document["bought"]
    assert (embedded["texts"], embedded["tokens"], embedded["requests"]) == (
        stats["texts"],
        stats["tokens"],
        stats["requests"],
    )
    assert embedded["price"] == pytest.approx(stats["tokens"] * 0.13 / 1e6)
    assert sum(slot["texts"] for slot in document["rates"]) == stats["texts"]
    assert sum(slot["seconds"] for slot in document["rates"]) == pytest.approx(embedded["seconds"], abs=0.1)
    assert f"${embedded['price']:.4f}" in shown.text
    # Only the texts themselves were embedded.
    texts = {node["content"] for node in embeddable(migrated.operator).values()}
    assert stats["texts"] == len(texts)


def test_recall_is_what_can_be_computed_from_the_vectors(migrated):
    before, after = migrated.before, points_of(migrated.operator)
    recall = the_report(migrated.operator)[0]["recall"]
    assert len(recall["memories"]) == 50
    assert recall["neighbours"] == 10
    for one in recall["memories"]:
        was, now = nearest(before, one["id"]), nearest(after, one["id"])
        assert one["before"] == pytest.approx(was[1][:10], abs=2e-4)
        assert one["after"] == pytest.approx(now[1][:10], abs=2e-4)
        # If the tenth and the eleventh have the same score, either is right.
        apart = was[1][9] - was[1][10] > 2e-4 and now[1][9] - now[1][10] > 2e-4
        same = len(set(was[0][:10]) & set(now[0][:10]))
        assert one["same"] == same or (not apart and abs(one["same"] - same) <= 2)
    shares = [one["same"] / one["near"] for one in recall["memories"]]
    assert recall["overlap"] == pytest.approx(np.mean(shares))
    assert 0.1 < recall["overlap"] < 1
    scores = [score for one in recall["memories"] for score in one["before"]]
    assert recall["before_score"] == pytest.approx(np.median(scores))
    contents = {str(one): payload["content"] for one, (payload, _) in after.items()}
    for one in recall["memories"]:
        assert " ".join(contents[str(one["id"])].split()).startswith(one["content"].removesuffix("..."))


@pytest.mark.matrix
def test_skipped_and_refused_memories_are_listed(ready):
    node = ready.cypher("MATCH (m:Memory) RETURN m.id ORDER BY id(m) LIMIT 1")[0][0]
    ready.cypher("MATCH (m:Memory {id: $id}) SET m.content = 'poison here'", id=node)
    ready.cypher("CREATE (:Memory {id: 'legacy-4711', content: 'an id that no point can have'})")
    ready.servers.openai.fault(poisoned_text="poison")
    ready.run("reembed_embeddings", expect=3)
    document, shown, _ = the_report(ready)
    assert [one["label"] for one in document["refused"]] == [node]
    assert document["skipped"]["counts"]["id is neither a UUID nor an unsigned integer"] >= 1
    assert ["legacy-4711", "id is neither a UUID nor an unsigned integer"] in document["skipped"]["examples"]
    assert "legacy-4711" in shown.text
    assert f"memory {node} was not embedded" in shown.text
    assert "Left to do" in shown.text


def test_a_long_memory_is_named_as_cut(migrated):
    document, shown, _ = the_report(migrated.operator)
    assert document["cut"] == 1
    assert f"{LONG} : its end was cut" in shown.text


# --- what it must not hold --------------------------------------------------------------------------------------


def test_hostile_content_is_text_and_the_page_needs_nothing_else(migrated):
    document, shown, html = the_report(migrated.operator)
    assert document["recall"]["memories"][0]["content"].startswith("<script>alert('1')</script>")
    assert "<script>alert('1')</script>" in shown.text
    assert "<script" not in html
    assert "<img" not in html
    assert shown.tags & {"script", "img", "link", "iframe", "object", "base", "form", "a"} == set()
    attributes = {name for _, found in shown.elements for name in found}
    assert not {name for name in attributes if name.startswith("on")}
    assert attributes & {"src", "href", "srcset", "style", "action"} == set()
    assert "url(" not in html
    assert "@import" not in html
    policy = [found["content"] for tag, found in shown.elements if found.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert {"svg", "path", "rect"} <= shown.tags


def test_it_is_private_and_holds_no_key(migrated):
    folder = migrated.operator.backups / "reports"
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in reports(migrated.operator):
        assert path.stat().st_mode & 0o777 == 0o600
        assert KEY not in path.read_text()
        assert "l0gin-of-a-proxy" not in path.read_text()


# --- over several starts ----------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("where", "words"),
    matrix(
        [(f"after {DELETING}", ()), (f"after {DELETED}", ("--in-place",)), ("before closed", ())],
        (f"after {DELETING}", ()),
    ),
)
def test_a_run_that_is_killed_and_resumed_still_reports_what_was_before(ready, where, words):
    before = points_of(ready)
    run_killed(ready, where, "reembed_embeddings", *words)
    result = ready.run("reembed_embeddings", *words)
    after = assert_migrated(ready, before)
    document, shown, _ = the_report(ready)
    assert len(document["recall"]["memories"]) == 50
    for one in document["recall"]["memories"][:5]:
        assert one["before"] == pytest.approx(nearest(before, one["id"])[1][:10], abs=2e-4)
        assert one["after"] == pytest.approx(nearest(after, one["id"])[1][:10], abs=2e-4)
    assert document["old"]["size"] == OLD_SIZE
    stats = ready.servers.openai.stats()
    assert (document["bought"]["texts"], document["bought"]["tokens"]) == (stats["texts"], stats["tokens"])
    assert document["absent_seconds"] > 0
    assert document["absent_known"].startswith("at most")
    assert f"absent or incomplete for at most {document['absent_seconds']:,.1f} s" in result.out
    assert ready.archive() in document["undo"]
    assert document["undo"] in result.out
    assert result.out.rstrip().endswith(f"report:\n  {reports(ready)[0]}")
    assert "of the 10 nearest" in shown.text


@pytest.mark.matrix
def test_what_an_earlier_start_paid_for_is_in_the_sums(ready):
    ready.run("reembed_embeddings", "--dry-run", "--batch-size", "20")
    ready.servers.openai.fault(status=401, after=3)
    ready.run("reembed_embeddings", "--batch-size", "20", "--workers", "1", expect=6)
    ready.servers.openai.clear_faults()
    assert reports(ready) == []
    ready.run("reembed_embeddings", "--batch-size", "20")
    document, shown, _ = the_report(ready)
    stats = ready.servers.openai.stats()
    assert document["bought"]["texts"] == stats["texts"]
    assert document["bought"]["tokens"] == stats["tokens"]
    assert [slot["after_pause"] for slot in document["rates"]].count(True) == 2
    assert "broken lines: a pause" in shown.text


@pytest.mark.matrix
def test_the_next_one_has_a_separate_report_and_separate_sums(ready):
    ready.run("reembed_embeddings")
    first = the_report(ready)[0]
    result = ready.run("reembed_embeddings", "--json").json
    assert len(reports(ready)) == 4
    second = json.loads(Path(result["report"][0]).read_text())
    assert second["run"] != first["run"]
    assert (second["bought"]["texts"], second["rates"], second["recall"]) == (0, [], None)
    assert second["recall_note"] == "no collection was replaced"
    shown = Page(Path(result["report"][1]).read_text())
    assert "Not measured: no collection was replaced" in shown.text
    assert "Nothing had to be embedded" in shown.text


# --- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_a_collection_that_was_gone_has_no_before(ready):
    ready.call("DELETE", "")
    ready.run("reembed_embeddings")
    document, shown, _ = the_report(ready)
    assert document["recall"] is None
    assert "Not measured" in shown.text


@pytest.mark.matrix
def test_searches_that_fail_fail_no_migration(ready):
    from tests.gate import CancelToken, Gate

    before = points_of(ready)
    with Gate(ready.servers.qdrant_url) as gate:
        stop = CancelToken("POST", f"/{ready.collection}/points/query")
        stop.let_go.set()  # its connection is closed at once
        gate.stops.append(stop)
        ready.run("backup_automem", "--only", "qdrant", env={"VECTOR_SIZE": str(OLD_SIZE), "QDRANT_URL": gate.url})
        ready.run("reembed_embeddings", env={"QDRANT_URL": gate.url})
        assert stop.reached.is_set()
    assert_migrated(ready, before)
    document, shown, _ = the_report(ready)
    assert document["recall"] is None
    assert "the old collection could not be searched" in document["recall_note"]
    assert "Not measured: the old collection could not be searched" in shown.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_fails_no_migration(ready):
    before = points_of(ready)
    (ready.backups / "reports").mkdir(mode=0o500)
    result = ready.run("reembed_embeddings", "--json")
    assert "the report could not be written" in result.err
    assert result.json["report"] == []
    assert_migrated(ready, before)


@pytest.mark.matrix
def test_a_report_that_cannot_be_written_fails_no_migration(ready):
    before = points_of(ready)
    (ready.backups / "reports").write_text("a file where the folder should be")
    result = ready.run("reembed_embeddings", "--json")
    assert "the report could not be written" in result.err
    assert result.json["report"] == []
    assert_migrated(ready, before)


@pytest.mark.matrix
def test_backups_are_listed_and_cleaned_up_next_to_reports(ready):
    ready.run("reembed_embeddings")
    ready.run("backup_automem", "--only", "qdrant")
    assert len(ready.run("backup_automem", "--list", "--json").json["sets"]) == 2
    ready.run("backup_automem", "--cleanup", "--keep", "1")
    ready.run("backup_automem", "--check", "all")
    assert len(reports(ready)) == 2


@pytest.mark.matrix
def test_a_cleanup_never_takes_the_undo_of_a_migration(ready):
    """Newer sets do not displace the set before the migration: the undo and the report name it."""
    ready.run("reembed_embeddings")
    undo = the_report(ready)[0]["backup"]
    for words in ((), (), ("--only", "qdrant"), ("--only", "falkordb"), ("--only", "falkordb")):
        ready.run("backup_automem", *words)
    done = ready.run("backup_automem", "--cleanup", "--keep", "1", "--json").json
    assert len(done["sets"]) == 2  # one of the full sets, one of the sets with the graph only
    assert undo not in done["sets"]
    assert "names it" in done["protected"][undo]
    assert ready.backups / undo in ready.manifests()
    out = ready.run("backup_automem", "--cleanup", "--keep", "1").out
    assert out.startswith(f"nothing to delete\nkept {undo}: the undo of reembed run ")


# --- figures and plots ------------------------------------------------------------------------------------------


def test_slots_are_bounded_however_long_a_run_is():
    made = PaidSums()
    for number in range(10_000):
        made.add(Interval(float(number), 1.0, 7, 1 if number == 5000 else 0, after_pause=number == 3000), 70, 1)
        assert len(made.slots) <= MOST_INTERVALS
    assert (made.texts, made.tokens, made.requests, made.rate_limited) == (70_000, 700_000, 10_000, 1)
    assert sum(slot.texts for slot in made.slots) == 70_000
    assert sum(slot.seconds for slot in made.slots) == pytest.approx(10_000)
    assert [slot.after_pause for slot in made.slots].count(True) == 1
    assert all(slot.texts == pytest.approx(7 * slot.seconds) for slot in made.slots)
    assert [slot.at for slot in made.slots] == sorted(slot.at for slot in made.slots)


def test_tokens_that_arrive_after_the_last_text_are_in_the_sums(tmp_path):
    """Of an answer that cannot be used, when no other request was sent and no other text arrived."""
    with EmbeddingCache(tmp_path / "plan.sqlite3") as cache:
        paid = EmbeddingTotals(cache, EmbeddingSpec("http://127.0.0.1:1/v1", "m", 8), None, logged=True)
        with paid.recording() as record:
            record(EmbedProgress(embedded=1, tokens=10, requests=2, seconds=1.0))
            record(EmbedProgress(embedded=1, tokens=30, requests=2, seconds=1.1, discarded=20))
    assert (paid.sums.tokens, paid.sums.discarded) == (30, 20)


def numbers(path: str) -> list[tuple[float, float]]:
    words = path.removesuffix(" Z")[1:].split(" L")
    return [tuple(map(float, word.split(","))) for word in words]


def test_a_plot_of_rates_is_in_its_frame_and_in_proportion():
    slots = [
        {"at": 0.0, "seconds": 10.0, "texts": 100, "after_pause": False},
        {"at": 60.0, "seconds": 30.0, "texts": 900, "after_pause": True},
    ]
    plot = plots.rates(slots)
    points = numbers(plot.areas[0].outline)
    assert all(plot.left <= x <= plot.right and plot.top <= y <= plot.bottom for x, y in points)
    slow, fast = plot.bottom - points[0][1], plot.bottom - points[-1][1]
    assert fast == pytest.approx(3 * slow, abs=0.1)
    assert plot.marks == [pytest.approx(plot.left + (plot.right - plot.left) / 4, abs=0.1)]
    assert plots.rates([]) is None
    assert plots.rates([{**slots[0], "texts": 0}]) is not None


def test_a_plot_of_scores_lays_both_over_one_scale():
    plot = plots.scores([0.2] * 10, [0.8] * 10)
    old, new = (numbers(area.outline) for area in plot.areas)
    assert [area.kind for area in plot.areas] == ["old", "new"]
    assert min(y for _, y in old) == min(y for _, y in new)
    assert min(old, key=lambda point: point[1])[0] < min(new, key=lambda point: point[1])[0]
    assert plots.scores([], []) is None
    assert plots.scores([0.5], [0.5]) is not None


def test_a_plot_of_overlaps_counts_every_memory():
    memories = [{"same": 10, "near": 10}, {"same": 3, "near": 5}, {"same": 0, "near": 10}]
    bars = plots.overlaps(memories, 10).bars
    assert [bar.label for bar in bars] == [
        "0 of 10 the same: 1 memories",
        "6 of 10 the same: 1 memories",
        "10 of 10 the same: 1 memories",
    ]


def test_half_a_character_is_no_trouble(migrated, tmp_path):
    document = the_report(migrated.operator)[0]
    document["recall"]["memories"][0]["content"] = "half \ud83d of it"
    written = plots.write(document, tmp_path, Console())
    assert json.loads(written[0].read_text()) == document
    assert "half ? of it" in written[1].read_text()
