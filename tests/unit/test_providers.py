"""The provider, model and size that AutoMem itself chooses, and the settings that a re-embed refuses."""

from __future__ import annotations

import json

import pytest

from lib.config import load_config, require_embedding
from lib.dimensions import provider_problem, reason_shown
from lib.errors import USAGE, ConfigError, UsageProblem
from tests.script_process import ROOT

RECORDED = json.loads((ROOT / "tests" / "data" / "automem_providers.json").read_text())
ROWS = RECORDED["rows"]
LARGE, SMALL = "text-embedding-3-large", "text-embedding-3-small"
OPENAI_KEY, VOYAGE_KEY = "sk-that-nobody-sees", "pa-that-nobody-sees"


@pytest.fixture
def load(tmp_path):
    """Load with this environment and this text of AutoMem's own file."""

    def loaded(automem=None, **environ):
        for name in ("cwd", "root"):
            (tmp_path / name).mkdir(exist_ok=True)
        file = tmp_path / "automem.env"
        if automem is not None:
            file.write_text(automem)
        return load_config(
            {"HOME": str(tmp_path / "home"), **environ},
            env_file=str(file) if automem is not None else None,
            cwd=tmp_path / "cwd",
            root=tmp_path / "root",
        )

    return loaded


def problem_of(config) -> UsageProblem | None:
    """What a re-embed ends with before it does anything."""
    problem = provider_problem(config.settings, config.spec)
    if problem is None:
        try:
            require_embedding(config)
        except UsageProblem as error:
            problem = error
    assert problem is None or problem.exit_code == USAGE
    return problem


def test_the_matrix_is_of_the_version_that_the_documents_name():
    assert RECORDED["automem"].startswith("0.16.")
    assert len(ROWS) >= 40
    assert {row["automem"].get("provider") for row in ROWS} == {
        "openai",
        "voyage",
        "ollama",
        "local",
        "placeholder",
        None,
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(f"{k}={v}" for k, v in row["settings"].items()))
def test_each_row_as_automem_itself_chooses(load, row):
    """The same provider, model and size, or a refusal: never a quiet difference."""
    settings, automem = row["settings"], row["automem"]
    if settings.get("OLLAMA_TIMEOUT") == "soon":
        with pytest.raises(ConfigError, match="OLLAMA_TIMEOUT=soon"):
            load(**settings)
        return
    config = load(**settings)
    problem = problem_of(config)
    if "raises" in automem:
        assert problem is not None
        return
    chosen = config.choice.provider, config.choice.model
    assert chosen == (automem["provider"], automem["model"])
    if problem is None:
        used = config.spec.provider, config.spec.model, config.spec.size
        assert used == (automem["provider"], automem["model"], automem["size"])


def refused(row) -> bool:
    """Rows that AutoMem accepts and a re-embed does not, by their reason."""
    settings, automem = row["settings"], row["automem"]
    size = int(settings.get("VECTOR_SIZE") or settings["QDRANT_VECTOR_SIZE"])
    asked = settings.get("EMBEDDING_MODEL", "")
    return (
        automem["provider"] == "placeholder"
        or size != automem["size"]  # AutoMem's local model makes another size
        or (automem["provider"] == "local" and "local" not in settings.get("EMBEDDING_PROVIDER", "").lower())
        or (automem["provider"] == "openai" and not asked and size <= 1536)
        or (asked.endswith(SMALL) and size > 1536)
    )


def test_only_these_rows_are_refused_though_automem_accepts_them(load):
    accepted = [row for row in ROWS if "raises" not in row["automem"]]
    for row in accepted:
        assert (problem_of(load(**row["settings"])) is not None) == refused(row), row["settings"]
    assert sum(not refused(row) for row in accepted) >= 40


@pytest.mark.parametrize(
    ("environ", "endpoint", "key"),
    [
        ({}, "https://api.openai.com/v1", ""),
        ({"OPENAI_API_KEY": OPENAI_KEY}, "https://api.openai.com/v1", OPENAI_KEY),
        ({"VOYAGE_API_KEY": VOYAGE_KEY, "VECTOR_SIZE": "1024"}, "https://api.voyageai.com/v1", VOYAGE_KEY),
        (
            {"EMBEDDING_PROVIDER": "voyage", "VOYAGE_API_KEY": VOYAGE_KEY, "VOYAGE_BASE_URL": "http://127.0.0.1:9/v1/"},
            "http://127.0.0.1:9/v1",
            VOYAGE_KEY,
        ),
        ({"OLLAMA_MODEL": "bge-m3"}, "http://localhost:11434/v1", ""),
        ({"OLLAMA_BASE_URL": "http://ollama:1/"}, "http://ollama:1/v1", ""),
        ({"EMBEDDING_PROVIDER": "local", "OPENAI_API_KEY": OPENAI_KEY}, "local:fastembed", ""),
    ],
)
def test_each_provider_has_its_endpoint_and_its_key(load, environ, endpoint, key):
    config = load(**environ)
    assert (config.spec.base_url, config.embedding_key) == (endpoint, key)


def test_a_default_does_not_count_as_set(load):
    """OLLAMA_BASE_URL and OLLAMA_MODEL have defaults, and choose Ollama only if somebody set them."""
    assert load().spec.provider == "openai"
    assert load(OLLAMA_TIMEOUT="5", VOYAGE_MODEL="voyage-4-lite").spec.provider == "openai"
    assert load(OLLAMA_MODEL="nomic-embed-text").spec.provider == "ollama"


def test_the_older_name_of_the_size_counts_if_the_newer_one_is_set_nowhere(load, tmp_path):
    config = load(automem="A=1\nQDRANT_VECTOR_SIZE=768\n")
    assert config.vector_size == 768
    assert config.settings["VECTOR_SIZE"].origin == f"{tmp_path / 'automem.env'}:2"
    assert load(automem="VECTOR_SIZE=512\n", QDRANT_VECTOR_SIZE="768").vector_size == 512
    with pytest.raises(ConfigError, match="VECTOR_SIZE=many"):
        load(QDRANT_VECTOR_SIZE="many")


def test_an_empty_line_of_automem_hides_its_later_file_as_it_does_for_automem(load, tmp_path):
    """AutoMem's `.env` is read first, and its example has `OPENAI_API_KEY=`. A file of these scripts alone counts."""
    later = tmp_path / "home" / ".config" / "automem" / ".env"
    later.parent.mkdir(parents=True)
    later.write_text(f"VOYAGE_API_KEY={VOYAGE_KEY}\nOPENAI_API_KEY={OPENAI_KEY}\n")
    assert load("A=1\n", VECTOR_SIZE="1024").spec.provider == "voyage"
    config = load("A=1\nVOYAGE_API_KEY=\n", VECTOR_SIZE="1024")
    assert (config.spec.provider, config.embedding_key) == ("openai", OPENAI_KEY)
    first = tmp_path / "automem.env"
    assert config.warnings == (
        f"VOYAGE_API_KEY ({later}:1) has no effect, as in AutoMem: it is empty in {first}:2, which is read first",
    )
    config = load("OPENAI_API_KEY=\nVOYAGE_API_KEY\n", VECTOR_SIZE="1024")
    assert (config.spec.provider, config.settings["OPENAI_API_KEY"].value) == ("voyage", "")
    (tmp_path / "cwd" / ".env").write_text("OPENAI_API_KEY=sk-of-these-scripts\n")
    assert load("OPENAI_API_KEY=\n", VECTOR_SIZE="768").embedding_key == "sk-of-these-scripts"


# --- why ---------------------------------------------------------------------------------------------------------


def reason_of(config) -> str:
    return reason_shown(config.settings, config.spec)


@pytest.mark.parametrize("word", ["", "openai", "auto"])
def test_the_guides_settings_alone_need_no_reason(load, word):
    assert reason_of(load(OPENAI_API_KEY=OPENAI_KEY, EMBEDDING_MODEL=LARGE, EMBEDDING_PROVIDER=word)) == ""


def test_the_reason_names_the_setting_its_origin_and_the_way_to_openai(load, tmp_path):
    key = f"A=1\nVOYAGE_API_KEY={VOYAGE_KEY}\n"
    origin = f"{tmp_path / 'automem.env'}:2"
    assert reason_of(load(key, VECTOR_SIZE="1024", OPENAI_API_KEY=OPENAI_KEY)) == (
        f"because VOYAGE_API_KEY is set in {origin}; EMBEDDING_PROVIDER=openai chooses OpenAI"
    )
    assert reason_of(load(key, VECTOR_SIZE="768", OPENAI_API_KEY=OPENAI_KEY)) == (
        "because OPENAI_API_KEY is set in the environment, and Voyage (VOYAGE_API_KEY in"
        f" {origin}) makes no 768d vectors"
    )
    assert reason_of(load(key, VECTOR_SIZE="1024", EMBEDDING_PROVIDER=" OpenAI ")) == (
        "because EMBEDDING_PROVIDER is openai in the environment"
    )


# --- refusals ----------------------------------------------------------------------------------------------------


def assert_problem(config, *words: str, step: str) -> None:
    problem = provider_problem(config.settings, config.spec)
    assert problem is not None
    for word in words:
        assert word in str(problem)
    assert step in problem.next_step
    assert VOYAGE_KEY not in f"{problem}{problem.next_step}"
    assert OPENAI_KEY not in f"{problem}{problem.next_step}"


BOTH = {"OPENAI_API_KEY": OPENAI_KEY, "VECTOR_SIZE": "1024", "EMBEDDING_MODEL": LARGE}


def test_another_provider_than_that_of_automems_file_is_named_with_the_lines_that_settle_it(load, tmp_path):
    config = load(f"VOYAGE_API_KEY={VOYAGE_KEY}\n", **BOTH, EMBEDDING_PROVIDER="openai")
    file = tmp_path / "automem.env"
    assert_problem(
        config,
        f"AutoMem will use voyage-4 of Voyage, because VOYAGE_API_KEY is set in {file}:1.",
        f"These settings choose {LARGE} of OpenAI, because EMBEDDING_PROVIDER is openai in the environment",
        step=(
            f"in {file}:\n  EMBEDDING_PROVIDER=openai\n  EMBEDDING_MODEL={LARGE}\n"
            "or here:\nexport EMBEDDING_PROVIDER=voyage VOYAGE_MODEL=voyage-4"
        ),
    )


@pytest.mark.parametrize(
    ("automem", "environ"),
    [
        (f"VOYAGE_API_KEY={VOYAGE_KEY}\n", {"EMBEDDING_PROVIDER": "openai"}),
        (f"VOYAGE_API_KEY={VOYAGE_KEY}\nEMBEDDING_PROVIDER=auto\n", {"EMBEDDING_PROVIDER": "openai"}),
        ("EMBEDDING_PROVIDER=openai\n", {"EMBEDDING_PROVIDER": "local"}),
        ("EMBEDDING_PROVIDER=placeholder\n", {"EMBEDDING_PROVIDER": "openai"}),
        (f"OPENAI_API_KEY={OPENAI_KEY}\n", {"VOYAGE_API_KEY": VOYAGE_KEY}),
        (f"OPENAI_API_KEY={OPENAI_KEY}\n", {"EMBEDDING_PROVIDER": "ollama"}),
        ("OLLAMA_MODEL=bge-m3\n", {}),
        ("OLLAMA_BASE_URL=http://ollama:11434\n", {"EMBEDDING_PROVIDER": "openai"}),
        ("OLLAMA_MODEL=bge-m3\n", {"EMBEDDING_PROVIDER": "ollama", "OLLAMA_MODEL": "mxbai-embed-large"}),
        (f"VOYAGE_API_KEY={VOYAGE_KEY}\n", {"VOYAGE_MODEL": "voyage-4-large"}),
        ("VOYAGE_MODEL=voyage-4-lite\n", {"VOYAGE_API_KEY": VOYAGE_KEY, "VOYAGE_MODEL": "voyage-4"}),
    ],
)
def test_a_choice_that_automem_makes_differently_is_refused(load, automem, environ):
    assert_problem(load(automem, **BOTH, **environ), "AutoMem will use ", step="automem.env:\n  EMBEDDING_PROVIDER=")


@pytest.mark.parametrize(
    ("automem", "environ"),
    [
        ("FALKORDB_GRAPH=memories\n", {"EMBEDDING_PROVIDER": "openai", "VOYAGE_API_KEY": VOYAGE_KEY}),
        (f"OPENAI_API_KEY={OPENAI_KEY}\n", {}),
        (f"OPENAI_API_KEY={OPENAI_KEY}\n", {"EMBEDDING_PROVIDER": "openai"}),
        (f"EMBEDDING_MODEL={SMALL}\n", {"EMBEDDING_PROVIDER": "openai", "VOYAGE_API_KEY": VOYAGE_KEY}),
        ("EMBEDDING_PROVIDER=openai\n", {"VOYAGE_API_KEY": VOYAGE_KEY}),
        (f"VOYAGE_API_KEY={VOYAGE_KEY}\n", {}),
        (f"VOYAGE_API_KEY={VOYAGE_KEY}\n", {"EMBEDDING_PROVIDER": "voyage"}),
        (f"VOYAGE_API_KEY={VOYAGE_KEY}\n", {"EMBEDDING_PROVIDER": "openai", "VECTOR_SIZE": "3072"}),
        (f"VOYAGE_API_KEY={VOYAGE_KEY}\n", {"VECTOR_SIZE": "3072"}),
        (
            "EMBEDDING_PROVIDER=ollama\nOLLAMA_BASE_URL=http://ollama:11434\n",
            {"OLLAMA_BASE_URL": "http://localhost:11434", "VECTOR_SIZE": "768"},
        ),
        ("EMBEDDING_PROVIDER=ollama\nOLLAMA_MODEL=bge-m3:latest\n", {"OLLAMA_MODEL": "bge-m3"}),
    ],
)
def test_a_choice_that_automem_makes_too_or_that_its_files_leave_open_is_not(load, automem, environ):
    assert problem_of(load(automem, **{**BOTH, **environ})) is None


def test_a_link_is_automems_file_and_a_copy_is_this_checkouts(load, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "theirs.env").write_text(f"VOYAGE_API_KEY={VOYAGE_KEY}\n")
    own = tmp_path / "root" / ".env"
    own.symlink_to(tmp_path / "theirs.env")
    assert_problem(load(**BOTH, EMBEDDING_PROVIDER="openai"), "AutoMem will use voyage-4", step=f"in {own}:\n")
    own.unlink()
    own.write_text(f"VOYAGE_API_KEY={VOYAGE_KEY}\n")
    assert problem_of(load(**BOTH, EMBEDDING_PROVIDER="openai")) is None


def test_a_model_that_is_set_nowhere_is_refused_at_a_size_of_both_defaults(load):
    settings = {"OPENAI_API_KEY": OPENAI_KEY}
    expected = f"EMBEDDING_MODEL is not set: at 1536d AutoMem then uses {SMALL}, these scripts {LARGE}"
    assert_problem(load(**settings, VECTOR_SIZE="1536"), expected, step=f"export EMBEDDING_MODEL={SMALL}")
    for accepted in ({"VECTOR_SIZE": "1537"}, {"VECTOR_SIZE": "768", "EMBEDDING_MODEL": LARGE}):
        assert problem_of(load(**settings, **accepted)) is None


@pytest.mark.parametrize("model", [SMALL, LARGE, f"openai/{LARGE}"])
def test_a_gateway_at_a_shortened_size_is_refused_with_the_size_that_works(load, model):
    settings = {"OPENAI_API_KEY": OPENAI_KEY, "EMBEDDING_MODEL": model, "VECTOR_SIZE": "768"}
    native = 1536 if model == SMALL else 3072
    gateway = "https://me:hidden@openrouter.ai/api/v1"
    config = load(**settings, OPENAI_BASE_URL=gateway)
    assert_problem(
        config, f"AutoMem sends no `dimensions` to openrouter.ai (OPENAI_BASE_URL): it gets {native}d", step=str(native)
    )
    assert "hidden" not in str(provider_problem(config.settings, config.spec))
    for url in ("http://127.0.0.1:9/v1", "http://localhost:9/v1", "https://api.openai.com/v1", ""):
        assert problem_of(load(**settings, OPENAI_BASE_URL=url)) is None
    assert problem_of(load(**{**settings, "VECTOR_SIZE": str(native)}, OPENAI_BASE_URL=gateway)) is None
    assert problem_of(load(**{**settings, "EMBEDDING_MODEL": "a-gateways-name"}, OPENAI_BASE_URL=gateway)) is None


@pytest.mark.parametrize(
    ("environ", "expected", "step"),
    [
        (
            {"EMBEDDING_PROVIDER": "local", "VECTOR_SIZE": "512"},
            "384, 768, 1024",
            "export VECTOR_SIZE=384\nor:\nexport EMBEDDING_PROVIDER=openai",
        ),
        (
            {"EMBEDDING_PROVIDER": "voyage", "VOYAGE_API_KEY": VOYAGE_KEY, "VECTOR_SIZE": "768"},
            "Voyage makes vectors of 256, 512, 1024, 2048 dimensions, VECTOR_SIZE is 768",
            "export EMBEDDING_PROVIDER=openai",
        ),
        (
            {"EMBEDDING_PROVIDER": "voyage", "VECTOR_SIZE": "1024"},
            "VOYAGE_API_KEY is not set",
            "export VOYAGE_API_KEY=...",
        ),
        ({"EMBEDDING_PROVIDER": "placeholder"}, "without meaning", "export EMBEDDING_PROVIDER=openai"),
        ({"EMBEDDING_PROVIDER": "cohere"}, "must be one of auto, voyage, openai, ollama, local", "=openai"),
    ],
)
def test_what_a_provider_cannot_do_is_refused(load, environ, expected, step):
    assert_problem(load(OPENAI_API_KEY=OPENAI_KEY, **environ), expected, "EMBEDDING_PROVIDER is ", step=step)


def test_without_any_key_the_message_says_what_automem_itself_would_do(load):
    with pytest.raises(UsageProblem, match="OPENAI_API_KEY is not set") as caught:
        require_embedding(load(EMBEDDING_MODEL=LARGE))
    assert (
        "AutoMem itself uses its local model; to use it here, too:\nexport EMBEDDING_PROVIDER=local"
        in caught.value.next_step
    )
    with pytest.raises(UsageProblem, match="OPENAI_API_KEY is not set") as caught:
        require_embedding(load(EMBEDDING_PROVIDER="openai"))
    assert "local model" not in caught.value.next_step
