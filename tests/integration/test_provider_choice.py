"""Which provider a re-embed uses, as an operator meets it: the trap of a shared `.env`, the refusals, the plan."""

from __future__ import annotations

import pytest

from tests.operator_support import KEY, LARGE, OLD_SIZE, SMALL, Operator

pytestmark = pytest.mark.qdrant
VOYAGE_KEY = "pa-sandbox-that-nobody-sees"
MODES = ("", "--dry-run", "--only-missing", "--limit 3", "--no-switch", "--in-place", "--fresh")


@pytest.fixture(scope="module")
def stocked(session_servers, tmp_path_factory):
    """An operator with both stores filled and a backup. AutoMem's own file has a Voyage key, and nothing else."""
    someone = Operator(session_servers, tmp_path_factory.mktemp("providers"))
    someone.load(40)
    someone.run("backup_automem")
    before = someone.state()
    yield someone
    assert someone.state() == before
    someone.clean_up()


@pytest.fixture
def operator(stocked, tmp_path):
    """The guide's settings for 1024d in the shell, and AutoMem's file by AUTOMEM_ENV_FILE. Nothing may be paid for."""
    stocked.exports.clear()
    file = tmp_path / "automem.env"
    file.write_text(f"A=1\nVOYAGE_API_KEY={VOYAGE_KEY}\n")
    stocked.export(VECTOR_SIZE=1024, EMBEDDING_MODEL=LARGE, OPENAI_API_KEY=KEY, AUTOMEM_ENV_FILE=file)
    stocked.servers.openai.reset()
    yield stocked
    assert stocked.servers.openai.stats()["requests"] == 0
    stocked.exports.clear()


def test_the_trap_a_voyage_key_in_automems_file_at_a_size_that_both_make(operator, tmp_path):
    """AutoMem would ask with voyage-4. Vectors of OpenAI would pass every check of dimensions and find nothing."""
    result = operator.run("reembed_embeddings", "--max-cost", "0", "--in-place", expect=2)
    reason = f"because VOYAGE_API_KEY is set in {tmp_path / 'automem.env'}:2; EMBEDDING_PROVIDER=openai chooses OpenAI"
    assert f"model            voyage-4 at 1024d from api.voyageai.com, {reason}\n" in result.err
    assert LARGE not in result.err
    assert VOYAGE_KEY not in result.err + result.out


@pytest.mark.parametrize("mode", MODES)
def test_openai_by_export_alone_is_refused_in_every_mode(operator, tmp_path, mode):
    result = operator.run("reembed_embeddings", *mode.split(), "--json", expect=2, env={"EMBEDDING_PROVIDER": "openai"})
    file = tmp_path / "automem.env"
    assert f"AutoMem will use voyage-4 of Voyage, because VOYAGE_API_KEY is set in {file}:2" in result.json["error"]
    assert f"in {file}:\n  EMBEDDING_PROVIDER=openai\n" in result.json["next"]
    assert "or here:\nexport EMBEDDING_PROVIDER=voyage VOYAGE_MODEL=voyage-4" in result.json["next"]
    assert VOYAGE_KEY not in result.err + result.out


def test_verify_names_the_provider_of_automems_file_too(operator):
    """These settings alone choose the collection's size and model, so that every check passes."""
    env = {"EMBEDDING_PROVIDER": "openai", "VECTOR_SIZE": str(OLD_SIZE), "EMBEDDING_MODEL": SMALL}
    passed = operator.run("verify_migration", "--json", env=env).json["checks"]
    assert next(one for one in passed if one["name"] == "AutoMem's model")["detail"].startswith(f"{SMALL} of openai,")
    for word in ("ollama", "placeholder"):
        (operator.folder / "automem.env").write_text(f"EMBEDDING_PROVIDER={word}\n")
        settings = {**env, "AUTOMEM_ENV_FILE": str(operator.folder / "automem.env")}
        checks = operator.run("verify_migration", "--json", env=settings).json["checks"]
        detail = next(one for one in checks if one["name"] == "AutoMem's model")["detail"]
        assert f"{SMALL} of openai, but a re-embed is refused: AutoMem will use " in detail
        assert word in detail


def test_the_printed_line_settles_it(operator, tmp_path):
    refused = operator.run("reembed_embeddings", "--json", expect=2, env={"EMBEDDING_PROVIDER": "openai"})
    lines = [line.strip() for line in refused.json["next"].splitlines() if line.startswith("  ")]
    file = tmp_path / "automem.env"
    file.write_text(file.read_text() + "\n".join(lines) + "\n")
    result = operator.run("reembed_embeddings", "--max-cost", "0", expect=2)
    assert "this would cost" in result.err
    assert f"{LARGE} at 1024d from 127.0.0.1" in result.err


def test_a_linked_env_file_is_automems(operator, tmp_path):
    """The guide has the operator link it."""
    operator.export(AUTOMEM_ENV_FILE="")
    link = operator.folder / ".env"
    link.symlink_to(tmp_path / "automem.env")
    try:
        refused = operator.run("reembed_embeddings", expect=2, env={"EMBEDDING_PROVIDER": "openai"})
    finally:
        link.unlink()
    assert f"AutoMem will use voyage-4 of Voyage, because VOYAGE_API_KEY is set in {link}:2" in refused.err


@pytest.mark.parametrize(
    ("settings", "expected", "step"),
    [
        ({"EMBEDDING_PROVIDER": "placeholder"}, "makes vectors without meaning", "export EMBEDDING_PROVIDER=openai"),
        (
            {"EMBEDDING_PROVIDER": "cohere"},
            "EMBEDDING_PROVIDER must be one of auto, ",
            "export EMBEDDING_PROVIDER=openai",
        ),
        ({"EMBEDDING_PROVIDER": "local"}, "makes vectors of 384, 768, 1024 dimensions", "export VECTOR_SIZE=384"),
        ({"EMBEDDING_PROVIDER": "voyage"}, "VOYAGE_API_KEY is not set", "export VOYAGE_API_KEY=..."),
        ({"EMBEDDING_MODEL": ""}, f"EMBEDDING_MODEL is not set: at {OLD_SIZE}d", f"export EMBEDDING_MODEL={SMALL}"),
        (
            {"OPENAI_BASE_URL": "https://me:hidden@gateway.invalid/v1"},
            "AutoMem sends no `dimensions` to gateway.invalid (OPENAI_BASE_URL): it gets 3072d vectors",
            "export VECTOR_SIZE=3072",
        ),
    ],
)
def test_a_reembed_is_refused_and_no_other_command(operator, settings, expected, step):
    operator.export(VECTOR_SIZE=OLD_SIZE, AUTOMEM_ENV_FILE="", **settings)
    refused = operator.run("reembed_embeddings", "--json", expect=2)
    assert expected in refused.json["error"]
    assert step in refused.json["next"]
    shown = operator.run("backup_automem", "--show-config", "--json").json["embedding"]
    assert expected in shown["problem"]
    operator.run("backup_automem", "--dry-run")
    operator.run("restore_from_backup", "latest", "--dry-run")
    operator.run("verify_migration")
    assert "hidden" not in f"{refused.out}{refused.err}{shown}"


def test_show_config_prints_the_choice_its_endpoint_and_its_reason(operator, tmp_path):
    document = operator.run("verify_migration", "--show-config", "--json").json["embedding"]
    reason = f"because VOYAGE_API_KEY is set in {tmp_path / 'automem.env'}:2; EMBEDDING_PROVIDER=openai chooses OpenAI"
    assert document == {
        "provider": "voyage",
        "model": "voyage-4",
        "size": 1024,
        "endpoint": "https://api.voyageai.com/v1",
        "why": reason,
        "problem": "",
    }
    text = operator.run("verify_migration", "--show-config").out
    assert f"\nembedding: voyage-4 at 1024d from api.voyageai.com, {reason}\n" in text
    assert VOYAGE_KEY not in text


def test_an_endpoint_of_this_machine_is_only_a_warning(operator):
    """A proxy on this machine may ask OpenAI itself."""
    operator.export(AUTOMEM_ENV_FILE="")
    result = operator.run("reembed_embeddings", "--max-cost", "0", expect=2)
    assert "warning: AutoMem sends no `dimensions` to 127.0.0.1 (OPENAI_BASE_URL): it gets 3072d vectors" in result.err
    assert "this would cost" in result.err
