"""What an operator reads when something goes wrong: the situation, the command, its exit code, the error, the next step.

Every row is provoked for real, and compared as a whole. In its texts a word in braces is the value of this sandbox:
{folder} is the backup folder, {tmp} the home folder, {stamp} the one backup set, {near} its stamp with a typing error.
"""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module

import pytest

from lib import cli, errors
from lib.clients.falkordb.connection import connect, list_graphs
from lib.clients.qdrant.collection import list_collections
from lib.config import DEFAULTS
from lib.errors import (
    AccessRefused,
    BackupDamaged,
    BadFile,
    ConfigError,
    DimensionMismatch,
    GuardRefused,
    LockHeld,
    MigrationError,
    MissingData,
    ProviderRefused,
    StoreFailed,
    StoreUnreachable,
    UsageProblem,
    VerificationFailed,
)
from tests.messages_support import (
    MIGRATE,
    NEWER,
    PASSWORD,
    Night,
    Setup,
    Shared,
    a_folder,
    alias,
    another_writer,
    automem_runs,
    automems_file,
    broken_link,
    changed_memory,
    collection,
    cut,
    cut_automem_backup,
    damaged,
    edited,
    empty_graph,
    endpoint_down,
    env_file,
    falkordb_down,
    fault,
    file,
    foreign_tar,
    full_disk,
    gone,
    half_granted,
    has_package,
    https,
    interrupted,
    key_in_the_way,
    lacks_package,
    locked,
    locked_falkordb,
    locked_qdrant,
    no_backup,
    nothing,
    occupied,
    of_time,
    one_store,
    open_to_all,
    passphrase,
    qdrant_down,
    sftp_down,
    unfinished,
    web_server,
)
from tests.operator_support import LARGE, ROOT, Operator

pytestmark = pytest.mark.qdrant


@dataclass(frozen=True)
class Row:
    """`error` is its class in lib/errors.py, or None for a report, of which one line and what follows it are compared."""

    situation: str
    command: str
    code: int
    error: type[MigrationError] | None
    message: str
    next_step: tuple[str, ...]
    setup: Setup = nothing
    env: Mapping[str, str] = field(default_factory=dict)
    matrix: bool = False


TABLE = [
    # --- settings: nothing is asked of a server
    Row(
        "settings with wrong values",
        "backup_automem.py",
        2,
        ConfigError,
        "the configuration has 3 faults:\n"
        "  - FALKORDB_PORT=none (environment): must be a whole number from 1 to 65535\n"
        "  - QDRANT_URL=localhost:6333 (environment): must begin with http:// or https://, such as "
        "http://localhost:6333\n"
        "  - VECTOR_SIZE=abc (environment): must be a whole number from 1 to 65536",
        ("correct this, then look at all settings:", "python scripts/backup_automem.py --show-config"),
        env={"VECTOR_SIZE": "abc", "FALKORDB_PORT": "none", "QDRANT_URL": "localhost:6333"},
    ),
    Row(
        "a file of settings that is missing",
        "verify_migration.py --env-file {tmp}/automem.env",
        2,
        ConfigError,
        "the configuration has 1 fault:\n  - --env-file names {tmp}/automem.env, which is not a file",
        (
            "correct this, then look at all settings:",
            "python scripts/backup_automem.py --env-file {tmp}/automem.env --show-config",
        ),
    ),
    Row(
        "a .env whose last line had no newline when VECTOR_SIZE was appended",
        "reembed_embeddings.py",
        2,
        ConfigError,
        "the configuration has 1 fault:\n"
        "  - {env}:1: the line of OPENAI_API_KEY also holds VECTOR_SIZE= (the file had no final newline when "
        "VECTOR_SIZE was appended): put VECTOR_SIZE on a separate line",
        ("correct this, then look at all settings:", "python scripts/backup_automem.py --show-config"),
        env_file("OPENAI_API_KEY=sk-1VECTOR_SIZE=3072\n"),
    ),
    Row(
        "a line of the .env without =",
        "reembed_embeddings.py",
        2,
        ConfigError,
        "the configuration has 1 fault:\n  - {env}:1: this line is not an assignment (NAME=value)",
        ("correct this, then look at all settings:", "python scripts/backup_automem.py --show-config"),
        env_file("VECTOR_SIZE 3072\n"),
    ),
    Row(
        "a .env that links to nothing",
        "backup_automem.py",
        2,
        ConfigError,
        "the configuration has 1 fault:\n"
        "  - {env} is a link to ../automem/.env, which does not exist: link it again or remove it",
        ("correct this, then look at all settings:", "python scripts/backup_automem.py --show-config"),
        broken_link,
    ),
    Row(
        "an address with a key in its query",
        "verify_migration.py",
        2,
        ConfigError,
        "the configuration has 1 fault:\n"
        "  - QDRANT_URL=http://127.0.0.1:6333?**** (environment): a query (from ? on) is not supported here and "
        "would not be sent: leave it out",
        ("correct this, then look at all settings:", "python scripts/backup_automem.py --show-config"),
        env={"QDRANT_URL": "http://127.0.0.1:6333?api-key=s3cr3t-that-nobody-sees"},
    ),
    Row(
        "a proxy that is no URL",
        "verify_migration.py",
        2,
        ConfigError,
        "the configuration has 1 fault:\n"
        "  - HTTPS_PROXY (environment): is not the URL of a proxy such as http://host:3128 (in a password, # is "
        "%23, / is %2F, @ is %40)",
        ("correct this, then look at all settings:", "python scripts/backup_automem.py --show-config"),
        env={"HTTPS_PROXY": "http://proxy:port"},
    ),
    Row(
        "a private key where a public one belongs",
        "backup_automem.py",
        2,
        ConfigError,
        "the configuration has 1 fault:\n"
        "  - AUTOMEM_BACKUP_RECIPIENTS=**** (environment): holds a private key: keep the key in a file of mode "
        "600, and name the file",
        ("correct this, then look at all settings:", "python scripts/backup_automem.py --show-config"),
        env={"AUTOMEM_BACKUP_RECIPIENTS": "AGE-SECRET-KEY-1QQQ"},
    ),
    Row(
        "one of two settings of an engine",
        "backup_automem.py",
        2,
        UsageProblem,
        "FALKORDB_SCRATCH_SERVER is set and FALKORDB_SCRATCH_MODULE is not: they go together",
        ("set FALKORDB_SCRATCH_MODULE, too, or:", "unset FALKORDB_SCRATCH_SERVER"),
        env={"FALKORDB_SCRATCH_SERVER": "/usr/bin/redis-server"},
    ),
    Row(
        "no key",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "OPENAI_API_KEY is not set: embeddings cannot be made",
        (
            "export OPENAI_API_KEY=...",
            "(a local server that needs no key accepts any word)",
            "without a key AutoMem itself uses its local model; to use it here, too:",
            "export EMBEDDING_PROVIDER=local",
        ),
        env={"OPENAI_API_KEY": ""},
    ),
    Row(
        "the key of the example",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "OPENAI_API_KEY (environment) is a placeholder, not a key",
        ("export OPENAI_API_KEY=...", "with the key of your account"),
        env={"OPENAI_API_KEY": "sk-proj-your-key-here"},
    ),
    Row(
        "the key of the next step, pasted as it is",
        "reembed_embeddings.py --dry-run",
        2,
        UsageProblem,
        "OPENAI_API_KEY (environment) is a placeholder, not a key",
        ("export OPENAI_API_KEY=...", "with the key of your account"),
        env={"OPENAI_API_KEY": "..."},
    ),
    Row(
        "a size that the model cannot make",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "EMBEDDING_MODEL text-embedding-3-small makes at most 1536d vectors, VECTOR_SIZE is 3072",
        ("export EMBEDDING_MODEL=text-embedding-3-large", "or:", "export VECTOR_SIZE=1536"),
        env={"VECTOR_SIZE": "3072"},
    ),
    Row(
        "a provider that does not exist",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "EMBEDDING_PROVIDER must be one of auto, voyage, openai, ollama, local (EMBEDDING_PROVIDER is opneai in "
        "the environment)",
        ("export EMBEDDING_PROVIDER=openai",),
        env={"EMBEDDING_PROVIDER": "opneai"},
    ),
    Row(
        "Voyage without a key",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "VOYAGE_API_KEY is not set: embeddings cannot be made (EMBEDDING_PROVIDER is voyage in the environment)",
        ("export VOYAGE_API_KEY=...", "or:", "export EMBEDDING_PROVIDER=openai"),
        env={"EMBEDDING_PROVIDER": "voyage", "VECTOR_SIZE": "1024"},
    ),
    Row(
        "a size that Voyage does not make",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "Voyage makes vectors of 256, 512, 1024, 2048 dimensions, VECTOR_SIZE is 3072 (EMBEDDING_PROVIDER is "
        "voyage in the environment)",
        ("export VECTOR_SIZE=2048", "or:", "export EMBEDDING_PROVIDER=openai"),
        env={"EMBEDDING_PROVIDER": "voyage", "VECTOR_SIZE": "3072", "VOYAGE_API_KEY": "pa-1"},
    ),
    Row(
        "a size that no local model makes",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "the local model makes vectors of 384, 768, 1024 dimensions, VECTOR_SIZE is 3072 (EMBEDDING_PROVIDER is "
        "local in the environment)",
        ("export VECTOR_SIZE=1024", "or:", "export EMBEDDING_PROVIDER=openai"),
        env={"EMBEDDING_PROVIDER": "local", "VECTOR_SIZE": "3072"},
    ),
    Row(
        "a local model without its package",
        "reembed_embeddings.py --dry-run",
        2,
        UsageProblem,
        "BAAI/bge-small-en-v1.5 runs on this machine with the Python package 'fastembed', which is not installed here",
        ("python -m pip install -r requirements-local.txt",),
        lacks_package("fastembed"),
        env={"EMBEDDING_PROVIDER": "local", "VECTOR_SIZE": "384"},
    ),
    Row(
        "a local model that cannot be downloaded",
        "reembed_embeddings.py --dry-run",
        2,
        UsageProblem,
        "BAAI/bge-small-en-v1.5 could not be loaded from {tmp}/.config/automem/models, nor downloaded into it: "
        "Could not load model BAAI/bge-small-en-v1.5 from any source.",
        (
            "connect to the network, or name the folder into which AutoMem downloaded the model:",
            "export AUTOMEM_MODELS_DIR=...",
            "then run the same command again",
        ),
        has_package("fastembed"),
        env={"EMBEDDING_PROVIDER": "local", "VECTOR_SIZE": "384", "HF_HUB_OFFLINE": "1"},
        matrix=True,
    ),
    Row(
        "AutoMem's own .env chooses another provider",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "AutoMem will use voyage-4 of Voyage, because VOYAGE_API_KEY is set in {env}:1.\n"
        "These settings choose text-embedding-3-large of OpenAI, because EMBEDDING_PROVIDER is openai in the "
        "environment: recall would find nothing",
        (
            "in {env}:",
            "  EMBEDDING_PROVIDER=openai",
            "  EMBEDDING_MODEL=text-embedding-3-large",
            "or here:",
            "export EMBEDDING_PROVIDER=voyage VOYAGE_MODEL=voyage-4",
        ),
        automems_file("VOYAGE_API_KEY=pa-1\n"),
        env={"EMBEDDING_PROVIDER": "openai", "VECTOR_SIZE": "1024", "EMBEDDING_MODEL": LARGE},
    ),
    Row(
        "AutoMem's default model differs",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "EMBEDDING_MODEL is not set: at 768d AutoMem then uses text-embedding-3-small, these scripts "
        "text-embedding-3-large",
        (
            "export EMBEDDING_MODEL=text-embedding-3-small",
            "(or text-embedding-3-large), and write that line into AutoMem's .env, without export",
        ),
        env={"EMBEDDING_MODEL": "", "VECTOR_SIZE": "768"},
    ),
    Row(
        "a gateway from which AutoMem gets another size",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "AutoMem sends no `dimensions` to openrouter.ai (OPENAI_BASE_URL): it gets 1536d vectors of "
        "text-embedding-3-small, not 768d, and stores placeholder vectors",
        ("export VECTOR_SIZE=1536", "or:", "export OPENAI_BASE_URL=https://api.openai.com/v1"),
        env={"OPENAI_BASE_URL": "https://openrouter.ai/api/v1", "VECTOR_SIZE": "768"},
    ),
    Row(
        "a Python package that is not installed",
        "backup_automem.py",
        2,
        UsageProblem,
        "the Python package 'portalocker' is not installed here",
        (
            "make -C {root} venv && source {root}/.venv/bin/activate",
            "or, into this Python:",
            "python -m pip install -r requirements.txt",
        ),
        lacks_package("portalocker"),
    ),
    # --- the size of the collection: the error of AutoMem's guide
    Row(
        "another size than the collection's",
        "verify_migration.py",
        2,
        DimensionMismatch,
        "VECTOR DIMENSION MISMATCH\nQdrant collection '{collection}': 48d\nConfig VECTOR_SIZE: 96d",
        (
            "keep the collection:",
            "export VECTOR_SIZE=48",
            "or migrate it:",
            "python scripts/backup_automem.py && python scripts/reembed_embeddings.py",
        ),
        env={"VECTOR_SIZE": "96"},
    ),
    Row(
        "another size than the collection's, to repair drift",
        "reembed_embeddings.py --only-missing",
        2,
        DimensionMismatch,
        "VECTOR DIMENSION MISMATCH\nQdrant collection '{collection}': 48d\nConfig VECTOR_SIZE: 96d",
        (
            "keep the collection:",
            "export VECTOR_SIZE=48",
            "or migrate it:",
            "python scripts/backup_automem.py && python scripts/reembed_embeddings.py",
        ),
        env={"VECTOR_SIZE": "96"},
    ),
    # --- servers
    Row(
        "FalkorDB does not run",
        "backup_automem.py",
        1,
        StoreUnreachable,
        "FalkorDB at {falkordb} does not answer: connection refused",
        (
            "if it does not run, start it, in AutoMem's folder:",
            "docker compose up -d falkordb",
            "or correct FALKORDB_HOST, FALKORDB_PORT or FALKORDB_TLS, then run the same command again",
        ),
        falkordb_down,
    ),
    Row(
        "Qdrant does not run",
        "reembed_embeddings.py",
        1,
        StoreUnreachable,
        "Qdrant at {qdrant} is unreachable: connection refused",
        ("start it, in AutoMem's folder:", "docker compose up -d qdrant", "or correct QDRANT_URL"),
        qdrant_down,
    ),
    Row(
        "a store does not run when a backup is restored",
        "restore_from_backup.py {stamp}",
        1,
        StoreUnreachable,
        "Qdrant at {qdrant} is unreachable: connection refused",
        (
            "correct the address, or start just the stores, in AutoMem's folder:",
            "docker compose up -d falkordb qdrant",
            "then:",
            "python scripts/restore_from_backup.py {stamp}",
        ),
        qdrant_down,
    ),
    Row(
        "a host name that only containers know",
        "verify_migration.py",
        1,
        StoreUnreachable,
        "FalkorDB at falkordb:6379 does not answer: its name is not known",
        (
            "if 'falkordb' is a container, its name resolves only inside Docker; if its port is published:",
            "export FALKORDB_HOST=localhost",
            "if it does not run, start it, in AutoMem's folder:",
            "docker compose up -d falkordb",
            "or correct FALKORDB_HOST, FALKORDB_PORT or FALKORDB_TLS, then run the same command again",
        ),
        env={"FALKORDB_HOST": "falkordb", "FALKORDB_PORT": "6379"},
    ),
    Row(
        "https for a Qdrant without a certificate",
        "verify_migration.py",
        1,
        StoreUnreachable,
        "Qdrant at {https}: TLS failed: the server speaks plain HTTP",
        ("export QDRANT_URL={qdrant}",),
        https,
    ),
    Row(
        "a wrong password",
        "verify_migration.py",
        2,
        AccessRefused,
        "FalkorDB at {falkordb} refused the login: invalid username-password pair or user is disabled",
        ("export FALKORDB_PASSWORD=...", "and FALKORDB_USERNAME, if the user is not `default`"),
        locked_falkordb,
        env={"FALKORDB_PASSWORD": PASSWORD},
    ),
    Row(
        "no password",
        "backup_automem.py",
        2,
        AccessRefused,
        "FalkorDB at {falkordb} refused the login: Authentication required",
        ("export FALKORDB_PASSWORD=...", "and FALKORDB_USERNAME, if the user is not `default`"),
        locked_falkordb,
    ),
    Row(
        "a wrong API key",
        "backup_automem.py",
        2,
        AccessRefused,
        "Qdrant at {qdrant} refuses access: 401 Invalid API key or JWT",
        ("export QDRANT_API_KEY=...", "a key that may manage the whole server"),
        locked_qdrant,
        env={"QDRANT_API_KEY": PASSWORD},
    ),
    Row(
        "no API key",
        "restore_from_backup.py {stamp}",
        2,
        AccessRefused,
        "Qdrant at {qdrant} refuses access: 401 Must provide an API key or an Authorization bearer token",
        ("export QDRANT_API_KEY=...", "a key that may manage the whole server"),
        locked_qdrant,
    ),
    Row(
        "another program listens at QDRANT_URL",
        "backup_automem.py",
        1,
        StoreFailed,
        "what answers at {web} is not Qdrant's REST API",
        ("correct QDRANT_URL, as in:", "export QDRANT_URL=http://localhost:6333"),
        web_server("QDRANT_URL"),
    ),
    Row(
        "another program listens at FALKORDB_PORT",
        "backup_automem.py",
        1,
        StoreFailed,
        "what answers at {web_host} is not FalkorDB: it does not speak the protocol of redis",
        ("correct FALKORDB_HOST, FALKORDB_PORT or FALKORDB_TLS",),
        web_server("FALKORDB_PORT"),
    ),
    Row(
        "a user who may not replace the graph",
        "restore_from_backup.py {stamp}",
        2,
        AccessRefused,
        "FalkorDB at {falkordb} does not permit this user RENAME on '{graph}' and on names that begin with it: "
        "nothing was changed",
        (
            "grant it, as an administrator:",
            (
                "redis-cli -h 127.0.0.1 -p {falkordb_port} --user default --askpass ACL SETUSER messages_user "
                "+restore +rename +multi +exec +dump +graph.delete +graph.ro_query"
            ),
        ),
        half_granted,
    ),
    Row(
        "a key of another program under the graph's name",
        "restore_from_backup.py {rdb}",
        1,
        StoreFailed,
        "the name '{graph}' is taken on FalkorDB at {falkordb} by a key that is not a graph",
        (
            "look at it, then move it away:",
            "redis-cli -h 127.0.0.1 -p {falkordb_port} TYPE {graph}",
            "redis-cli -h 127.0.0.1 -p {falkordb_port} RENAME {graph} {graph}_old",
        ),
        key_in_the_way,
    ),
    # --- stores
    Row(
        "a graph that does not exist",
        "backup_automem.py",
        1,
        MissingData,
        "graph '{graph}x' does not exist on FalkorDB at {falkordb} (did you mean {graph}?); its graphs: {graphs}",
        (
            "set FALKORDB_GRAPH to the graph's name, or correct FALKORDB_HOST, FALKORDB_PORT or FALKORDB_TLS",
            "if the graph is lost: docs/worst-day.md",
        ),
        env={"FALKORDB_GRAPH": "{graph}x"},
    ),
    Row(
        "a collection that does not exist",
        "verify_migration.py",
        1,
        MissingData,
        "Qdrant at {qdrant} has no collection '{collection}x' (did you mean {collection}?); it has: {collections}",
        (
            "set QDRANT_COLLECTION to the collection's name, or correct QDRANT_URL",
            "if the collection is lost: docs/worst-day.md",
        ),
        env={"QDRANT_COLLECTION": "{collection}x"},
    ),
    Row(
        "an alias instead of the collection",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "'{collection}_alias' (QDRANT_COLLECTION) is an alias at {qdrant}, of the collection '{collection}'; the "
        "name of a collection is needed here",
        ("if that is the collection you mean:", "export QDRANT_COLLECTION={collection}"),
        alias,
    ),
    Row(
        "a graph without memories",
        "reembed_embeddings.py",
        1,
        MissingData,
        "graph '{graph}_empty' holds no memory that can be embedded (0 Memory nodes): '{collection}' is not changed",
        ("check the names and the addresses:", "python scripts/backup_automem.py --show-config"),
        empty_graph,
    ),
    Row(
        "a collection with named vectors",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "the collection holds what a re-embed would not carry over:\n"
        "  - named vectors: 'title' (AutoMem keeps one unnamed vector per point)",
        (
            (
                "if it is not AutoMem's collection, correct QDRANT_COLLECTION; else back it up, then move what is "
                "listed into another collection, or remove it:"
            ),
            "python scripts/backup_automem.py",
        ),
        collection({"title": {"size": 48, "distance": "Cosine"}}),
    ),
    Row(
        "a collection with named vectors, to verify",
        "verify_migration.py",
        2,
        UsageProblem,
        "the collection has named vectors: 'title' (AutoMem keeps one unnamed vector per point)",
        ("set QDRANT_COLLECTION to AutoMem's collection",),
        collection({"title": {"size": 48, "distance": "Cosine"}}),
    ),
    # --- files
    Row(
        "a file that does not exist",
        "restore_from_backup.py backups/falkordb/memories_20261126_220840.rdb",
        2,
        BadFile,
        "backups/falkordb/memories_20261126_220840.rdb does not exist",
        ("name another file:", "python scripts/backup_automem.py --list"),
    ),
    Row(
        "an empty file",
        "restore_from_backup.py {file}",
        2,
        BadFile,
        "{file} is empty",
        ("name another file:", "python scripts/backup_automem.py --list"),
        file("dump.rdb"),
    ),
    Row(
        "a folder",
        "restore_from_backup.py {file}",
        2,
        BadFile,
        "{file} is a folder, a file is needed",
        ("name another file:", "python scripts/backup_automem.py --list"),
        a_folder,
    ),
    Row(
        "a text",
        "restore_from_backup.py {file}",
        2,
        BadFile,
        "{file} is no backup: neither an RDB, nor a qdrant_snapshot_*.tar.gz, nor a backup_*.json",
        ("name another file:", "python scripts/backup_automem.py --list"),
        file("dump.rdb", "my notes\n"),
    ),
    Row(
        "another program's JSON",
        "restore_from_backup.py {file}",
        2,
        BadFile,
        "{file} is JSON, but no manifest of a backup",
        ("name another file:", "python scripts/backup_automem.py --list"),
        file("package.json", '{"name": "x"}'),
    ),
    Row(
        "another program's tar.gz",
        "restore_from_backup.py {file}",
        2,
        BadFile,
        "{file} is a tar.gz, but not one that backup_automem.py wrote",
        ("name another file:", "python scripts/backup_automem.py --list"),
        foreign_tar,
    ),
    Row(
        "a set of a newer version",
        "restore_from_backup.py {stamp}",
        2,
        BadFile,
        "{manifest} is of format 99, this version reads up to 1",
        ("use the version of these scripts that made it, or a newer one",),
        edited(format=99),
    ),
    Row(
        "a manifest that was edited",
        "restore_from_backup.py {stamp}",
        4,
        BackupDamaged,
        "{manifest} was damaged or edited: its checksum is not right",
        ("use another backup:", "python scripts/backup_automem.py --list"),
        edited(graph=None),
    ),
    Row(
        "an RDB with a wrong byte",
        "restore_from_backup.py {stamp}",
        4,
        BackupDamaged,
        "{rdb} does not have the sha256 that its manifest gives: it was damaged or edited",
        ("use another backup:", "python scripts/backup_automem.py --list"),
        damaged("rdb"),
    ),
    Row(
        "an archive with a wrong byte",
        "restore_from_backup.py {stamp}",
        4,
        BackupDamaged,
        "{archive} does not have the sha256 that its manifest gives: it was damaged or edited",
        ("use another backup:", "python scripts/backup_automem.py --list"),
        damaged("archive"),
    ),
    Row(
        "an RDB that is cut off",
        "restore_from_backup.py {file}",
        4,
        BackupDamaged,
        "{graph}_{stamp}.rdb is cut off: it does not end like an RDB file",
        ("use another backup:", "python scripts/backup_automem.py --list"),
        cut("rdb"),
    ),
    Row(
        "an archive that is cut off",
        "restore_from_backup.py {file}",
        4,
        BackupDamaged,
        "{file} is damaged: Compressed file ended before the end-of-stream marker was reached",
        ("use another backup:", "python scripts/backup_automem.py --list"),
        cut("archive"),
    ),
    Row(
        "a set with a missing file",
        "restore_from_backup.py {stamp}",
        4,
        BackupDamaged,
        "{rdb} is missing",
        ("use another backup:", "python scripts/backup_automem.py --list"),
        gone,
    ),
    Row(
        "a misspelt stamp to restore",
        "restore_from_backup.py {near}",
        1,
        MissingData,
        "no backup set {near} in {folder} (did you mean {stamp}?)",
        ("python scripts/backup_automem.py --list",),
    ),
    Row(
        "a misspelt stamp to check",
        "backup_automem.py --check {near}",
        1,
        MissingData,
        "no backup set {near} in {folder} (did you mean {stamp}?)",
        ("python scripts/backup_automem.py --list",),
    ),
    Row(
        "a misspelt stamp to pin",
        "backup_automem.py --pin {near}",
        2,
        UsageProblem,
        "no set {near} in {folder} (did you mean {stamp}?): STAMP is the time in the names of its files, as "
        "20261126_220840",
        ("python scripts/backup_automem.py --list {folder}",),
    ),
    Row(
        "latest in an empty folder",
        "restore_from_backup.py latest",
        1,
        MissingData,
        "no backup in {folder} is of graph '{graph}' or collection '{collection}' on these servers",
        (
            "name a file, or another folder with --backup-dir; this lists the sets:",
            "python scripts/backup_automem.py --list",
        ),
        no_backup,
    ),
    Row(
        "latest if the only set has one store",
        "restore_from_backup.py latest",
        1,
        MissingData,
        "no full backup set in {folder}, which `latest` needs; there are: backup_{stamp}.json (collection only)",
        ("name one:", "python scripts/restore_from_backup.py {manifest}"),
        one_store,
    ),
    Row(
        "the check of latest if the only set has one store",
        "backup_automem.py --check latest",
        1,
        MissingData,
        "no full backup set in {folder}, which `latest` needs; there are: backup_{stamp}.json (collection only)",
        ("name one:", "python scripts/backup_automem.py --check {manifest}"),
        one_store,
    ),
    Row(
        "latest if a set is dated in the future",
        "restore_from_backup.py latest",
        2,
        UsageProblem,
        "backup_{stamp}.json is dated 2 hours in the future: a clock was or is wrong, and which set is the "
        "newest is not known",
        (
            "compare this clock with the right time:",
            "date -u",
            "then name the set:",
            "python scripts/restore_from_backup.py {manifest}",
        ),
        of_time(2),
    ),
    Row(
        "latest of other stores",
        "restore_from_backup.py latest",
        1,
        MissingData,
        "no backup in {folder} is of graph 'memoires' or collection '{collection}' on these servers",
        (
            "name a file, or another folder with --backup-dir; this lists the sets:",
            "python scripts/backup_automem.py --list",
        ),
        env={"FALKORDB_GRAPH": "memoires"},
    ),
    Row(
        "no file",
        "restore_from_backup.py",
        2,
        UsageProblem,
        "no FILE is named",
        ("name one; this lists the backup sets:", "python scripts/backup_automem.py --list"),
    ),
    Row(
        "a file twice",
        "restore_from_backup.py {rdb} {rdb}",
        2,
        BadFile,
        "{rdb} and {rdb} are both of the graph",
        ("name one of them",),
    ),
    Row(
        "an archive of another collection",
        "restore_from_backup.py {archive}",
        2,
        UsageProblem,
        "{archive} is a backup of collection '{collection}', not of 'memoires' (QDRANT_COLLECTION)",
        ("if that is the collection to restore:", "export QDRANT_COLLECTION={collection}"),
        env={"QDRANT_COLLECTION": "memoires"},
    ),
    Row(
        "an RDB of another graph",
        "restore_from_backup.py {rdb}",
        2,
        UsageProblem,
        "{rdb} does not hold the graph 'memoires' (FALKORDB_GRAPH); it holds: {graphs}",
        ("set FALKORDB_GRAPH to the graph that is to be restored, or name another file",),
        env={"FALKORDB_GRAPH": "memoires"},
    ),
    Row(
        "a JSON backup of AutoMem's that lost nodes",
        "restore_from_backup.py {file}",
        4,
        BackupDamaged,
        "{file} is incomplete: relationships that lead to nodes that the file lacks: 1, such as to 2",
        ("use another backup of AutoMem's, or add --force-incomplete to restore what there is",),
        cut_automem_backup,
    ),
    Row(
        "a file of no set to check",
        "backup_automem.py --check {file}",
        2,
        BadFile,
        "{file} belongs to no backup set in {folder}: there is no manifest to verify it against",
        ("name the backup folder of its set with --backup-dir",),
        cut("rdb"),
    ),
    Row(
        "a damaged file among all",
        "backup_automem.py --check all",
        4,
        None,
        "DAMAGED   {archive}  does not have the sha256 that its manifest gives: it was damaged or edited",
        ("1 of 2 files cannot be restored. Take a new backup:", "python scripts/backup_automem.py"),
        damaged("archive"),
    ),
    Row(
        "memories newer than the backup",
        "restore_from_backup.py {rdb} --dry-run",
        0,
        None,
        "memories newer than the backup: 1 ({newer})",
        ("they remain in the safety backup that a restore takes",),
        changed_memory,
    ),
    # --- locks, folders, disks
    Row(
        "another run during a backup",
        "backup_automem.py",
        5,
        LockHeld,
        "another run is working on {target} ({holder})",
        ("wait until it has ended, then run the same command again",),
        locked(1),
    ),
    Row(
        "another run during a re-embed",
        "reembed_embeddings.py",
        5,
        LockHeld,
        "another run is working on {target} ({holder})",
        ("wait until it has ended, then run the same command again",),
        locked(0, "run on "),
    ),
    Row(
        "a full disk during a backup",
        "backup_automem.py",
        1,
        MigrationError,
        "no room left for the backup folder or the folder for temporary files: No space left on device",
        ("free some room:", "df -h"),
        full_disk,
    ),
    Row(
        "a full disk during a re-embed",
        "reembed_embeddings.py",
        1,
        MigrationError,
        "the embedding cache {folder}/embeddings/{collection}-{hash}.sqlite3 cannot be used: database or disk is full",
        ("free some room:", "df -h {folder}/embeddings", "then run the same command again"),
        full_disk,
    ),
    Row(
        "a backup folder that is no folder",
        "backup_automem.py --backup-dir {file}",
        2,
        UsageProblem,
        "cannot write to the folder {file}: File exists",
        ("name another folder with --backup-dir (or AUTOMEM_BACKUP_DIR)",),
        file("backups.txt", "x"),
    ),
    Row(
        "a backup folder in which everybody can write",
        "backup_automem.py",
        2,
        UsageProblem,
        "others may write into the folder {folder}: they could forge or replace what is in it",
        (
            "name another folder with --backup-dir, or close this one to others:",
            "chmod -R go-w {folder}",
            "(if its file system has no permissions, as exFAT: mount it with umask=077)",
        ),
        open_to_all,
    ),
    Row(
        "a folder for metrics that does not exist",
        "backup_automem.py --metrics /var/lib/none/a.prom",
        2,
        UsageProblem,
        "--metrics /var/lib/none/a.prom cannot be written: it must be a file in an existing folder that you may write",
        (
            "name a file in the folder of node exporter's --collector.textfile.directory; this shows yours:",
            "ls -ld /var/lib/none",
        ),
    ),
    # --- runs
    Row(
        "Ctrl-C",
        "reembed_embeddings.py --workers 2",
        130,
        MigrationError,
        "interrupted",
        ("run the same command again: it resumes", "python scripts/reembed_embeddings.py --workers 2"),
        interrupted,
        env=MIGRATE,
    ),
    Row(
        "an unfinished run with other settings",
        "reembed_embeddings.py",
        2,
        GuardRefused,
        "cannot resume the unfinished run of '{collection}': VECTOR_SIZE has changed. It was making 96d with "
        "text-embedding-3-large of {openai}; now it is 128d with text-embedding-3-large of {openai}",
        (
            "finish it:",
            "export VECTOR_SIZE=96 EMBEDDING_MODEL=text-embedding-3-large OPENAI_BASE_URL={openai}",
            "python scripts/reembed_embeddings.py",
            "or undo it:",
            "  the commands of the undo",
        ),
        unfinished(deleted=True),
        env={**MIGRATE, "VECTOR_SIZE": "128"},
    ),
    Row(
        "an unfinished run of another collection",
        "reembed_embeddings.py",
        2,
        GuardRefused,
        "an unfinished run of this graph was making the collection '{collection}'; QDRANT_COLLECTION is "
        "'memoires' now, which is absent or empty",
        (
            "finish it:",
            "export QDRANT_COLLECTION={collection}",
            "python scripts/reembed_embeddings.py",
            "or undo it:",
            "  the commands of the undo",
        ),
        unfinished(deleted=True),
        env={**MIGRATE, "QDRANT_COLLECTION": "memoires"},
    ),
    Row(
        "giving up a run that deleted the collection",
        "reembed_embeddings.py --abort",
        2,
        GuardRefused,
        "run {run} deleted the collection '{collection}', and no complete one has replaced it: nothing was removed",
        (
            "finish the run:",
            "python scripts/reembed_embeddings.py --no-switch",
            "or undo it:",
            "  the commands of the undo",
        ),
        unfinished(deleted=True),
        env=MIGRATE,
    ),
    Row(
        "deleting cached vectors that a run needs",
        "reembed_embeddings.py --prune-spool",
        2,
        GuardRefused,
        "a run is unfinished ({journal}): it may need what would be deleted",
        ("finish it, or give it up with --abort:", "python scripts/reembed_embeddings.py --no-switch"),
        unfinished,
        env=MIGRATE,
    ),
    Row(
        "an unfinished run, reported by another command",
        "backup_automem.py --list",
        0,
        None,
        "a run of reembed_embeddings.py is unfinished, or still running ({run}, at: staged and verified)",
        (
            "resume:  python scripts/reembed_embeddings.py",
            "give it up:  python scripts/reembed_embeddings.py --abort",
        ),
        unfinished,
        env=MIGRATE,
    ),
    Row(
        "a staged collection of somebody else",
        "reembed_embeddings.py",
        2,
        GuardRefused,
        "'{collection}__next' exists, and no unfinished run here made it: it is not overwritten",
        (
            "find out who made it, then delete it and run the same command again:",
            "curl -s -X DELETE {qdrant}/collections/{collection}__next",
        ),
        collection({"size": 96, "distance": "Cosine"}, "__next"),
        env=MIGRATE,
    ),
    Row(
        "another program writes into the staged collection",
        "reembed_embeddings.py --no-switch",
        4,
        VerificationFailed,
        "points of '{collection}__next' are not in the plan: 1, such as 7",
        ("run the same command again: it resumes from the embedding cache",),
        another_writer,
        env=MIGRATE,
    ),
    Row(
        "no backup",
        "reembed_embeddings.py",
        2,
        GuardRefused,
        "Collection '{collection}' already exists with different dimension\n"
        "(48d, 56 points; VECTOR_SIZE is 96d).\n"
        "It is not changed without a verified backup: there is none in {folder}",
        ("python scripts/backup_automem.py", "python scripts/reembed_embeddings.py"),
        no_backup,
        env=MIGRATE,
    ),
    Row(
        "an old backup",
        "reembed_embeddings.py",
        2,
        GuardRefused,
        "Collection '{collection}' already exists with different dimension\n"
        "(48d, 56 points; VECTOR_SIZE is 96d).\n"
        "It is not changed without a verified backup: the newest, backup_{stamp}.json, is 30 hours old (at most "
        "24)",
        ("python scripts/backup_automem.py", "python scripts/reembed_embeddings.py"),
        of_time(-30),
        env=MIGRATE,
    ),
    Row(
        "nothing to wait for",
        "reembed_embeddings.py --no-switch",
        2,
        UsageProblem,
        "there is no live collection 'memoires': --no-switch has nothing to wait for",
        ("python scripts/reembed_embeddings.py",),
        env={**MIGRATE, "QDRANT_COLLECTION": "memoires"},
    ),
    # --- the provider
    Row(
        "a key that is refused",
        "reembed_embeddings.py",
        6,
        ProviderRefused,
        "text-embedding-3-large at {openai} refused: 401 invalid_api_key",
        (
            "check OPENAI_API_KEY and OPENAI_BASE_URL,",
            "then run the same command again: it resumes from the embedding cache, nothing is paid for twice",
        ),
        fault(status=401, code="invalid_api_key", message="Incorrect API key provided: sk-***"),
        env=MIGRATE,
    ),
    Row(
        "a key without the permission",
        "reembed_embeddings.py",
        6,
        ProviderRefused,
        "text-embedding-3-large at {openai} refused: 403 model_not_found: Project `p` does not have access to "
        "this model",
        (
            "the key lacks the permission for this model: grant it or use another key,",
            "then run the same command again: it resumes from the embedding cache, nothing is paid for twice",
        ),
        fault(status=403, code="model_not_found", message="Project `p` does not have access to this model"),
        env=MIGRATE,
        matrix=True,
    ),
    Row(
        "a quota that is used up",
        "reembed_embeddings.py",
        6,
        ProviderRefused,
        "text-embedding-3-large at {openai} refused: 429 insufficient_quota: You exceeded your current quota",
        (
            "add credit or raise the spending limit at the provider,",
            "then run the same command again: it resumes from the embedding cache, nothing is paid for twice",
        ),
        fault(status=429, code="insufficient_quota", message="You exceeded your current quota"),
        env=MIGRATE,
    ),
    Row(
        "a misspelt model",
        "reembed_embeddings.py --dry-run",
        6,
        ProviderRefused,
        "text-embeding-3-large (did you mean text-embedding-3-large?) at {openai} refused: 404 model_not_found: "
        "The model `text-embeding-3-large` does not exist or you do not have access to it.",
        (
            "check EMBEDDING_MODEL, VECTOR_SIZE and OPENAI_BASE_URL,",
            "then run the same command again: it resumes from the embedding cache, nothing is paid for twice",
        ),
        env={**MIGRATE, "EMBEDDING_MODEL": "text-embeding-3-large"},
    ),
    Row(
        "a rate limit for hours",
        "reembed_embeddings.py",
        6,
        ProviderRefused,
        "Rate limit exceeded during re-embedding (text-embedding-3-large at {openai}, for {seconds} s: 429 "
        "rate_limit_exceeded: Rate limit reached) (the next request is allowed in 7,200 s)",
        (
            "wait for off-peak hours, raise the provider's limits, or lower --batch-size,",
            "then run the same command again: it resumes from the embedding cache, nothing is paid for twice",
        ),
        fault(status=429, code="rate_limit_exceeded", message="Rate limit reached", retry_after=7200),
        env=MIGRATE,
    ),
    Row(
        "a provider that fails",
        "reembed_embeddings.py",
        6,
        ProviderRefused,
        "text-embedding-3-large at {openai} gave no good answer for {seconds} s: 500 sandbox_fault: The server "
        "had an error",
        (
            "check OPENAI_BASE_URL, the network and the provider's status page,",
            "then run the same command again: it resumes from the embedding cache, nothing is paid for twice",
        ),
        fault(status=500, message="The server had an error"),
        env=MIGRATE,
        matrix=True,
    ),
    Row(
        "a provider that does not answer",
        "reembed_embeddings.py",
        6,
        ProviderRefused,
        "text-embedding-3-large at {endpoint} gave no good answer for {seconds} s: [Errno 111] Connection refused",
        (
            "check OPENAI_BASE_URL, the network and the provider's status page,",
            "then run the same command again: it resumes from the embedding cache, nothing is paid for twice",
        ),
        endpoint_down("OPENAI_BASE_URL"),
        env=MIGRATE,
    ),
    Row(
        "Ollama does not run",
        "reembed_embeddings.py --dry-run",
        6,
        ProviderRefused,
        "nomic-embed-text at {endpoint}/v1 gave no good answer for {seconds} s: [Errno 111] Connection refused",
        (
            "check OLLAMA_BASE_URL, and that Ollama runs there (ollama serve),",
            "then run the same command again: it resumes from the embedding cache, nothing is paid for twice",
        ),
        endpoint_down("OLLAMA_BASE_URL"),
        env={"EMBEDDING_PROVIDER": "ollama", "VECTOR_SIZE": "768"},
    ),
    Row(
        "too many tokens for the provider",
        "reembed_embeddings.py",
        6,
        ProviderRefused,
        "text-embedding-3-large at {openai} cannot embed even a plain word: 400 max_tokens_per_request: "
        "Requested 400000 tokens, max 300000",
        ("check EMBEDDING_MODEL, VECTOR_SIZE and OPENAI_BASE_URL, then run the same command again",),
        fault(status=400, code="max_tokens_per_request", message="Requested 400000 tokens, max 300000"),
        env=MIGRATE,
    ),
    Row(
        "vectors of another size",
        "reembed_embeddings.py",
        2,
        UsageProblem,
        "text-embedding-3-large answered with 64d vectors, VECTOR_SIZE is 96",
        ("export VECTOR_SIZE=64", "or set EMBEDDING_MODEL to a model that makes 96d"),
        fault(wrong_width=64),
        env=MIGRATE,
    ),
    Row(
        "a price over the limit",
        "reembed_embeddings.py --max-cost 0",
        2,
        UsageProblem,
        "this would cost $0.0012, --max-cost is $0; nothing was spent",
        ("raise --max-cost (or leave it out), or set EMBEDDING_MODEL to a cheaper model",),
        env=MIGRATE,
    ),
    Row(
        "a model without a price",
        "reembed_embeddings.py --max-cost 5",
        2,
        UsageProblem,
        "there is no list price for nomic-embed, --max-cost is $5; nothing was spent",
        ("leave --max-cost out, or set EMBEDDING_MODEL to a model with a list price",),
        env={**MIGRATE, "EMBEDDING_MODEL": "nomic-embed"},
    ),
    # --- AutoMem
    Row(
        "AutoMem runs",
        "restore_from_backup.py {rdb}",
        2,
        UsageProblem,
        "AutoMem is running ({automem} answers): after the graph is replaced its caches would write values under "
        "wrong names",
        (
            "stop AutoMem, not the stores, in its folder:",
            "docker compose stop flask-api",
            "then run the same command again, and start AutoMem afterwards:",
            "docker compose up -d --force-recreate flask-api",
            "if it is not AutoMem that listens there, or only a proxy answers for it, name AutoMem's own address:",
            "export AUTOMEM_API_URL=http://localhost:8001",
        ),
        automem_runs,
    ),
    Row(
        "a gateway answers for AutoMem",
        "restore_from_backup.py {rdb}",
        2,
        UsageProblem,
        "AutoMem may be running ({web}: HTTP 502 from {server}, not AutoMem's health): after the graph is "
        "replaced its caches would write values under wrong names",
        (
            "stop AutoMem, not the stores, in its folder:",
            "docker compose stop flask-api",
            "then run the same command again, and start AutoMem afterwards:",
            "docker compose up -d --force-recreate flask-api",
            "if it is not AutoMem that listens there, or only a proxy answers for it, name AutoMem's own address:",
            "export AUTOMEM_API_URL=http://localhost:8001",
        ),
        web_server("AUTOMEM_API_URL", 502),
    ),
    Row(
        "AutoMem was not started again",
        "verify_migration.py --after-restart",
        4,
        None,
        "1 of 11 checks FAILED. What helps:",
        (
            "start AutoMem, in its folder:",
            "docker compose up -d --force-recreate flask-api",
            "if it does not start, its log says why:",
            "docker compose logs flask-api",
            "if it listens at another address:",
            "export AUTOMEM_API_URL=...",
        ),
    ),
    Row(
        "AutoMem refuses the token",
        "verify_migration.py",
        4,
        None,
        "1 of 11 checks FAILED. What helps:",
        ("export AUTOMEM_API_TOKEN=...", "the one that the service was started with"),
        automem_runs,
        env={"AUTOMEM_API_TOKEN": "wrong"},
    ),
    Row(
        "a migration record that AutoMem does not take",
        "verify_migration.py --record",
        3,
        None,
        "warning: --record: AutoMem's API does not answer at http://127.0.0.1:1: nothing listens there",
        ("start AutoMem, or set AUTOMEM_API_URL to its address",),
    ),
    # --- copies elsewhere
    Row(
        "another file at the place of the copies",
        "backup_automem.py --check {stamp} --upload {place}",
        1,
        MigrationError,
        "the backup did not arrive: {place}/backup_{stamp}.json is not the file that is to be sent\n"
        "the set is whole here: {manifest}",
        (
            "if another machine uploads there, name another folder; if none does, remove that file there",
            "python scripts/backup_automem.py --check {manifest} --upload {place}",
        ),
        occupied,
    ),
    Row(
        "a place of copies that does not answer",
        "backup_automem.py --upload {place}",
        1,
        StoreUnreachable,
        "cannot open {place}: Unable to connect to port {port} on 127.0.0.1",
        ("check the host, the port and the network, then run the same command again",),
        sftp_down,
    ),
    Row(
        "a place of copies in the backup folder",
        "backup_automem.py --upload {folder}/copies",
        2,
        UsageProblem,
        "{folder}/copies is in the backup folder {folder}: that is no copy elsewhere",
        ("name a folder outside of it, on another disk, or a URL",),
    ),
    Row(
        "a place of copies that is no URL",
        "backup_automem.py --upload bucket:folder",
        2,
        UsageProblem,
        "the place of the copies has a ':' before its first slash, so it is neither a URL nor a local folder",
        (
            (
                "name s3://bucket/folder, gs://bucket/folder, az://container/folder, sftp://user@host/folder, or a "
                "local folder (./a:b if it has a ':')"
            ),
        ),
    ),
    Row(
        "a kind of place that is not supported",
        "restore_from_backup.py ftp://backup.example/x.rdb",
        2,
        UsageProblem,
        "copies of backups cannot be at ftp://",
        (
            (
                "name s3://bucket/folder, gs://bucket/folder, az://container/folder, sftp://user@host/folder, or a "
                "local folder (./a:b if it has a ':')"
            ),
        ),
    ),
    Row(
        "a kind of place whose package is missing",
        "backup_automem.py --upload s3://bucket/x",
        2,
        UsageProblem,
        "s3:// needs the Python package 's3fs', which is not installed here",
        (
            "python -m pip install s3fs",
            "or, for every kind of place:",
            "python -m pip install -r requirements-offsite.txt",
        ),
        lacks_package("s3fs"),
    ),
    Row(
        "a passphrase that others can read",
        "backup_automem.py --upload {tmp}/copies",
        2,
        UsageProblem,
        "AUTOMEM_BACKUP_PASSPHRASE_FILE: other users may read {file}",
        ("chmod 600 {file}",),
        passphrase(0o644),
    ),
    Row(
        "a public key that is none",
        "backup_automem.py --upload {tmp}/copies",
        2,
        UsageProblem,
        "AUTOMEM_BACKUP_RECIPIENTS: 'age1typo'... is no public key of age or SSH: invalid Bech32 encoding",
        ("this prints the public key of a key file:", "age-keygen -y key.txt"),
        env={"AUTOMEM_BACKUP_RECIPIENTS": "age1typo"},
    ),
    Row(
        "an empty place of copies",
        "backup_automem.py --list {tmp}/copies",
        1,
        MissingData,
        "no backup at {tmp}/copies",
        ("check the spelling of the bucket and the folder",),
    ),
    # --- flags
    Row(
        "a misspelt flag",
        "reembed_embeddings.py --dryrun",
        2,
        UsageProblem,
        "unrecognized arguments: --dryrun",
        ("did you mean --dry-run?", "python scripts/reembed_embeddings.py --help"),
    ),
    Row(
        "flags that exclude each other",
        "backup_automem.py --list --check all",
        2,
        UsageProblem,
        "--check and --list do not go together",
        ("give one of --check, --list",),
    ),
    Row(
        "a flag that needs another one",
        "backup_automem.py --keep 3",
        2,
        UsageProblem,
        "--keep requires --cleanup",
        ("python scripts/backup_automem.py --cleanup --keep 3 --dry-run",),
    ),
    Row(
        "a file for a flag that takes none",
        "restore_from_backup.py {stamp} --abort",
        2,
        UsageProblem,
        "--abort takes no FILE",
        ("python scripts/restore_from_backup.py --abort",),
    ),
    Row(
        "a cleanup that would keep nothing",
        "backup_automem.py --cleanup --keep 0",
        2,
        UsageProblem,
        "--keep must be at least 1",
        ("python scripts/backup_automem.py --cleanup --keep 3 --dry-run",),
    ),
    Row(
        "a flag that is given twice",
        "backup_automem.py --check all --check latest",
        2,
        UsageProblem,
        "--check is given 2 times, but accepts one value: run once for each",
        ("python scripts/backup_automem.py --help",),
    ),
    Row(
        "an unset variable between quotes",
        'backup_automem.py --upload ""',
        2,
        UsageProblem,
        "--upload is empty: is a variable unset?",
        ("python scripts/backup_automem.py --help",),
    ),
    Row(
        "a number that is none",
        "verify_migration.py --sample many",
        2,
        UsageProblem,
        "argument --sample: many is not a whole number of at least 1",
        ("python scripts/verify_migration.py --help",),
    ),
    Row(
        "an amount that is none",
        "reembed_embeddings.py --max-cost ten",
        2,
        UsageProblem,
        "argument --max-cost: ten is not an amount in US dollars",
        ("python scripts/reembed_embeddings.py --help",),
    ),
    Row(
        "a backup that nobody verified",
        "backup_automem.py --no-verify",
        3,
        None,
        "warning: the backup was not verified (--no-verify): re-embed will not rely on it",
        (),
    ),
    # --- quickstart
    Row(
        "a misspelt action",
        "quickstart.py serv",
        2,
        UsageProblem,
        "argument action: invalid choice: 'serv' (choose from 'serve', 'automem', 'provider')",
        ("python scripts/quickstart.py --help",),
    ),
    Row(
        "a failure that the sandbox does not know",
        "quickstart.py provider 503",
        2,
        UsageProblem,
        "provider takes one of ok, slow, 429, quota, key, 500, not '503'",
        ("python scripts/quickstart.py --help",),
    ),
    Row(
        "a sandbox that does not run",
        "quickstart.py automem restart",
        1,
        MigrationError,
        "no sandbox is served on this machine by this user",
        ("python scripts/quickstart.py serve",),
        env={"TMPDIR": "{tmp}"},  # where it is looked for: somebody may serve one here
    ),
]


@pytest.fixture(scope="module")
def shared(session_servers, tmp_path_factory) -> Iterator[Shared]:
    """Stores with a backup; no row changes them."""
    one = Shared(session_servers, tmp_path_factory.mktemp)
    before = one.stocked.state()
    yield one
    assert one.stocked.state() == before
    one.close()


@pytest.fixture
def night(shared, tmp_path, monkeypatch) -> Iterator[Night]:
    """The stocked operator with a copy of the backup. Afterwards the names on the servers are what they were."""
    operator = Operator(shared.servers, tmp_path, shared.stocked.graph, shared.stocked.collection)
    shutil.copytree(shared.stocked.backups, operator.backups)
    one, names = Night(operator, shared, monkeypatch), (operator.graphs(), operator.collections())
    stamp = one.manifest().stem.removeprefix("backup_")
    one.name(
        qdrant=shared.servers.qdrant_url,
        falkordb=f"127.0.0.1:{shared.servers.falkordb.port}",
        falkordb_port=shared.servers.falkordb.port,
        openai=shared.servers.openai.base_url,
        graph=operator.graph,
        collection=operator.collection,
        folder=operator.backups,
        tmp=tmp_path,
        stamp=stamp,
        near=stamp[:-1] + str(9 - int(stamp[-1])),
        manifest=one.manifest(),
        rdb=operator.rdb(),
        archive=operator.archive(),
        newer=NEWER,
        root=ROOT,
        graphs=", ".join(graphs_of(operator)),
        collections=", ".join(list_collections(operator.qdrant)),
    )
    yield one
    stocked = shared.stocked
    assert (stocked.graphs(), stocked.collections()) == names


def graphs_of(operator: Operator) -> list[str]:
    """Every graph of the server, those of other tests included."""
    with connect(operator.servers.falkordb.address) as conn:
        return list_graphs(conn)


def read_by_operator(text: str) -> str:
    """The text as it is in the folder of the checkout, without what differs from run to run."""
    text = re.sub(rf"\S*python\S* {ROOT}/scripts/", "python scripts/", text)
    text = re.sub(rf"\S*python\S* (-m pip install )(-r )?({ROOT}/)?", r"python \1\2", text)
    text = re.sub(r"-[0-9a-f]{8}\.sqlite3", "-{hash}.sqlite3", text)
    return re.sub(r"\bfor \d+ s\b", "for {seconds} s", text)


@pytest.mark.parametrize(
    "row",
    [pytest.param(one, id=one.situation, marks=[pytest.mark.matrix] if one.matrix else []) for one in TABLE],
)
def test_what_the_operator_reads(row, night, monkeypatch):
    raised: list[MigrationError] = []
    report = cli._report
    monkeypatch.setattr(cli, "_report", lambda error, **how: (raised.append(error), report(error, **how)))
    with row.setup(night):
        night.operator.export(**{name: night.fill(value) for name, value in row.env.items()})
        script, *words = shlex.split(night.fill(row.command))
        result = night.operator.run(script.removesuffix(".py"), *words, expect=row.code)
    assert PASSWORD not in result.out + result.err
    message, lines = night.fill(row.message), [night.fill(one) for one in row.next_step]
    if row.error is None:
        assert raised == []
        text = read_by_operator(f"{result.err}\n{result.out}")
        shown = [line.strip() for line in text.splitlines() if line]
        at = shown.index(message)
        assert shown[at : at + 1 + len(lines)] == [message, *lines]
        return
    assert [one_of_ours(type(error)) for error in raised] == [row.error]
    begin = "ValueError: " if row.error is DimensionMismatch else "error: "
    before, found, error = read_by_operator(result.err).partition(begin)
    assert found + error == f"{begin}{message}\n\nnext:\n  " + "\n  ".join(lines) + "\n"
    if "is unfinished" not in before:  # every command prints how such a run can be resumed and undone
        assert not [line for line in lines if f"{line}\n" in before], "a next step is printed twice"
    assert not before or row.error is not DimensionMismatch
    assert result.out == ""


def one_of_ours(kind: type[MigrationError]) -> type[MigrationError]:
    """The class itself or its nearest base in lib/errors.py."""
    return next(one for one in kind.__mro__ if one.__module__ == errors.__name__)


def test_every_class_of_error_every_exit_code_and_every_script_is_in_the_table():
    assert len(TABLE) == len({row.situation for row in TABLE}) >= 60
    classes = {one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, MigrationError)}
    assert {row.error for row in TABLE} == {*classes, None}
    codes = {value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}
    assert {row.code for row in TABLE} == codes
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")} - {"__init__.py"}
    assert {row.command.split()[0] for row in TABLE} == scripts


COMMANDS = [
    "age-keygen",
    "chmod",
    "curl",
    "date",
    "df",
    "docker",
    "export",
    "ls",
    "make",
    "mv",
    "python",
    "redis-cli",
    "ssh",
    "sudo",
    "unset",
]
IN_A_SENTENCE = re.compile(r"python scripts/|-m pip |\bexport [A-Z]|docker compose|   ")


def test_each_line_of_a_next_step_is_a_sentence_or_a_command_that_exists():
    """A command can be pasted as a whole: a shell parses it, and the script accepts its flags."""
    lines = [line for row in TABLE if row.error for line in row.next_step]
    commands = [line for line in lines if line.split()[0] in COMMANDS]
    assert not [line for line in lines if line not in commands and IN_A_SENTENCE.search(line)]
    assert [line for line in commands if line.rstrip().endswith(")")] == []
    subprocess.run(["bash", "-n"], input="\n".join(commands), text=True, check=True)
    for words in (shlex.split(part) for line in commands for part in line.split(" && ")):
        if words[0] == "export":
            assert {one.partition("=")[0] for one in words[1:]} <= DEFAULTS.keys()
        if words[:1] == ["python"] and words[1].startswith("scripts/") and words[2:] != ["--help"]:
            module = import_module(words[1].removesuffix(".py").replace("/", "."))
            module.arguments().parse_args(words[2:])


def test_the_rows_of_the_guide_begin_with_its_words():
    """AutoMem's guide documents them; operators search for them."""
    begins = {row.message.splitlines()[0] for row in TABLE}
    assert "VECTOR DIMENSION MISMATCH" in begins
    assert "Collection '{collection}' already exists with different dimension" in begins
    assert any(one.startswith("Rate limit exceeded during re-embedding") for one in begins)


# Rows whose first command settles it in this sandbox, and what the command of the row prints then.
LEADS_ON = {
    "a size that the model cannot make": "dry run: ",
    "a provider that does not exist": "dry run: ",
    "AutoMem's default model differs": "dry run: ",
    "another size than the collection's": "passed       size and distance  48d Cosine",
    "https for a Qdrant without a certificate": "passed       size and distance  48d Cosine",
    "an alias instead of the collection": "dry run: ",
    "an archive of another collection": "would restore, after a safety backup",
    "vectors of another size": "dry run: ",
    "a backup folder in which everybody can write": "would back up:",
    "a passphrase that others can read": "would back up:",
}


@pytest.mark.matrix
@pytest.mark.parametrize("row", [pytest.param(one, id=one.situation) for one in TABLE if one.situation in LEADS_ON])
def test_the_next_step_leads_on(row, night):
    """As pasted; the command of the row then plans what it refused before."""
    with row.setup(night):
        night.operator.export(**{name: night.fill(value) for name, value in row.env.items()})
        line = night.fill(next(one for one in row.next_step if one.split()[0] in COMMANDS))
        if line.startswith("export "):
            night.operator.export(**dict(word.split("=", 1) for word in shlex.split(line)[1:]))
        else:
            subprocess.run(["bash", "-ec", line], check=True)
        script, *words = shlex.split(night.fill(row.command))
        plan = [] if script.startswith("verify") else ["--dry-run"]
        result = night.operator.run(script.removesuffix(".py"), *words, *plan)
    assert LEADS_ON[row.situation] in result.out
