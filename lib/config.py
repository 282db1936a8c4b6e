"""The configuration: one frozen Config, built once in `main`, every value with where it came from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from lib.dimensions import EmbeddingSpec
from lib.env_files import Setting, read_settings
from lib.errors import ConfigError, UsageProblem

PROJECT_ROOT = Path(__file__).resolve().parent.parent
OPENAI_URL = "https://api.openai.com/v1"
_QDRANT_PORT = 6333
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}

DEFAULTS: dict[str, str] = {
    "FALKORDB_HOST": "localhost",
    "FALKORDB_PORT": "6379",
    "FALKORDB_USERNAME": "",
    "FALKORDB_PASSWORD": "",
    "FALKORDB_TLS": "false",
    "FALKORDB_GRAPH": "memories",
    "FALKORDB_SCRATCH_SERVER": "",
    "FALKORDB_SCRATCH_MODULE": "",
    "QDRANT_URL": "",
    "QDRANT_HOST": "localhost",
    "QDRANT_PORT": str(_QDRANT_PORT),
    "QDRANT_API_KEY": "",
    "QDRANT_COLLECTION": "memories",
    "QDRANT_TIMEOUT_SECONDS": "60",
    "VECTOR_SIZE": "3072",
    "EMBEDDING_MODEL": "text-embedding-3-large",
    "OPENAI_API_KEY": "",
    "OPENAI_BASE_URL": OPENAI_URL,
    "AUTOMEM_API_URL": "http://localhost:8001",
    "AUTOMEM_API_TOKEN": "",
    "AUTOMEM_BACKUP_DIR": str(PROJECT_ROOT / "backups"),
}
SECRETS = {"FALKORDB_PASSWORD", "QDRANT_API_KEY", "OPENAI_API_KEY", "AUTOMEM_API_TOKEN"}


@dataclass(frozen=True)
class Config:
    """Everything the scripts need, validated. Secrets never show in its repr."""

    falkordb_host: str
    falkordb_port: int
    falkordb_username: str
    falkordb_password: str = field(repr=False)
    falkordb_tls: bool
    graph: str
    scratch_server: str
    scratch_module: str
    qdrant_url: str = field(repr=False)
    qdrant_api_key: str = field(repr=False)
    collection: str
    qdrant_timeout: float
    vector_size: int
    embedding_model: str
    openai_api_key: str = field(repr=False)
    openai_base_url: str = field(repr=False)
    api_url: str = field(repr=False)
    api_token: str = field(repr=False)
    backup_dir: Path
    settings: Mapping[str, Setting] = field(repr=False)

    @property
    def spec(self) -> EmbeddingSpec:
        """What decides a vector: endpoint, model, size."""
        return EmbeddingSpec(self.openai_base_url, self.embedding_model, self.vector_size)

    def targets(self) -> list[str]:
        """The graph and the collection by address and name, one spelling for one target, no secret."""
        host = _one_spelling(self.falkordb_host)
        parts = urlsplit(self.qdrant_url)
        qdrant = f"{_one_spelling(parts.hostname or '')}:{parts.port}"
        return [f"falkordb {host}:{self.falkordb_port} {self.graph}", f"qdrant {qdrant} {self.collection}"]

    def rows(self) -> list[tuple[str, str, str]]:
        """Each setting as (name, value with secrets masked, where it came from)."""
        return [(name, masked(name, one.value), one.origin) for name, one in self.settings.items()]


def _one_spelling(host: str) -> str:
    return "127.0.0.1" if host.lower() in {"localhost", "::1", "127.0.0.1"} else host.lower()


def masked(name: str, value: str) -> str:
    """The value as it may be shown: secrets as stars, URLs without their credentials."""
    if name in SECRETS:
        return "(not set)" if not value else "****"
    if name.endswith("_URL") and "@" in value:
        scheme = value.split("://", 1)[0] + "://" if "://" in value else ""
        return f"{scheme}****@{value.rsplit('@', 1)[1]}"
    return value


class _Reader:
    """Turns texts into values and gathers every fault on the way."""

    def __init__(self, settings: Mapping[str, Setting], faults: list[str]) -> None:
        self.settings = settings
        self.faults = faults

    def text(self, name: str) -> str:
        return self.settings[name].value

    def fault(self, name: str, why: str) -> None:
        one = self.settings[name]
        self.faults.append(f"{name}={masked(name, one.value)} ({one.origin}): {why}")

    def number(self, name: str, low: float, high: float, kind: type[int | float]) -> float:
        try:
            value = kind(self.text(name))
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            self.fault(name, f"must be {word} from {low:g} to {high:g}")
            return low
        if not low <= value <= high:
            self.fault(name, f"must be from {low:g} to {high:g}")
        return value

    def flag(self, name: str) -> bool:
        word = self.text(name).lower()
        if word not in _TRUE | _FALSE:
            self.fault(name, "must be true or false")
        return word in _TRUE

    def url(self, name: str, default_port: int | None = None) -> str:
        value = self.text(name)
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError:
            self.fault(name, "is not a URL")
            return value
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            self.fault(
                name, f"must begin with http:// or https://, such as http://localhost:{default_port or 8001}"
            )
            return value
        netloc = parts.netloc if port or not default_port else f"{parts.netloc}:{default_port}"
        return urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", ""))

    def name(self, name: str) -> str:
        value = self.text(name)
        if "/" in value or value != value.strip():
            self.fault(name, "must not hold a slash or blanks at its ends")
        return value


def _qdrant_setting(settings: dict[str, Setting]) -> None:
    """QDRANT_URL beats QDRANT_HOST and QDRANT_PORT, wherever each is set, as in AutoMem."""
    if settings["QDRANT_URL"].value:
        return
    host, port = settings["QDRANT_HOST"], settings["QDRANT_PORT"]
    origin = "default" if host.origin == port.origin == "default" else f"QDRANT_HOST ({host.origin})"
    settings["QDRANT_URL"] = Setting(f"http://{host.value}:{port.value}", origin)


def load_config(
    environ: Mapping[str, str],
    *,
    env_file: str | None = None,
    backup_dir: str | None = None,
    cwd: Path | None = None,
    root: Path = PROJECT_ROOT,
) -> Config:
    """Read and check every setting; raises ConfigError with all faults in one go.

    Precedence: environment, `env_file` (or AUTOMEM_ENV_FILE), `.env` in `cwd`, `.env` in `root`,
    `~/.config/automem/.env`, defaults. An empty value counts as not set.
    """
    settings, faults = read_settings(environ, DEFAULTS, env_file, cwd or Path.cwd(), root)
    if backup_dir:
        settings["AUTOMEM_BACKUP_DIR"] = Setting(backup_dir, "--backup-dir")
    _qdrant_setting(settings)
    config = _build(_Reader(settings, faults), settings)
    if faults:
        raise ConfigError(faults)
    return config


def _build(read: _Reader, settings: Mapping[str, Setting]) -> Config:
    password = read.text("FALKORDB_PASSWORD")
    return Config(
        falkordb_host=read.text("FALKORDB_HOST"),
        falkordb_port=int(read.number("FALKORDB_PORT", 1, 65535, int)),
        falkordb_username=read.text("FALKORDB_USERNAME") or ("default" if password else ""),
        falkordb_password=password,
        falkordb_tls=read.flag("FALKORDB_TLS"),
        graph=read.text("FALKORDB_GRAPH"),
        scratch_server=read.text("FALKORDB_SCRATCH_SERVER"),
        scratch_module=read.text("FALKORDB_SCRATCH_MODULE"),
        qdrant_url=read.url("QDRANT_URL", _QDRANT_PORT),
        qdrant_api_key=read.text("QDRANT_API_KEY"),
        collection=read.name("QDRANT_COLLECTION"),
        qdrant_timeout=read.number("QDRANT_TIMEOUT_SECONDS", 1, 86400, float),
        vector_size=int(read.number("VECTOR_SIZE", 1, 65536, int)),
        embedding_model=read.text("EMBEDDING_MODEL"),
        openai_api_key=read.text("OPENAI_API_KEY"),
        openai_base_url=read.url("OPENAI_BASE_URL"),
        api_url=read.url("AUTOMEM_API_URL"),
        api_token=read.text("AUTOMEM_API_TOKEN"),
        backup_dir=Path(read.text("AUTOMEM_BACKUP_DIR")).expanduser().absolute(),
        settings=settings,
    )


def config_of(env_file: str | None, backup_dir: str | None) -> Config:
    """The configuration of this process."""
    return load_config(os.environ, env_file=env_file, backup_dir=backup_dir)


def require_openai_key(config: Config) -> None:
    """Raise UsageProblem where no key is set: told before anything is touched."""
    if not config.openai_api_key:
        raise UsageProblem(
            "OPENAI_API_KEY is not set: embeddings cannot be made",
            next_step="export OPENAI_API_KEY=...   (a local server that needs none takes any word)",
        )
