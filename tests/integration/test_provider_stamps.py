"""A whole migration from OpenAI to Voyage and back: AutoMem after its restart, the records, the printed commands."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.operator_support import LARGE, OLD_SIZE, SMALL, Operator
from tests.reembed_support import assert_vectors, points_of
from tests.sandbox.automem_server import AutoMemServer

pytestmark = pytest.mark.qdrant
VOYAGE_KEY = "pa-sandbox-that-nobody-sees"
SIZE = 256  # the smallest that Voyage makes


@pytest.fixture
def operator(operator, tmp_path):
    """OpenAI's vectors and a backup of them; a Voyage key in AutoMem's own file, which decides at 256d."""
    operator.load(60)
    operator.run("backup_automem")
    (tmp_path / "automem.env").write_text(f"VOYAGE_API_KEY={VOYAGE_KEY}\n")
    operator.export(AUTOMEM_ENV_FILE=tmp_path / "automem.env", VOYAGE_BASE_URL=operator.servers.openai.voyage_url)
    operator.export(VECTOR_SIZE=SIZE, EMBEDDING_MODEL=LARGE)
    operator.servers.openai.reset()
    return operator


def stamp_of(operator: Operator) -> dict[str, object]:
    """Skips on a server before 1.16, which keeps no metadata."""
    if not operator.info()["config"].get("metadata"):
        pytest.skip("this server keeps no metadata: nothing records which model made the vectors")
    return operator.info()["config"]["metadata"]["automem_migration"]


def test_automem_recalls_by_the_vectors_of_the_provider_that_it_chooses(operator):
    """With vectors of OpenAI, which today's settings name, every memory would be found by keywords alone."""
    done = operator.run("reembed_embeddings")
    assert_vectors(points_of(operator), "voyage-4", SIZE)
    assert operator.servers.openai.stats()["models"].keys() == {"voyage-4"}
    with AutoMemServer(env={**operator.environ, "VOYAGE_API_KEY": VOYAGE_KEY}) as automem:
        verified = operator.run("verify_migration", "--after-restart", env={"AUTOMEM_API_URL": automem.url})
    assert "samples come first by vector" in verified.out
    assert "  restart AutoMem so that it sees VECTOR_SIZE, EMBEDDING_PROVIDER and VOYAGE_MODEL:\n" in done.out
    assert "set them in AutoMem's .env" in done.out


@pytest.mark.matrix
def test_the_records_name_the_provider_and_an_old_record_is_openais(operator):
    before = json.loads(operator.manifests()[-1].read_text())["collection"]
    assert "provider" not in before
    operator.run("reembed_embeddings")
    assert {key: value for key, value in stamp_of(operator).items() if key != "at"} == {
        "model": "voyage-4",
        "size": SIZE,
        "provider": "voyage",
    }
    operator.run("backup_automem")
    after = json.loads(operator.manifests()[-1].read_text())["collection"]
    assert (after["model"], after["model_known"], after["provider"]) == ("voyage-4", "stamped", "voyage")
    operator.run("backup_automem", "--check", str(operator.manifests()[-1]))
    shutil.rmtree(operator.backups / "embeddings")  # with the cache a run is free
    assert operator.run("reembed_embeddings", "--json").json["already"]
    gateway = {"EMBEDDING_PROVIDER": "openai", "EMBEDDING_MODEL": "voyage-4", "AUTOMEM_ENV_FILE": ""}
    assert "this would cost" in operator.run("reembed_embeddings", "--max-cost", "0", expect=2, env=gateway).err


@pytest.mark.matrix
def test_one_name_of_two_providers_is_two_models(operator):
    """A gateway may give its model any name."""
    operator.run("reembed_embeddings")
    assert stamp_of(operator)["provider"] == "voyage"
    gateway = {"EMBEDDING_PROVIDER": "openai", "EMBEDDING_MODEL": "voyage-4", "AUTOMEM_ENV_FILE": ""}
    result = operator.run("verify_migration", "--json", expect=4, env=gateway)
    (check,) = [one for one in result.json["checks"] if one["name"] == "model stamp"]
    assert check["status"] == "FAILED"
    assert check["detail"] == "voyage-4 of voyage, the settings choose voyage-4 of openai"
    assert "export EMBEDDING_PROVIDER=voyage VOYAGE_MODEL=voyage-4" in check["remedy"]


@pytest.mark.matrix
def test_the_undo_brings_back_openai_by_name(operator):
    before = operator.state()
    done = operator.run("reembed_embeddings")
    undo = done.out[done.out.index("undo:") : done.out.index("next:")]
    exports = dict(re.findall(r"export (\w+)=(\S+)", undo))
    assert exports == {"VECTOR_SIZE": str(OLD_SIZE), "EMBEDDING_PROVIDER": "openai", "EMBEDDING_MODEL": SMALL}
    restore = re.search(r"restore_from_backup\.py (\S+)", undo)
    restored = operator.run("restore_from_backup", restore[1])
    assert operator.state().collection == before.collection
    assert f"  export EMBEDDING_PROVIDER=openai\n  export EMBEDDING_MODEL={SMALL}\n" in restored.out
    assert "EMBEDDING_PROVIDER=openai" in restored.out
    operator.export(**exports, AUTOMEM_ENV_FILE="")
    operator.run("reembed_embeddings", "--only-missing")
