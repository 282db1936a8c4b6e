"""Every shell block of the documents, typed in order by an operator who reads only them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guide.documents import (
    DOCUMENTS,
    MIGRATION,
    OPERATIONS,
    PROSE,
    README,
    REFERENCE,
    SHELL,
    Block,
    blocks,
    sections,
)
from tests.guide.site import LARGE, SMALL, Ran, Site
from tests.sandbox.stack import Stack
from tests.sandbox.state import State

pytestmark = pytest.mark.qdrant
Check = Callable[[Site, Ran, State], None]
TRIED = {"cron", "ini", "yaml"}  # in test_operations.py


@pytest.fixture
def site(tmp_path, request) -> Iterator[Site]:
    size, model = getattr(request, "param", SMALL)
    with Stack(tmp_path / "servers") as stack:
        someone = Site(tmp_path, stack)
        someone.set_up(size, model)
        yield someone


def backed_up(site: Site, ran: Ran, before: State) -> None:
    (manifest,) = site.manifests()
    document = json.loads(manifest.read_text())
    assert document["graph"]["proof"] == "restored"
    assert document["collection"]["proof"] in {"checked", "restored"}
    site.stamp = document["stamp"]
    for name in (f"falkordb/memories_{site.stamp}.rdb", f"qdrant/qdrant_snapshot_{site.stamp}.tar.gz"):
        assert (site.backups / name).is_file()
    assert site.state() == before


def configured(site: Site, ran: Ran, before: State) -> None:
    """The file alone sets it, without the exports; its unfinished last line is unchanged."""
    settings = json.loads(site.script("verify_migration", "--show-config", "--json").out)["settings"]
    assert settings["VECTOR_SIZE"]["value"] == LARGE[0]
    assert ".env:" in settings["VECTOR_SIZE"]["from"]
    assert f"EMBEDDING_MODEL={SMALL[1]}" in site.automem_env.read_text().splitlines()


def dry(site: Site, ran: Ran, before: State) -> None:
    assert site.state() == before


def upgraded(site: Site, ran: Ran, before: State) -> None:
    after = site.state()
    assert site.size() == int(LARGE[0])
    assert after.points == before.points
    assert after.graph == before.graph
    assert before.keys <= after.keys


def pending(site: Site, ran: Ran, before: State) -> None:
    assert "restart pending" in ran.out


def refused_post(site: Site, ran: Ran, before: State) -> None:
    assert "results" not in json.loads(ran.out)


def by_keyword(site: Site, ran: Ran, before: State) -> None:
    assert all(one["match_type"] != "vector" for one in json.loads(ran.out)["results"])


def by_vector(site: Site, ran: Ran, before: State) -> None:
    assert "restart pending" not in ran.out
    assert any(one["match_type"] == "vector" for one in site.recall("database decision for the project"))


def rolled_back(site: Site, ran: Ran, before: State) -> None:
    assert site.size() == int(SMALL[0])
    assert site.state() == before


def downgraded(site: Site, ran: Ran, before: State) -> None:
    assert site.size() == int(SMALL[0])
    assert site.state().points == before.points


def at_voyage(site: Site, ran: Ran, before: State) -> None:
    assert site.size() == 1024
    assert "voyage-4 at 1024d" in ran.err
    assert "because EMBEDDING_PROVIDER is voyage" in ran.err


def by_hand(site: Site, ran: Ran, before: State) -> None:
    (snapshot,) = (site.backups / "qdrant").glob("memories-*.snapshot")
    assert snapshot.stat().st_size > 1000
    state = site.state()
    assert site.script("restore_from_backup", str(snapshot)).code == 0
    assert site.state() == state


def recorded(site: Site, ran: Ran, before: State) -> None:
    assert json.loads(ran.out)["status"] == "success"


# Heading and a part of the block after which to look, and what must be seen then.
GUIDE: dict[tuple[str, str], Check] = {
    ("1. Back up", "backup_automem.py"): backed_up,
    ("2. Update the configuration", "echo"): configured,
    ("3. Re-embed all memories", "--dry-run"): dry,
    ("3. Re-embed all memories", "embeddings.py\n"): upgraded,
    ("4. Verify", "verify_migration"): pending,
    ("5. Test recall", "-X POST"): refused_post,
    ("5. Test recall", "-G"): by_keyword,
    ("6. Restart AutoMem", "--after-restart"): by_vector,
    ("Rollback", "restore_from_backup"): rolled_back,
    ("Steps", "reembed_embeddings"): downgraded,
    ("To voyage-4", "reembed_embeddings.py\n"): at_voyage,
    ("Back to OpenAI", "--after-restart"): downgraded,
    ('Error: "Qdrant collection already exists"', "DELETE"): downgraded,
    ("A backup failed", "snapshots"): by_hand,
    ("After a migration", "POST"): recorded,
}


def assert_service_reported(site: Site, ran: Ran, before: State) -> None:
    """The dry run works while AutoMem runs; the real run would refuse."""
    upgraded(site, ran, before)
    assert "warning: AutoMem is running" in ran.err
    refused = site.script("restore_from_backup", "latest")
    assert refused.code == 2
    assert "docker compose stop flask-api" in refused.err


OVERVIEW: dict[tuple[str, str], Check] = {
    ("The scripts", "restore_from_backup.py latest --dry-run"): assert_service_reported,
}


def type_all(site: Site, path: Path, checks: dict[tuple[str, str], Check]) -> None:
    """Run the document; a JSON block after a shell block shows what that one must print."""
    before, used, last = site.state(), set(), Ran(0, "", "")
    for block in blocks(path):
        if block.language == "json":
            assert json.loads(last.out) == json.loads(block.text), block.name
        if block.language != SHELL:
            continue
        if block.not_run:
            site.do(block.not_run)
            continue
        last = site.shell(block)
        assert last.code == 0, f"{block.name}: exit {last.code}\n{last.err}\n{last.out}"
        assert "Traceback" not in last.err, f"{block.name}\n{last.err}"
        for heading, part in [key for key in checks if key[0] == block.heading and key[1] in block.text]:
            checks[heading, part](site, last, before)
            used.add((heading, part))
    assert used == set(checks), "a block that is looked at is gone"


def test_the_guide_from_the_first_line_to_the_last(site):
    type_all(site, MIGRATION, GUIDE)


@pytest.mark.matrix
@pytest.mark.parametrize("site", [LARGE], indirect=True)
def test_the_readme_and_the_operations_page(site):
    shutil.copy(site.automem_env, site.checkout / ".env")
    type_all(site, README, OVERVIEW)
    type_all(site, OPERATIONS, {})


def test_the_reference_has_no_block_to_run():
    assert all(block.not_run for block in blocks(REFERENCE) if block.language == SHELL)


def shell_blocks() -> list[Block]:
    return [block for path in DOCUMENTS for block in blocks(path) if block.language == SHELL]


def test_every_block_has_a_language_that_is_run_shown_or_compared():
    assert {block.language for path in DOCUMENTS for block in blocks(path)} <= {
        SHELL,
        "json",
        "",
        *TRIED,
    }


def test_a_block_that_is_not_run_names_what_it_would_need():
    left_out = [block for block in shell_blocks() if block.not_run]
    for block in left_out:
        assert any(word in block.not_run for word in ("needs ", "runs", "the tests bring")), block.name
    for block in shell_blocks():
        foreign = [
            word for word in ("docker", "systemctl", "railway", "make ", "node1", "age-keygen") if word in block.text
        ]
        assert bool(foreign) == bool(block.not_run), f"{block.name}: {foreign}"


@pytest.mark.matrix
def test_the_error_texts_of_the_guide_are_those_that_are_printed(site):
    """A mismatch and a refusal, provoked; the rate limit's text is in the client that raises it."""
    larger = dict(zip(("VECTOR_SIZE", "EMBEDDING_MODEL"), LARGE, strict=True), AUTOMEM_ENV_FILE=str(site.automem_env))
    mismatch = site.script("verify_migration", **larger)
    refusal = site.script("reembed_embeddings", **larger)
    assert (mismatch.code, refusal.code) == (2, 2)
    limit = (site.checkout / "lib" / "clients" / "embeddings" / "client.py").read_text()
    shown = {block.heading: block.text for block in blocks(MIGRATION) if block.language == ""}
    assert mismatch.err.startswith(shown['Error: "Vector dimension mismatch"'])
    assert shown['Error: "Qdrant collection already exists"'].strip() in refusal.err
    assert shown['Error: "OpenAI API rate limit"'].strip() in limit
    assert len(shown) == 3


def test_the_headings_follow_the_guide():
    """Operators know the old guide: its sections are found in its order."""
    headings = [heading.lower() for heading in sections(MIGRATION)]
    order = [
        "upgrading to 3072d",
        "cost comparison",
        "migration steps",
        "1. back",
        "2. update",
        "3. re-embed",
        "4. verify",
        "5. test recall",
        "6. restart",
        "rollback",
        "downgrading to 768d",
        "troubleshooting",
        "vector dimension mismatch",
        "rate limit",
        "already exists",
        "slow",
        "backup failed",
        "best practices",
        "before a migration",
        "after a migration",
        "choosing between",
        "related",
    ]
    places = [next(i for i, one in enumerate(headings) if word in one) for word in order]
    assert places == sorted(places)


@pytest.mark.parametrize("document", PROSE, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def anchors(path: Path) -> set[str]:
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in sections(path)}


def test_the_readme_stays_short():
    assert len(README.read_text().split()) < 1800
