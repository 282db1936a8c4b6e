"""The configuration: one frozen Config, built once in `main`. Each value knows where it came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from lib.backup.age import CopyKeys
from lib.backup.catalog import Deployment
from lib.dimensions import EmbeddingSpec, check_model
from lib.env_files import DEFAULT, Setting, read_settings
from lib.errors import ConfigError, UsageProblem
from lib.network import canonical_host, is_private, without_login

SECRETS = {"FALKORDB_PASSWORD", "QDRANT_API_KEY", "OPENAI_API_KEY", "AUTOMEM_API_TOKEN"}
PRIVATE_KEY = "AGE-SECRET-KEY-"
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def masked(name: str, value: str) -> str:
    """The value as it may be shown: secrets as stars, addresses without credentials, query and fragment."""
    if name in SECRETS:
        return "****" if value else "(not set)"
    if PRIVATE_KEY in value.upper():
        return "****"
    if name.endswith("_URLS"):
        return ",".join(masked(name.removesuffix("S"), one) for one in _several(value))
    if not name.endswith(("_URL", "_HOST")):
        return value
    if "@" in value:
        scheme = value.split("://", 1)[0] + "://" if "://" in value else ""
        login, _, place = value.rpartition("@")
        value = f"{scheme}****@{'****' if set(login) & set('?#') else place}"  # or the @ is part of a query
    end = re.search(r"[?#]", value)
    return f"{value[: end.start()]}{end[0]}****" if end else value


def same_value(left: str, right: str) -> bool:
    """Whether two texts set the same value: blanks around them and the word for true or false do not matter."""
    one, other = left.strip(), right.strip()
    return one == other or any({one.lower(), other.lower()} <= words for words in (_TRUE, _FALSE))


def _several(value: str) -> list[str]:
    """The URLs between commas; a comma within a password parts nothing."""
    return [one for one in re.split(r"[\s,]*,\s*(?=[a-z]+://|$)", value.strip()) if one]


class Reader:
    """Turns texts into values and gathers every fault on the way."""

    def __init__(self, settings: Mapping[str, Setting], faults: list[str]) -> None:
        self.settings = settings
        self.faults = faults

    def text(self, name: str) -> str:
        """The value as it was written."""
        return self.settings[name].value

    def no_key(self, name: str) -> str:
        """The path of a file of keys, or public keys; a private key does not belong there."""
        if PRIVATE_KEY in self.text(name).upper():
            self.fault(name, "holds a private key: keep the key in a file of mode 600, and name the file")
        return self.text(name)

    def fault(self, name: str, why: str) -> None:
        """Note what is wrong with a setting, and where it came from."""
        one = self.settings[name]
        self.faults.append(f"{name}={masked(name, one.value)} ({one.origin}): {why}")

    def number(self, name: str, low: float, high: float, kind: type[int | float]) -> float:
        """A number from `low` to `high`."""
        try:
            value = kind(self.text(name))
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            self.fault(name, f"must be {word} from {low:g} to {high:g}")
            return low
        if not low <= value <= high:
            self.fault(name, f"must be from {low:g} to {high:g}")
            return low
        return value

    def port(self, name: str) -> int:
        """A TCP port."""
        return int(self.number(name, 1, 65535, int))

    def flag(self, name: str) -> bool:
        """True or false."""
        word = self.text(name).lower()
        if word not in _TRUE | _FALSE:
            self.fault(name, "must be true or false")
        return word in _TRUE

    def host(self, name: str) -> str:
        """A host's name or address alone."""
        value = self.text(name)
        if set(value) & set("/@?# ") or value.count(":") == 1:
            port = name.replace("_HOST", "_PORT")
            self.fault(name, f"must be a host alone, such as localhost (its port belongs into {port})")
        return value

    def url(self, name: str, example: str, default_port: int | None = None, *, query: bool = False) -> str:
        """An http(s) URL with its port, without a slash at its end. A query is a fault unless `query` is set."""
        return self._url(name, self.text(name), example, default_port, query=query)

    def urls(self, name: str, example: str, default_port: int | None = None) -> tuple[str, ...]:
        """Several of them between commas; none where nothing is set."""
        return tuple(self._url(name, one, example, default_port) for one in _several(self.text(name)))

    def _url(
        self, name: str, value: str, example: str, default_port: int | None, *, query: bool = False
    ) -> str:
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError:
            self.fault(name, f"is no URL such as {example}")
            return value
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
            self.fault(name, f"must begin with http:// or https://, such as {example}")
            return value
        if parts.fragment or (parts.query and not query):
            what = "a fragment (from # on)" if parts.fragment else "a query (from ? on)"
            self.fault(name, f"{what} is not supported here, and nothing of it would be sent: leave it out")
            return value
        login, at, _place = parts.netloc.rpartition("@")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        place = f"{login}{at}{host}{f':{port}' if (port := port or default_port) else ''}"
        return urlunsplit((parts.scheme, place, parts.path.rstrip("/"), parts.query, ""))

    def name(self, name: str) -> str:
        """A name that becomes part of a file's name."""
        value = self.text(name)
        if "/" in value or value != value.strip() or not value.isprintable():
            self.fault(name, "must not hold a slash, blanks at its ends or what cannot be printed")
        if value in {".", ".."}:
            self.fault(name, "is a folder in every URL: it reaches no such collection or graph")
        return value

    def model(self, name: str) -> str:
        """A model's name."""
        value = self.text(name).strip()
        if not value.isprintable():
            self.fault(name, "holds characters that no model's name has")
        return value

    def header(self, name: str) -> str:
        """A secret that travels in an HTTP header."""
        value = self.text(name)
        if value and not (value.isascii() and value.isprintable() and value == value.strip()):
            self.fault(name, "holds blanks at its ends or characters that no HTTP header can carry")
        return value

    def folder(self, name: str) -> Path:
        """A folder's absolute path; `~` is the home folder."""
        value = self.text(name)
        if not value.strip():
            self.fault(name, "must not be blank: is a variable unset?")
        try:
            return Path(value).expanduser().absolute()
        except RuntimeError:
            self.fault(name, "has a ~ whose home folder is not known")
            return Path(value)


PROJECT_ROOT = Path(__file__).resolve().parent.parent
OPENAI_URL = "https://api.openai.com/v1"
_QDRANT_PORT = 6333

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
    "QDRANT_NODE_URLS": "",
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
    "AUTOMEM_BACKUP_RECIPIENTS": "",
    "AUTOMEM_BACKUP_PASSPHRASE_FILE": "",
    "AUTOMEM_BACKUP_IDENTITY": "",
}


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
    qdrant_node_urls: tuple[str, ...] = field(repr=False)
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
    copies: CopyKeys
    settings: Mapping[str, Setting] = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def spec(self) -> EmbeddingSpec:
        """What decides a vector: endpoint, model, size."""
        return EmbeddingSpec(self.openai_base_url, self.embedding_model, self.vector_size)

    def targets(self) -> list[str]:
        """The graph and the collection by address and name, one spelling for one target, no secret."""
        host = canonical_host(self.falkordb_host)
        parts = urlsplit(self.qdrant_url)
        qdrant = f"{canonical_host(parts.hostname or '')}:{parts.port}{parts.path}"
        return [f"falkordb {host}:{self.falkordb_port} {self.graph}", f"qdrant {qdrant} {self.collection}"]

    def deployment(self) -> Deployment:
        """Whose backup sets are this configuration's."""
        graph_server = f"{self.falkordb_host}:{self.falkordb_port}"
        return Deployment(graph_server, self.graph, self.qdrant_url, self.collection)

    def rows(self) -> list[tuple[str, str, str]]:
        """Each setting as (name, value with secrets masked, where it came from)."""
        return [(name, masked(name, one.value), one.origin) for name, one in self.settings.items()]


def _qdrant_url(read: Reader, settings: dict[str, Setting]) -> str:
    """QDRANT_URL beats QDRANT_HOST and QDRANT_PORT, wherever each is set, as in AutoMem."""
    if settings["QDRANT_URL"].value:
        return read.url("QDRANT_URL", f"http://localhost:{_QDRANT_PORT}", _QDRANT_PORT)
    host, port = read.host("QDRANT_HOST"), read.port("QDRANT_PORT")
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    origins = [(name, settings[name].origin) for name in ("QDRANT_HOST", "QDRANT_PORT")]
    told = ", ".join(f"{name} ({origin})" for name, origin in origins if origin != DEFAULT)
    settings["QDRANT_URL"] = Setting(url, told or DEFAULT)
    return url


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
    settings, faults, warnings = read_settings(environ, DEFAULTS, env_file, cwd or Path.cwd(), root)
    if backup_dir:
        settings["AUTOMEM_BACKUP_DIR"] = Setting(backup_dir, "--backup-dir")
    config = _build(Reader(settings, faults), settings)
    faults += _proxies(environ)
    if faults:
        raise ConfigError(faults)
    return replace(config, warnings=(*warnings, *_in_clear_text(config)))


def _in_clear_text(config: Config) -> Iterator[str]:
    """A line for each key that would cross a public network unencrypted."""
    urls = {
        "QDRANT_API_KEY": (config.qdrant_api_key, (config.qdrant_url, *config.qdrant_node_urls)),
        "OPENAI_API_KEY": (config.openai_api_key, (config.openai_base_url,)),
        "AUTOMEM_API_TOKEN": (config.api_token, (config.api_url,)),
    }
    for name, (key, addresses) in urls.items():
        for url in addresses:
            if key and url.startswith("http://") and not is_private(urlsplit(url).hostname or ""):
                yield f"{name} is sent in clear text to {without_login(url)}: use https://, or a tunnel"
    if config.falkordb_password and not config.falkordb_tls and not is_private(config.falkordb_host):
        where = config.falkordb_host
        yield f"FALKORDB_PASSWORD is sent in clear text to {where}: set FALKORDB_TLS=true, or use a tunnel"


def _proxies(environ: Mapping[str, str]) -> Iterator[str]:
    """A fault for each proxy that is no URL; nothing of it is shown, it may be a part of a password."""
    for name, value in environ.items():
        if not value or name.lower() not in {"http_proxy", "https_proxy", "all_proxy"}:
            continue
        try:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            sound = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
        except ValueError:
            sound = False
        if not sound:
            yield (
                f"{name} (environment): is no URL of a proxy such as http://host:3128 (in a password, # is %23, / is"
                " %2F, @ is %40)"
            )


def _build(read: Reader, settings: dict[str, Setting]) -> Config:
    password = read.text("FALKORDB_PASSWORD")
    return Config(
        falkordb_host=read.host("FALKORDB_HOST"),
        falkordb_port=read.port("FALKORDB_PORT"),
        falkordb_username=read.text("FALKORDB_USERNAME") or ("default" if password else ""),
        falkordb_password=password,
        falkordb_tls=read.flag("FALKORDB_TLS"),
        graph=read.name("FALKORDB_GRAPH"),
        scratch_server=read.text("FALKORDB_SCRATCH_SERVER"),
        scratch_module=read.text("FALKORDB_SCRATCH_MODULE"),
        qdrant_url=_qdrant_url(read, settings),
        qdrant_node_urls=read.urls("QDRANT_NODE_URLS", "http://node1:6333,http://node2:6333", _QDRANT_PORT),
        qdrant_api_key=read.header("QDRANT_API_KEY"),
        collection=read.name("QDRANT_COLLECTION"),
        qdrant_timeout=read.number("QDRANT_TIMEOUT_SECONDS", 1, 86400, float),
        vector_size=int(read.number("VECTOR_SIZE", 1, 65536, int)),
        embedding_model=read.model("EMBEDDING_MODEL"),
        openai_api_key=read.header("OPENAI_API_KEY"),
        openai_base_url=read.url("OPENAI_BASE_URL", OPENAI_URL, query=True),
        api_url=read.url("AUTOMEM_API_URL", "http://localhost:8001"),
        api_token=read.header("AUTOMEM_API_TOKEN"),
        backup_dir=read.folder("AUTOMEM_BACKUP_DIR"),
        copies=CopyKeys(
            read.no_key("AUTOMEM_BACKUP_RECIPIENTS"),
            read.no_key("AUTOMEM_BACKUP_PASSPHRASE_FILE"),
            read.no_key("AUTOMEM_BACKUP_IDENTITY"),
        ),
        settings=settings,
    )


def config_of(env_file: str | None, backup_dir: str | None) -> Config:
    """The configuration of this process."""
    return load_config(os.environ, env_file=env_file, backup_dir=backup_dir)


def require_embedding(config: Config) -> None:
    """Raise UsageProblem if no key is set, or if the model cannot make VECTOR_SIZE; nothing is asked."""
    require_openai_key(config)
    check_model(config.embedding_model, config.vector_size)


def require_openai_key(config: Config) -> None:
    """Raise UsageProblem where no key is set: told before anything is touched."""
    if not config.openai_api_key:
        raise UsageProblem(
            "OPENAI_API_KEY is not set: embeddings cannot be made",
            next_step="export OPENAI_API_KEY=...   (a local server that needs none takes any word)",
        )
