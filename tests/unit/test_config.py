"""The configuration: the origin of each value, and all faults reported together, without a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.config import DEFAULTS, load_config, require_embedding_key
from lib.dimensions import (
    LOCAL,
    LOCAL_MODELS,
    OLLAMA,
    VOYAGE,
    check_dimension,
    check_model,
    facts_of,
    model_fault,
    takes_dimensions,
)
from lib.env_files import env_files
from lib.errors import USAGE, ConfigError, DimensionMismatch, UsageProblem
from tests.ordinary_user import closed

SECRET = "s3cr3t-that-nobody-sees"
SECRETS = ("FALKORDB_PASSWORD", "QDRANT_API_KEY", "OPENAI_API_KEY", "VOYAGE_API_KEY", "AUTOMEM_API_TOKEN")


@pytest.fixture
def places(tmp_path):
    """A working directory, a project root and a home, each without a `.env` yet."""
    for name in ("cwd", "root", "home/.config/automem"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def load(places):
    """Load with this environment, in the places of the test."""

    def loaded(env_file=None, backup_dir=None, **environ):
        return load_config(
            {"HOME": str(places / "home"), **environ},
            env_file=env_file,
            backup_dir=backup_dir,
            cwd=places / "cwd",
            root=places / "root",
        )

    return loaded


def faults_of(load, *args, **environ):
    with pytest.raises(ConfigError) as caught:
        load(*args, **environ)
    assert caught.value.exit_code == USAGE
    return caught.value.faults


def test_each_source_beats_the_ones_after_it(places, load):
    files = {
        "named": places / "automem.env",
        "cwd": places / "cwd" / ".env",
        "root": places / "root" / ".env",
        "home": places / "home" / ".config" / "automem" / ".env",
    }
    for name, path in files.items():
        path.write_text(f"FALKORDB_GRAPH={name}\n")
    named = str(files["named"])

    assert load(named, FALKORDB_GRAPH="environment").graph == "environment"
    assert load(named).graph == "named"
    assert load(AUTOMEM_ENV_FILE=named).graph == "named"
    for name in ("cwd", "root", "home"):
        config = load()
        assert config.graph == name
        assert config.settings["FALKORDB_GRAPH"].origin == f"{files[name]}:1"
        files[name].unlink()
    assert load().graph == "memories"
    assert load().settings["FALKORDB_GRAPH"].origin == "default"


def test_the_flag_beats_the_variable_that_names_an_env_file(places, load):
    (places / "a.env").write_text("VECTOR_SIZE=100\n")
    (places / "b.env").write_text("VECTOR_SIZE=200\n")
    assert load(str(places / "a.env"), AUTOMEM_ENV_FILE=str(places / "b.env")).vector_size == 100


def test_an_env_file_may_be_named_from_the_working_directory_or_from_home(places, load):
    (places / "cwd" / "mine.env").write_text("VECTOR_SIZE=100\n")
    (places / "home" / "mine.env").write_text("VECTOR_SIZE=200\n")
    assert load("mine.env").vector_size == 100
    assert load(AUTOMEM_ENV_FILE="~/mine.env").vector_size == 200


@pytest.mark.parametrize("flag", ["--env-file", "AUTOMEM_ENV_FILE"])
def test_a_named_file_that_is_missing_is_reported_with_the_other_faults(places, load, flag):
    path = str(places / "nowhere.env")
    if flag == "--env-file":
        faults = faults_of(load, path, VECTOR_SIZE="abc")
    else:
        faults = faults_of(load, AUTOMEM_ENV_FILE=path, VECTOR_SIZE="abc")
    assert faults[0] == f"{flag} names {path}, which is not a file"
    assert len(faults) == 2


def test_the_backup_folder_of_the_flag_wins_and_is_reported(places, load):
    config = load(backup_dir=str(places / "elsewhere"), AUTOMEM_BACKUP_DIR="/nowhere")
    assert config.backup_dir == places / "elsewhere"
    assert config.settings["AUTOMEM_BACKUP_DIR"].origin == "--backup-dir"


def test_the_last_of_duplicate_lines_wins_and_is_the_one_that_is_named(places, load):
    path = places / "cwd" / ".env"
    path.write_text("VECTOR_SIZE=768\n\n# a comment\n\nexport VECTOR_SIZE=1536\nFALKORDB_GRAPH='g'\n")
    config = load()
    assert config.vector_size == 1536
    assert config.settings["VECTOR_SIZE"].origin == f"{path}:5"
    assert config.settings["FALKORDB_GRAPH"].origin == f"{path}:6"


def test_an_empty_value_counts_as_not_set(places, load):
    (places / "cwd" / ".env").write_text("VECTOR_SIZE=\nQDRANT_COLLECTION=mine\n")
    (places / "root" / ".env").write_text("VECTOR_SIZE=768\n")
    config = load(QDRANT_COLLECTION="", OPENAI_BASE_URL="")
    assert config.vector_size == 768
    assert config.collection == "mine"
    assert config.openai_base_url == DEFAULTS["OPENAI_BASE_URL"]


def test_a_byte_order_mark_hides_no_line(places, load):
    (places / "cwd" / ".env").write_bytes(b"\xef\xbb\xbfVECTOR_SIZE=768\r\nFALKORDB_GRAPH=g\r\n")
    assert (load().vector_size, load().graph) == (768, "g")


def test_a_file_that_is_not_utf8_is_named(places, load):
    path = places / "cwd" / ".env"
    path.write_bytes("VECTOR_SIZE=768\r\n".encode("utf-16"))
    (fault,) = faults_of(load)
    assert fault.startswith(f"{path} cannot be read")


@pytest.mark.parametrize(
    ("text", "line", "first", "second"),
    [
        (f"OPENAI_API_KEY={SECRET}VECTOR_SIZE=3072\n", 1, "the line of OPENAI_API_KEY", "VECTOR_SIZE"),
        ("FOO=xVECTOR_SIZE=3072", 1, "the line of FOO", "VECTOR_SIZE"),
        ("A=1\nFOO=VECTOR_SIZE=3072\n", 2, "the line of FOO", "VECTOR_SIZE"),
        (
            f"A=1\nexport QDRANT_API_KEY={SECRET}export VECTOR_SIZE=9\n",
            2,
            "the line of QDRANT_API_KEY",
            "VECTOR_SIZE",
        ),
        ('FOO="x"EMBEDDING_MODEL=text-embedding-3-small\n', 1, "the line of FOO", "EMBEDDING_MODEL"),
        ("A=1\n# the endVECTOR_SIZE=3072\n", 2, "the comment", "VECTOR_SIZE"),
        ("A=1 # the endVECTOR_SIZE=3072\n", 1, "the comment", "VECTOR_SIZE"),
    ],
)
def test_a_line_that_was_glued_to_another_is_named(places, load, text, line, first, second):
    path = places / "cwd" / ".env"
    path.write_text(text)
    (fault,) = faults_of(load)
    assert fault.startswith(f"{path}:{line}: {first} also holds {second}=")
    assert f"put {second} on a separate line" in fault
    assert SECRET not in fault


@pytest.mark.parametrize(
    "text",
    [
        "# VECTOR_SIZE=3072\n",
        "#VECTOR_SIZE=3072\n",
        "# set to VECTOR_SIZE=768 for the small model (or VECTOR_SIZE=3072)\n",
        "FALKORDB_GRAPH=g  # was VECTOR_SIZE=3072\n",
        "FALKORDB_GRAPH=g\nVECTOR_SIZE=3072",
        "SOME_NOTE=vector_size=9\n",
        "MY_QDRANT_URL=http://localhost:1\n",
    ],
)
def test_a_mention_is_not_a_glued_line(places, load, text):
    (places / "cwd" / ".env").write_text(text)
    assert load().vector_size == 3072


def test_a_line_that_assigns_nothing_is_named_and_others_programs_oddities_are_not(places, load, caplog):
    path = places / "cwd" / ".env"
    path.write_text("this is: not ours\n\nVECTOR_SIZE: 768\n")
    (fault,) = faults_of(load)
    assert fault == f"{path}:3: this line is not an assignment (NAME=value)"
    path.write_text("this is: not ours\nVECTOR_SIZE=768\n")
    assert load().vector_size == 768
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("QDRANT_COLLECTION", ".."),
        ("QDRANT_COLLECTION", "."),
        ("FALKORDB_GRAPH", ".."),
        ("AUTOMEM_BACKUP_DIR", "  "),
        ("AUTOMEM_BACKUP_DIR", "\t"),
        ("AUTOMEM_BACKUP_DIR", "x\ny"),
        ("AUTOMEM_BACKUP_DIR", "/caf\udce9"),
    ],
)
def test_names_and_folders_that_lead_elsewhere_are_faults(load, name, value):
    """`/collections/..` is the server itself; a blank folder is one next to the scripts; no flag takes a line break."""
    (fault,) = faults_of(load, **{name: value})
    assert fault.startswith(f"{name}=")


def test_a_name_that_its_server_takes_is_no_fault(load):
    config = load(QDRANT_COLLECTION="ä" * 90, FALKORDB_GRAPH="a:b")
    assert (config.collection, config.graph) == ("ä" * 90, "a:b")


@pytest.mark.parametrize("name", ["AUTOMEM_BACKUP_DIR", "FALKORDB_PASSWORD", "OLLAMA_BASE_URL"])
def test_a_value_that_is_not_utf8_is_a_fault(load, name):
    """Neither SQLite nor FalkorDB takes it, and no command that names it could be pasted."""
    (fault,) = faults_of(load, **{name: "http://x/\udce9"})
    assert fault.startswith(f"{name}=")
    assert fault.endswith(" (environment): is not UTF-8")


def test_the_home_of_another_user_is_named(tmp_path):
    """As `sudo -E -u` leaves it: what that folder holds is not known."""
    faults = []
    with closed(tmp_path):
        assert env_files(None, {"HOME": str(tmp_path)}, Path("/"), Path("/"), faults) == {}
    (fault,) = faults
    assert f"{tmp_path}/.config/automem/.env cannot be read: Permission denied. HOME is {tmp_path}: if" in fault
    assert "export HOME=$(getent passwd $(id -u) | cut -d: -f6)" in fault


def test_a_user_without_a_home_needs_none(load, monkeypatch):
    """As in a container with `--user 12345`: of the defaults only a local model's folder is in the home."""

    def unknown(_number):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert str(load(HOME="").models_dir) == "/~/.config/automem/models"
    (fault,) = faults_of(load, HOME="", AUTOMEM_MODELS_DIR="~/models")
    assert "begins with a ~ whose home folder is unknown" in fault


def test_all_faults_in_one_go(places, load):
    path = places / "cwd" / ".env"
    path.write_text("FALKORDB_TLS=perhaps\nQDRANT_TIMEOUT_SECONDS=soon\n")
    environ = {
        "VECTOR_SIZE": "abc",
        "FALKORDB_PORT": "70000",
        "QDRANT_URL": "localhost:6333",
        "QDRANT_COLLECTION": "a/b",
        "OPENAI_BASE_URL": "ftp://x",
        "AUTOMEM_API_URL": "http://h:none",
        "FALKORDB_HOST": "redis://h:1",
        "OPENAI_API_KEY": f"{SECRET}\n",
    }
    faults = faults_of(load, **environ)
    assert {fault.split("=")[0] for fault in faults} == {*environ, "FALKORDB_TLS", "QDRANT_TIMEOUT_SECONDS"}
    message = "\n".join(faults)
    assert "VECTOR_SIZE=abc (environment): must be a whole number from 1 to 65536" in message
    assert "must begin with http:// or https://, such as http://localhost:6333" in message
    assert f"FALKORDB_TLS=perhaps ({path}:1)" in message
    assert "set its port with FALKORDB_PORT" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VECTOR_SIZE", "0"),
        ("VECTOR_SIZE", "-1"),
        ("VECTOR_SIZE", "65537"),
        ("VECTOR_SIZE", "768.0"),
        ("QDRANT_TIMEOUT_SECONDS", "nan"),
        ("QDRANT_TIMEOUT_SECONDS", "0"),
        ("FALKORDB_PORT", "0"),
        ("QDRANT_URL", "http://"),
        ("QDRANT_URL", "http://localhost:0"),
        ("QDRANT_NODE_URLS", "http://a:1,http://b:0"),
        ("QDRANT_NODE_URLS", "a:6333,b:6333"),
        ("QDRANT_HOST", "http://localhost"),
        ("QDRANT_HOST", "localhost:6333"),
        ("QDRANT_HOST", "[::1"),
        ("FALKORDB_HOST", "[::1]:6379"),
        ("QDRANT_PORT", "abc"),
        ("QDRANT_COLLECTION", "a/b"),
        ("QDRANT_COLLECTION", "a:b"),
        ("QDRANT_COLLECTION", "ä" * 91),
        ("FALKORDB_GRAPH", "../g"),
        ("AUTOMEM_BACKUP_DIR", "~nobody-has-this-name/x"),
        ("AUTOMEM_MODELS_DIR", "~nobody-has-this-name/x"),
        ("OLLAMA_TIMEOUT", "0"),
        ("OLLAMA_TIMEOUT", "soon"),
        ("VOYAGE_MODEL", "voyage\x01"),
    ],
)
def test_a_value_that_cannot_be_is_one_fault_of_that_name(load, name, value):
    (fault,) = faults_of(load, **{name: value})
    assert fault.startswith(f"{name}={value} (environment): ")


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "http://localhost:6333"),
        ({"QDRANT_HOST": "q", "QDRANT_PORT": "7"}, "http://q:7"),
        ({"QDRANT_HOST": "::1"}, "http://[::1]:6333"),
        ({"QDRANT_HOST": "[::1]"}, "http://[::1]:6333"),
        ({"QDRANT_URL": "http://u:1", "QDRANT_HOST": "q", "QDRANT_PORT": "7"}, "http://u:1"),
        ({"QDRANT_URL": "http://u", "QDRANT_PORT": "7"}, "http://u:6333"),
        ({"QDRANT_URL": "https://u/"}, "https://u:6333"),
        ({"QDRANT_URL": "https://u:/sub/"}, "https://u:6333/sub"),
        ({"QDRANT_URL": "http://[::1]"}, "http://[::1]:6333"),
        ({"QDRANT_URL": f"http://me:{SECRET}@u"}, f"http://me:{SECRET}@u:6333"),
    ],
)
def test_where_qdrant_is(load, environ, url):
    assert load(**environ).qdrant_url == url


def test_a_host_that_makes_no_url_is_a_fault(load):
    (fault,) = faults_of(load, QDRANT_HOST="a:b:c")
    assert fault.startswith("QDRANT_URL=http://[a:b:c]:6333 (QDRANT_HOST (environment)): is not a URL")


def test_qdrant_url_beats_host_and_port_wherever_each_is_set(places, load):
    (places / "root" / ".env").write_text("QDRANT_URL=http://from-the-file:1\n")
    config = load(QDRANT_HOST="from-the-environment", QDRANT_PORT="2")
    assert config.qdrant_url == "http://from-the-file:1"
    assert config.settings["QDRANT_URL"].origin == f"{places / 'root' / '.env'}:1"


@pytest.mark.parametrize(
    ("value", "urls"),
    [
        ("", ()),
        ("http://a", ("http://a:6333",)),
        (
            "http://a:1, https://b/sub/ ,http://[::1]:7,",
            ("http://a:1", "https://b:6333/sub", "http://[::1]:7"),
        ),
        (f"http://me:{SECRET},x@a,http://b", (f"http://me:{SECRET},x@a:6333", "http://b:6333")),
    ],
)
def test_the_nodes_of_a_cluster_are_listed_between_commas(load, value, urls):
    assert load(QDRANT_NODE_URLS=value).qdrant_node_urls == urls


def test_a_derived_url_names_its_origins(load):
    assert load().settings["QDRANT_URL"].origin == "default"
    origin = load(QDRANT_PORT="7").settings["QDRANT_URL"].origin
    assert origin == "QDRANT_PORT (environment)"


def test_secrets_are_in_no_text(load):
    config = load(
        **dict.fromkeys(SECRETS, SECRET),
        QDRANT_URL=f"http://me:{SECRET}@u",
        OPENAI_BASE_URL=f"http://me:{SECRET}@u?key={SECRET}",
        QDRANT_NODE_URLS=f"http://me:{SECRET}@a,http://me:{SECRET},x@b",
    )
    shown = {name: value for name, value, _ in config.rows()}
    for text in (
        repr(config),
        str(config),
        repr(config.settings),
        repr(config.spec),
        str(config.targets()),
        str(shown),
    ):
        assert SECRET not in text
    assert {shown[name] for name in SECRETS} == {"****"}
    assert shown["QDRANT_URL"] == "http://****@u"
    assert shown["OPENAI_BASE_URL"] == "http://****@u?****"
    assert shown["QDRANT_NODE_URLS"] == "http://****@a,http://****@b"
    assert {row[1] for row in load().rows() if row[0] in SECRETS} == {"(not set)"}


@pytest.mark.parametrize(
    "name",
    [
        "QDRANT_URL",
        "QDRANT_NODE_URLS",
        "OPENAI_BASE_URL",
        "AUTOMEM_API_URL",
        "QDRANT_HOST",
        "FALKORDB_HOST",
    ],
)
@pytest.mark.parametrize(
    "value",
    ["me:{}@host:6333", "ftp://me:{}@host", "http://me:{}@host:port", "http://me:{}#x@host", "http://:{}/y@"],
)
def test_no_fault_shows_credentials(load, name, value):
    (fault,) = faults_of(load, **{name: value.format(SECRET)})
    assert SECRET not in fault
    assert "****@" in fault


URLS = (
    "QDRANT_URL",
    "QDRANT_NODE_URLS",
    "AUTOMEM_API_URL",
    "OPENAI_BASE_URL",
    "VOYAGE_BASE_URL",
    "OLLAMA_BASE_URL",
)


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize(
    ("rest", "what"),
    [
        ("/?key={}", "a query"),
        ("?key={}", "a query"),
        ("/path?key=a@{}", "a query"),
        ("/dashboard#/{}", "a fragment"),
        ("/?key={}#there", "a fragment"),
    ],
)
def test_what_would_not_be_sent_of_a_url_is_a_fault(load, name, rest, what):
    value = "http://host:1" + rest.format(SECRET)
    if name == "OPENAI_BASE_URL" and what == "a query":
        assert load(OPENAI_BASE_URL=value).openai_base_url == value.replace("/?", "?")
        return
    (fault,) = faults_of(load, **{name: value})
    assert fault.startswith(f"{name}=http://")
    assert f"**** (environment): {what}" in fault
    assert "is not supported here" in fault
    assert SECRET not in fault


@pytest.mark.parametrize("name", ["QDRANT_HOST", "FALKORDB_HOST"])
@pytest.mark.parametrize("rest", ["?key={}", "#{}"])
def test_a_host_with_a_query_is_a_fault(load, name, rest):
    (fault,) = faults_of(load, **{name: "host" + rest.format(SECRET)})
    assert "must be a host alone" in fault
    assert SECRET not in fault


def test_an_empty_query_is_none(load):
    assert load(QDRANT_URL="http://host:1/?").qdrant_url == "http://host:1"


@pytest.mark.parametrize("name", ["QDRANT_API_KEY", "OPENAI_API_KEY", "VOYAGE_API_KEY", "AUTOMEM_API_TOKEN"])
@pytest.mark.parametrize("value", [f"{SECRET}\n", f" {SECRET}", f"{SECRET}\u2603", f"{SECRET}\x01x"])
def test_a_secret_that_no_header_can_carry(load, name, value):
    (fault,) = faults_of(load, **{name: value})
    assert fault.startswith(f"{name}=**** (environment): ")
    assert SECRET not in fault


def test_a_password_alone_is_of_the_default_user(load):
    assert load(FALKORDB_PASSWORD="p").falkordb_username == "default"
    assert load(FALKORDB_PASSWORD="p", FALKORDB_USERNAME="u").falkordb_username == "u"
    assert load().falkordb_username == ""


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "::1", "[::1]", "localhost."])
def test_one_target_has_one_spelling(load, host):
    here = load().targets()
    assert load(FALKORDB_HOST=host, QDRANT_HOST=host).targets() == here
    shown = f"[{host}]" if ":" in host and "[" not in host else host
    assert load(QDRANT_URL=f"http://{shown}").targets() == here
    assert load(QDRANT_URL=f"http://me:{SECRET}@{shown}/").targets() == here


@pytest.mark.parametrize(
    "other",
    [
        {"FALKORDB_HOST": "h"},
        {"FALKORDB_PORT": "1"},
        {"FALKORDB_GRAPH": "g"},
        {"QDRANT_URL": "http://h"},
        {"QDRANT_URL": "http://localhost/behind-a-proxy"},
        {"QDRANT_PORT": "1"},
        {"QDRANT_COLLECTION": "c"},
    ],
)
def test_other_targets_are_spelled_differently(load, other):
    assert load(**other).targets() != load().targets()


def test_a_missing_openai_key_is_reported_with_the_command_that_sets_it(load):
    with pytest.raises(UsageProblem, match="OPENAI_API_KEY is not set") as caught:
        require_embedding_key(load())
    assert "export OPENAI_API_KEY" in caught.value.next_step
    require_embedding_key(load(OPENAI_API_KEY="sk-x"))


@pytest.mark.parametrize(
    ("model", "size", "possible"),
    [
        ("text-embedding-3-small", 1, True),
        ("text-embedding-3-small", 768, True),
        ("text-embedding-3-small", 1536, True),
        ("text-embedding-3-small", 1537, False),
        ("text-embedding-3-small", 3072, False),
        ("text-embedding-3-large", 768, True),
        ("text-embedding-3-large", 3072, True),
        ("text-embedding-3-large", 3073, False),
        ("text-embedding-ada-002", 1536, True),
        ("text-embedding-ada-002", 768, False),
        ("text-embedding-ada-002", 3072, False),
        ("a-model-nobody-knows", 12, True),
        ("nomic-embed-text", 768, True),
        ("nomic-embed-text", 512, False),
    ],
)
def test_model_against_dimension(model, size, possible):
    fault = model_fault(model, size)
    assert (fault is None) == possible
    if possible:
        check_model(model, size)
        return
    assert model in fault
    assert f"VECTOR_SIZE is {size}" in fault
    with pytest.raises(UsageProblem, match="EMBEDDING_MODEL") as caught:
        check_model(model, size)
    assert f"export VECTOR_SIZE={facts_of(model).native}" in caught.value.next_step


def test_the_remedy_for_a_wrong_model_works():
    for model in ("text-embedding-3-small", "text-embedding-ada-002"):
        with pytest.raises(UsageProblem) as caught:
            check_model(model, 3072)
        assert "export EMBEDDING_MODEL=text-embedding-3-large" in caught.value.next_step
    check_model("text-embedding-3-large", 3072)
    with pytest.raises(UsageProblem) as caught:
        check_model("text-embedding-3-large", 4096)
    assert "EMBEDDING_MODEL=text" not in caught.value.next_step


@pytest.mark.parametrize(
    "model",
    [
        "voyage-4-large",
        "voyage-4",
        "voyage-4-lite",
        "voyage-3-large",
        "voyage-3.5",
        "voyage-3.5-lite",
        "voyage-code-3",
        "voyage/voyage-4",
    ],
)
def test_voyage_makes_four_sizes_and_names_the_nearest(model):
    assert [size for size in range(1, 4097) if model_fault(model, size, VOYAGE) is None] == [256, 512, 1024, 2048]
    assert facts_of(model).sizes
    assert not takes_dimensions(model)
    for size, nearest in ((768, 512), (3072, 2048), (100, 256), (1536, 1024)):
        with pytest.raises(UsageProblem, match=f"VOYAGE_MODEL {model} makes 256d, 512d, 1024d, 2048d") as caught:
            check_model(model, size, VOYAGE)
        assert caught.value.next_step == f"export VECTOR_SIZE={nearest}"


def test_models_of_one_size_name_it():
    with pytest.raises(UsageProblem, match="OLLAMA_MODEL nomic-embed-text makes 768d vectors only") as caught:
        check_model("nomic-embed-text", 1024, OLLAMA)
    assert caught.value.next_step == "export VECTOR_SIZE=768"
    with pytest.raises(UsageProblem, match=r"local model BAAI/bge-base-en-v1\.5 makes 768d vectors only") as caught:
        check_model(LOCAL_MODELS[768], 1000, LOCAL)
    assert caught.value.next_step == "export VECTOR_SIZE=1024"
    for size, model in LOCAL_MODELS.items():
        check_model(model, size, LOCAL)
        assert facts_of(model).native == size
        assert not facts_of(model).sizes


def test_only_the_third_family_takes_dimensions():
    assert takes_dimensions("text-embedding-3-small")
    assert takes_dimensions("text-embedding-3-large")
    assert not takes_dimensions("text-embedding-ada-002")


def test_the_mismatch_is_reported_in_the_words_that_operators_know():
    with pytest.raises(ValueError, match="VECTOR DIMENSION MISMATCH") as caught:
        check_dimension("memories", 768, 3072)
    error = caught.value
    assert isinstance(error, DimensionMismatch)
    assert error.exit_code == USAGE
    assert str(error) == ("VECTOR DIMENSION MISMATCH\nQdrant collection 'memories': 768d\nConfig VECTOR_SIZE: 3072d")
    _, keep, _, migrate = error.next_step.splitlines()
    assert keep == "export VECTOR_SIZE=768"
    assert migrate == "python scripts/backup_automem.py && python scripts/reembed_embeddings.py"
    check_dimension("memories", 768, 768)


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"QDRANT_URL": "http://qdrant.example.com:6333", "QDRANT_API_KEY": "key"}, "QDRANT_API_KEY"),
        ({"QDRANT_NODE_URLS": "http://8.8.8.8:6333", "QDRANT_API_KEY": "key"}, "QDRANT_API_KEY"),
        (
            {"OPENAI_BASE_URL": "http://me:word@gateway.example.com/v1", "OPENAI_API_KEY": "key"},
            "OPENAI_API_KEY",
        ),
        (
            {"VOYAGE_BASE_URL": "http://me:word@proxy.example.com/v1", "VOYAGE_API_KEY": "key"},
            "VOYAGE_API_KEY",
        ),
        (
            {"AUTOMEM_API_URL": "http://automem.example.com", "AUTOMEM_API_TOKEN": "token"},
            "AUTOMEM_API_TOKEN",
        ),
        ({"FALKORDB_HOST": "db.example.com", "FALKORDB_PASSWORD": "word"}, "FALKORDB_PASSWORD"),
    ],
)
def test_a_key_in_clear_text_over_a_public_network_is_reported_once(load, environ, name):
    (warning,) = load(**environ).warnings
    assert warning.startswith(f"{name} is sent in clear text to ")
    assert not any(secret in warning for secret in ("word", "key ", "token "))
    safe = {key: value.replace("http://", "https://") for key, value in environ.items()}
    assert load(**safe, FALKORDB_TLS="true").warnings == ()


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "10.1.2.3", "192.168.0.4", "qdrant", "nas.local", "100.64.0.9"]
)
def test_a_key_on_this_machine_or_a_private_network_is_not(load, host):
    environ = {"QDRANT_URL": f"http://{host}:6333", "FALKORDB_HOST": host}
    assert load(**environ, QDRANT_API_KEY="key", FALKORDB_PASSWORD="word").warnings == ()
