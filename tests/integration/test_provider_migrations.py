"""Whole migrations between providers, up and down, with the AutoMem stand-in on the same settings."""

from __future__ import annotations

import importlib.util
import time

import pytest
import requests

from lib.dimensions import LOCAL_MODELS
from tests.operator_support import OLD_SIZE, SMALL
from tests.reembed_support import assert_vectors, embeddable, points_of
from tests.sandbox.local_model import write_local_model

pytestmark = pytest.mark.qdrant
PROVIDER_CHECK = "AutoMem's model"


def voyage(operator, _folder) -> dict[str, object]:
    return {"VOYAGE_API_KEY": "pa-sandbox", "VOYAGE_BASE_URL": operator.servers.openai.voyage_url, "VECTOR_SIZE": 256}


def ollama(operator, _folder) -> dict[str, object]:
    url = operator.servers.openai.ollama_url
    return {"EMBEDDING_PROVIDER": "ollama", "OLLAMA_BASE_URL": url, "VECTOR_SIZE": 768}


def local(operator, folder) -> dict[str, object]:
    texts = [properties["content"] for properties in embeddable(operator).values()]
    write_local_model(folder / "models", LOCAL_MODELS[384], texts)
    return {"EMBEDDING_PROVIDER": "local", "AUTOMEM_MODELS_DIR": folder / "models", "VECTOR_SIZE": 384}


LOCAL = pytest.param(
    local,
    marks=pytest.mark.skipif(
        importlib.util.find_spec("fastembed") is None, reason="pip install -r requirements-local.txt"
    ),
)


def verified(operator) -> dict[str, str]:
    """Restart AutoMem with the operator's settings, store a memory, verify. Returns the statuses by name."""
    with operator.restarted():
        body = {"content": f"embedded by AutoMem itself, with {operator.exports}"}
        requests.post(f"{operator.environ['AUTOMEM_API_URL']}/memory", json=body, timeout=20).raise_for_status()
        deadline = time.monotonic() + 20
        while len(points_of(operator)) < len(embeddable(operator)) and time.monotonic() < deadline:
            time.sleep(0.1)
        checks = operator.run("verify_migration", "--after-restart", "--json").json["checks"]
    return {one["name"]: (one["status"], one["detail"]) for one in checks}


@pytest.mark.matrix  # the guide's migration to voyage-4 and back is run by make test
@pytest.mark.parametrize("provider", [voyage, ollama, LOCAL])
def test_from_openai_to_another_provider_and_back(operator, tmp_path, provider):
    old_size = 768 if provider is ollama else OLD_SIZE  # with Ollama no check of dimensions shows the change
    operator.load(40, size=old_size)
    operator.export(VECTOR_SIZE=old_size)
    operator.run("backup_automem")
    settings = provider(operator, tmp_path)
    operator.export(**settings)
    planned = operator.run("reembed_embeddings", "--dry-run").err
    operator.run("reembed_embeddings")
    status, detail = verified(operator)[PROVIDER_CHECK]
    assert status == "passed", detail
    assert provider.__name__ in detail
    assert f"{settings['VECTOR_SIZE']}d" in planned
    assert "; EMBEDDING_PROVIDER=openai chooses OpenAI" in planned

    operator.run("backup_automem")
    component = operator.run("backup_automem", "--list", "--json").json["sets"][0]["collection"]
    assert component["provider"] == provider.__name__
    operator.exports.clear()
    operator.export(EMBEDDING_PROVIDER="openai", VECTOR_SIZE=old_size, EMBEDDING_MODEL=SMALL)
    operator.run("reembed_embeddings")
    status, detail = verified(operator)[PROVIDER_CHECK]
    assert status == "passed", detail
    assert f"{SMALL} of openai" in detail


@pytest.mark.matrix
def test_a_smaller_size_of_voyage_costs_nothing(operator):
    operator.load(40)
    operator.run("backup_automem")
    operator.export(**voyage(operator, None))
    operator.export(VECTOR_SIZE=2048)
    operator.run("reembed_embeddings")
    operator.run("backup_automem")
    operator.export(VECTOR_SIZE=512)
    assert "0 texts, 0 tokens" in operator.run("reembed_embeddings").err
    operator.run("verify_migration")


@pytest.mark.matrix
def test_a_service_on_another_provider_is_reported(operator):
    operator.load(40)
    operator.run("backup_automem", "--only", "qdrant")
    operator.export(**voyage(operator, None), EMBEDDING_PROVIDER="openai", EMBEDDING_MODEL=SMALL)
    operator.run("reembed_embeddings")
    with operator.restarted():
        operator.export(EMBEDDING_PROVIDER="openai")
        before = operator.run("verify_migration", "--json").json["checks"]
    assert next(one for one in before if one["name"] == PROVIDER_CHECK)["status"] == "not checked"
    operator.export(EMBEDDING_PROVIDER="voyage")
    with operator.restarted():
        body = {"content": "embedded by Voyage, searched by OpenAI"}
        requests.post(f"{operator.environ['AUTOMEM_API_URL']}/memory", json=body, timeout=20).raise_for_status()
        time.sleep(2)
        operator.export(EMBEDDING_PROVIDER="openai")
        paid = operator.servers.openai.stats()["texts"]
        checks = operator.run("verify_migration", "--after-restart", "--json", expect=4).json["checks"]
        again = operator.run("verify_migration", "--after-restart", "--json", expect=4).json["checks"]
    found = next(one for one in checks if one["name"] == PROVIDER_CHECK)
    assert found["status"] == "FAILED"
    assert f"not {SMALL} of openai" in found["detail"]
    assert found == next(one for one in again if one["name"] == PROVIDER_CHECK)
    assert operator.servers.openai.stats()["texts"] <= paid + 1 + 20  # one of ours, and the queries of AutoMem's recall


def detail_of(checks: list[dict[str, str]]) -> str:
    return next(one["detail"] for one in checks if one["name"] == PROVIDER_CHECK)


def store(operator, *contents: str) -> None:
    """Have the running AutoMem store memories, and wait for their vectors."""
    for content in contents:
        url = f"{operator.environ['AUTOMEM_API_URL']}/memory"
        requests.post(url, json={"content": content}, timeout=20).raise_for_status()
    deadline = time.monotonic() + 20
    while len(points_of(operator)) < len(embeddable(operator)) and time.monotonic() < deadline:
        time.sleep(0.1)


def store_placeholders(operator) -> None:
    """Migrate, have AutoMem store two memories with placeholder vectors, and correct its provider."""
    operator.load(40)
    operator.run("backup_automem", "--only", "qdrant")
    operator.export(**voyage(operator, None))
    operator.run("reembed_embeddings")
    operator.export(EMBEDDING_PROVIDER="placeholder")
    with operator.restarted():
        store(operator, "number 0 without meaning", "number 1 without meaning")
    operator.export(EMBEDDING_PROVIDER="voyage")


def remedy_of_placeholders(operator) -> str:
    """The remedy that a verification prints after `store_placeholders`."""
    store_placeholders(operator)
    return failed_remedy(operator)


def failed_remedy(operator) -> str:
    checks = operator.run("verify_migration", "--after-restart", "--json", expect=4).json["checks"]
    found = next(one for one in checks if one["name"] == PROVIDER_CHECK)
    assert found["status"] == "FAILED"
    assert "\nthen replace the vectors that it made:\n" in found["remedy"]
    return str(found["remedy"])


@pytest.mark.matrix
def test_what_automem_embedded_with_another_model_is_replaced(operator):
    """At the same size nothing else shows such vectors, and a re-embed finds the collection up to date."""
    assert remedy_of_placeholders(operator).endswith("reembed_embeddings.py --only-missing")
    assert "2 texts" in operator.run("reembed_embeddings", "--only-missing", "--dry-run").out
    assert operator.run("reembed_embeddings", "--only-missing", "--json").json["mended"] == 2
    assert_vectors(points_of(operator), "voyage-4", 256)
    status, detail = verified(operator)[PROVIDER_CHECK]  # AutoMem has stored another memory
    assert status == "passed", detail
    assert "0 texts" in operator.run("reembed_embeddings", "--only-missing", "--dry-run").out


@pytest.mark.matrix
def test_after_a_restore_other_vectors_are_replaced_with_a_backup_alone(operator):
    """What was restored may be another model's as a whole."""
    remedy_of_placeholders(operator)
    operator.run("backup_automem", "--only", "qdrant")
    operator.run("restore_from_backup", operator.archive())
    assert failed_remedy(operator).endswith("reembed_embeddings.py --fresh")
    operator.run("backup_automem", "--only", "qdrant")
    operator.run("reembed_embeddings", "--fresh")
    assert_vectors(points_of(operator), "voyage-4", 256)


@pytest.mark.matrix
def test_other_vectors_before_a_right_one_are_found_too(operator):
    """AutoMem was restarted with the right settings: its newest vector is right."""
    store_placeholders(operator)
    with operator.restarted():
        store(operator, "embedded by the right model")
        operator.servers.openai.fault(status=400)
        refused = operator.run("verify_migration", "--json", expect=None).json["checks"]
        assert "not yet known: " in (unknown := detail_of(refused)), unknown
        assert " cannot embed even a plain word: 400" in unknown
        operator.servers.openai.clear_faults()
        before = operator.servers.openai.stats()["texts"]
        checks = operator.run("verify_migration", "--json", "--sample", "1", expect=4).json["checks"]
        paid = operator.servers.openai.stats()["texts"] - before
        again = operator.run("verify_migration", "--json", "--sample", "1", expect=4).json["checks"]
        assert operator.servers.openai.stats()["texts"] - before - paid == paid - 3  # the queries of AutoMem's recall
    found = next(one for one in checks if one["name"] == PROVIDER_CHECK)
    assert found == next(one for one in again if one["name"] == PROVIDER_CHECK)
    assert found["status"] == "FAILED"
    assert "voyage-4 of voyage now, but not always since the migration" in found["detail"]
    assert found["detail"].endswith("the least of 3")
    assert found["remedy"].startswith("replace the vectors that it made before it was restarted:\n")
    assert operator.run("reembed_embeddings", "--only-missing", "--json").json["mended"] == 2
    assert_vectors(points_of(operator), "voyage-4", 256)
    operator.run("verify_migration")


@pytest.mark.matrix
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--limit", "20"), ("--no-switch",)])
def test_a_model_served_under_the_same_name_is_not_mixed_with_the_earlier_one(operator, more):
    """The model is updated between a run that was stopped and its resume. With a list price, the name is enough."""
    operator.load(60, size=768)
    operator.run("backup_automem", env={"VECTOR_SIZE": "768"})
    operator.export(**ollama(operator, None))
    provider = operator.servers.openai
    provider.fault(status=401, after=2)
    operator.run("reembed_embeddings", "--batch-size", "16", expect=6)
    provider.clear_faults()
    provider.fault(other_model=True)
    before = operator.state()
    refused = operator.run("reembed_embeddings", *more, expect=2)
    assert (
        "the vectors in the embedding cache were not made by nomic-embed-text at 768d as it answers now" in refused.err
    )
    assert refused.err.rstrip().endswith("scripts/reembed_embeddings.py --fresh")
    assert operator.state() == before
    operator.run("reembed_embeddings", "--fresh")
    points = [(payload, vector[::-1]) for payload, vector in points_of(operator).values()]
    whole = [one for one in points if len(one[0]["content"]) < 1000]  # Ollama cuts a text over its context
    assert_vectors(dict(enumerate(whole)), "nomic-embed-text", 768)
