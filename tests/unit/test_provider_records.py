"""Stamps, manifests and journals name the provider, and one without is OpenAI's; the printed commands set it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lib.backup.collection import STAMP_KEY, known_model
from lib.backup.manifest import Manifest, parse_manifest, read_manifest, sealed, write_manifest
from lib.backup.phases import DELETING, VERIFIED, journalled_stamp, spec_as_json
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.embeddings.pricing import input_limit
from lib.clients.qdrant.collection import CollectionState
from lib.config import load_config
from lib.dimensions import LOCAL_URL, EmbeddingSpec, is_model_of, model_fault
from lib.errors import BackupDamaged, GuardRefused
from lib.journal import start_journal
from lib.reembed.assess import undo_of
from lib.reembed.context import Context, open_run
from lib.reembed.staging import stamp
from lib.show_config import restart_lines, settings_lines
from lib.verify.checks import FAILED, PASSED, check_model
from tests.unit.test_manifest import COLLECTION

TARGETS = ["falkordb 127.0.0.1:6379 g", "qdrant 127.0.0.1:6333 c"]
LARGE = "text-embedding-3-large"
OPENAI = EmbeddingSpec("https://api.openai.com/v1", LARGE, 1024)
VOYAGE = EmbeddingSpec("https://api.voyageai.com/v1", "voyage-4", 1024, "voyage")
OLLAMA = EmbeddingSpec("http://localhost:11434/v1", "bge-m3", 1024, "ollama")
LOCAL = EmbeddingSpec(LOCAL_URL, "BAAI/bge-large-en-v1.5", 1024, "local")
AZURE = dataclasses.replace(OPENAI, base_url="https://x.openai.azure.com/openai/deployments/e?api-version=2024-06-01")
SAME_NAME = dataclasses.replace(VOYAGE, base_url="https://gateway.example.com/v1", provider="openai")


def state_with(metadata: dict[str, object], size: int = 1024) -> CollectionState:
    raw = {"config": {"metadata": metadata}}
    return CollectionState("c", size, "Cosine", 1, "green", optimizer_ok=True, raw=raw)


def test_records_of_openai_are_as_before_and_others_name_their_provider():
    assert stamp(OPENAI)[STAMP_KEY].keys() == {"model", "size", "at"}
    assert stamp(VOYAGE)[STAMP_KEY]["provider"] == "voyage"
    assert spec_as_json(OPENAI) == {"model": LARGE, "size": 1024, "endpoint": "https://api.openai.com/v1"}
    assert spec_as_json(LOCAL) == {
        "model": "BAAI/bge-large-en-v1.5",
        "size": 1024,
        "endpoint": LOCAL_URL,
        "provider": "local",
    }


def test_a_stamp_is_of_one_provider():
    for spec in (OPENAI, VOYAGE, OLLAMA, LOCAL):
        for other in (OPENAI, VOYAGE, OLLAMA, LOCAL, SAME_NAME):
            assert is_model_of(stamp(spec)[STAMP_KEY], other) == (spec == other), (spec, other)
    assert is_model_of({"model": f"openai/{LARGE}"}, OPENAI)


def test_a_name_of_ollamas_without_a_tag_is_the_latest():
    assert is_model_of(stamp(OLLAMA)[STAMP_KEY], dataclasses.replace(OLLAMA, model="bge-m3:latest"))
    assert not is_model_of(stamp(OLLAMA)[STAMP_KEY], dataclasses.replace(OLLAMA, model="bge-m3:567m-fp16"))
    tagged = "nomic-embed-text:latest"
    assert input_limit(tagged, "ollama") == input_limit("nomic-embed-text", "ollama") == 2048
    fault = "OLLAMA_MODEL nomic-embed-text:latest makes 768d vectors only, VECTOR_SIZE is 1024"
    assert model_fault(tagged, 1024, "ollama") == fault


def test_how_the_provider_of_a_collection_is_known():
    configured = {"model": "voyage-4", "model_known": "configured", "provider": "voyage"}
    assert known_model(1024, {"metadata": {}}, VOYAGE) == configured
    assert known_model(1024, {"metadata": stamp(VOYAGE)}, OPENAI) == {**configured, "model_known": "stamped"}
    journalled = stamp(VOYAGE)[STAMP_KEY]
    assert known_model(1024, {"metadata": {}}, OPENAI, journalled) == {**configured, "model_known": "stamped"}
    stamped = {"model": LARGE, "model_known": "stamped"}
    assert known_model(1024, {"metadata": stamp(OPENAI)}, VOYAGE, journalled) == stamped
    for odd in ("text", ["list"], {STAMP_KEY: "text"}, {STAMP_KEY: {"model": 1}}):  # of a file that no server wrote
        assert known_model(1024, {"metadata": odd}, VOYAGE) == configured
    # Of another size: a guess, which is always a model of OpenAI.
    assert known_model(3072, {"metadata": {}}, VOYAGE) == {"model": LARGE, "model_known": "guessed"}


def test_the_journal_gives_the_stamp_of_servers_without_metadata(tmp_path):
    journal = start_journal(tmp_path, "reembed", TARGETS, stamp=stamp(VOYAGE))
    journal.append(DELETING)
    journal.append(VERIFIED)
    assert journalled_stamp(tmp_path, TARGETS[1], 1024) == stamp(VOYAGE)[STAMP_KEY]
    assert journalled_stamp(tmp_path, TARGETS[1], 768) == {}


def manifest_of(provider: str) -> Manifest:
    stamped = "20260101_000000"
    file = dataclasses.replace(COLLECTION.file, name=f"qdrant/qdrant_snapshot_{stamped}.tar.gz")
    component = dataclasses.replace(COLLECTION, file=file, provider=provider)
    return Manifest(stamped, "2026-01-01T00:00:00+00:00", None, component, None)


def test_a_manifest_names_another_provider_than_openai_alone(tmp_path):
    for provider in ("openai", "voyage"):
        written = write_manifest(tmp_path, manifest_of(provider))
        document = json.loads(written.path.read_text())["collection"]
        assert document.get("provider", "openai") == provider
        assert ("provider" in document) == (provider != "openai")
        assert read_manifest(written.path) == written
    document = json.loads(written.path.read_text())
    document["collection"]["provider"] = "a\nb"
    with pytest.raises(BackupDamaged, match="is no name"):
        parse_manifest(json.dumps(sealed(document)).encode(), written.path)


def test_the_cache_keeps_the_keys_of_openai_and_separates_providers(tmp_path):
    with EmbeddingCache(tmp_path / "c.sqlite3") as cache:
        keys = [cache.text_key(spec, "text") for spec in (OPENAI, VOYAGE, OLLAMA, LOCAL, SAME_NAME)]
        assert len(set(keys)) == 5
        # As every earlier version computed it.
        assert keys[0].hex() == "37ed59e975a7a0f794e47741e42d65df"


# --- printed commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "named", "exports"),
    [
        ("openai", False, ["EMBEDDING_MODEL=text-embedding-3-small"]),
        ("openai", True, ["EMBEDDING_PROVIDER=openai", "EMBEDDING_MODEL=text-embedding-3-small"]),
        ("voyage", False, ["EMBEDDING_PROVIDER=voyage", "VOYAGE_MODEL=text-embedding-3-small"]),
        ("ollama", True, ["EMBEDDING_PROVIDER=ollama", "OLLAMA_MODEL=text-embedding-3-small"]),
        ("local", True, ["EMBEDDING_PROVIDER=local"]),
    ],
)
def test_the_undo_sets_what_the_old_vectors_need(provider, named, exports):
    manifest = dataclasses.replace(manifest_of(provider), path=Path("/b/backup_20260101_000000.json"))
    lines = [line.strip() for line in undo_of(manifest, named=named).splitlines()]
    assert lines[1:-1] == [f"export {one}" for one in ["VECTOR_SIZE=3", *exports]]
    assert lines[-1].endswith("--only-missing")


def test_the_restart_names_the_settings_of_the_provider():
    plain = restart_lines("openai", named=False)
    assert "so that it sees VECTOR_SIZE and EMBEDDING_MODEL:\n    Docker:   set both in AutoMem's .env" in plain
    assert "VECTOR_SIZE, EMBEDDING_PROVIDER and EMBEDDING_MODEL:" in restart_lines("openai", named=True)
    assert "VECTOR_SIZE, EMBEDDING_PROVIDER and VOYAGE_MODEL:" in restart_lines("voyage", named=False)
    local = restart_lines("local", named=False)
    assert "so that it sees VECTOR_SIZE and EMBEDDING_PROVIDER:\n    Docker:   set both" in local


def test_the_settings_of_a_restored_collection_of_another_provider(tmp_path):
    environ = {"OPENAI_API_KEY": "k", "EMBEDDING_MODEL": LARGE, "VECTOR_SIZE": "1024"}
    config = load_config(environ, cwd=tmp_path, root=tmp_path)
    assert settings_lines(1024, LARGE, config) == []
    lines = settings_lines(1024, "voyage-4", config, "voyage")
    assert lines[2:] == [
        "  export VECTOR_SIZE=1024",
        "  export EMBEDDING_PROVIDER=voyage",
        "  export VOYAGE_MODEL=voyage-4",
    ]
    voyage = {**environ, "EMBEDDING_PROVIDER": "voyage", "VOYAGE_API_KEY": "k"}
    config = load_config(voyage, cwd=tmp_path, root=tmp_path)
    assert settings_lines(1024, "voyage-4", config, "voyage") == []
    assert "  export EMBEDDING_PROVIDER=openai" in settings_lines(1024, LARGE, config)


@pytest.mark.parametrize(
    ("made", "spec", "detail", "remedy"),
    [
        (OPENAI, OPENAI, f"{LARGE}, EMBEDDING_MODEL is {LARGE}", ""),
        (OPENAI, VOYAGE, f"{LARGE} of openai, the settings choose voyage-4 of voyage", "EMBEDDING_PROVIDER=openai"),
        (VOYAGE, SAME_NAME, "voyage-4 of voyage, the settings choose voyage-4 of openai", "VOYAGE_MODEL=voyage-4"),
    ],
)
def test_the_stamp_is_compared_with_model_and_provider(made, spec, detail, remedy):
    check = check_model(state_with(stamp(made)), spec)
    assert (check.status, check.detail) == (FAILED if remedy else PASSED, detail)
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("was", "now", "expected", "finish"),
    [
        (
            VOYAGE,
            OPENAI,
            "EMBEDDING_PROVIDER has changed",
            "EMBEDDING_PROVIDER=voyage VOYAGE_MODEL=voyage-4 VOYAGE_BASE_URL=",
        ),
        (
            VOYAGE,
            dataclasses.replace(VOYAGE, model="voyage-4-lite"),
            "VOYAGE_MODEL has changed",
            "VOYAGE_BASE_URL=https://api.voyageai.com/v1\n",
        ),
        (
            OLLAMA,
            LOCAL,
            "EMBEDDING_PROVIDER has changed",
            "OLLAMA_MODEL=bge-m3 OLLAMA_BASE_URL=http://localhost:11434\n",
        ),
        (LOCAL, VOYAGE, "EMBEDDING_PROVIDER has changed", "export VECTOR_SIZE=1024 EMBEDDING_PROVIDER=local\n"),
        # An export of the recorded endpoint would drop the query, which is sent with every request, and a login.
        (
            AZURE,
            dataclasses.replace(AZURE, size=512),
            "VECTOR_SIZE has changed",
            "export VECTOR_SIZE=1024 EMBEDDING_MODEL=text-embedding-3-large\n",
        ),
    ],
)
def test_a_run_that_deleted_the_collection_is_resumed_with_its_provider_alone(tmp_path, was, now, expected, finish):
    journal = start_journal(tmp_path, "reembed", TARGETS, spec=spec_as_json(was))
    journal.append(DELETING, undo="  the way back")
    ctx = Context(None, None, "c", was, None, tmp_path, TARGETS, None)
    assert open_run(ctx).path == journal.path
    with pytest.raises(GuardRefused) as caught:
        open_run(dataclasses.replace(ctx, spec=now))
    assert expected in str(caught.value)
    assert finish in caught.value.next_step
