"""`--show-config`, unfinished runs, and the settings that AutoMem must be restarted with."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from lib.config import SECRETS, masked, same_value
from lib.console import Console, hold, table
from lib.dimensions import UNKNOWN_MODEL
from lib.env_files import DEFAULT
from lib.errors import DONE, MigrationError, listed

if TYPE_CHECKING:
    from lib.config import Config
    from lib.env_files import Setting
    from lib.journal import Journal

# An `export` reaches no container, and `restart` keeps the old environment.
RESTART = """\
  restart AutoMem so that it sees VECTOR_SIZE and EMBEDDING_MODEL:
    Docker:   set both in AutoMem's .env, then  docker compose up -d --force-recreate flask-api
    systemd:  sudo systemctl restart automem
    Railway:  set both as variables, then  railway up"""

_WHICH_MODEL = (
    "  # and EMBEDDING_MODEL to the model of these vectors, which the backup does not record: with another one"
    " recall finds nothing"
)
_SCRIPTS = {
    "backup": "backup_automem.py",
    "reembed": "reembed_embeddings.py",
    "restore": "restore_from_backup.py",
    "spot_check": "reembed_embeddings.py",
}


def show_config(config: Config, console: Console) -> int:
    """Print every setting with its origin, secrets masked, and the live state of each store that answers."""
    live = _live(config)
    rows = [(*row, _hides(row[0], config.settings[row[0]])) for row in config.rows()]
    for text in config.warnings:
        console.warn(text)
    document = {
        "settings": {
            name: {"value": value, "from": origin, **({"hides": other} if other else {})}
            for name, value, origin, other in rows
        },
        "live": live,
    }
    settings = table(rows, ("setting", "value", "from", "hides"))
    console.result(document, f"{settings}\n\n{table(list(live.items()), ('live', 'state'))}")
    return DONE


def _live(config: Config) -> dict[str, str]:
    found = {}
    for name, read in (("graph", _live_graph), ("collection", _live_collection)):
        try:
            found[name] = read(config)
        except MigrationError as error:
            found[name] = f"unknown: {error}".splitlines()[0]
    return found


def _live_graph(config: Config) -> str:
    from lib import connect
    from lib.clients.falkordb.connection import require_graph
    from lib.clients.falkordb.queries import counts

    source = connect.open_graph(config)
    require_graph(source.conn, source.graph, source.address)
    seen = counts(source.conn, source.graph)
    return f"'{source.graph}': {seen.nodes:,} nodes, {seen.relationships:,} relationships"


def _live_collection(config: Config) -> str:
    from lib import connect
    from lib.backup.collection import known_model
    from lib.backup.last_migration import journalled_model
    from lib.clients.qdrant.collection import get_state

    source = connect.open_collection(config)
    state = get_state(source.qdrant, source.collection)
    journalled = journalled_model(config.backup_dir, config.targets()[-1], state.size)
    model, known = known_model(state, source.spec, journalled)
    return f"'{state.name}': {state.points:,} points, {state.size}d {state.distance}, {model} ({known})"


def announce(config: Config, console: Console) -> None:
    """Print unfinished runs before a command begins, and the settings with -v; hold the warnings for later."""
    from lib.journal import unfinished

    for name, value, origin in config.rows():
        if origin != DEFAULT:
            console.detail(f"{name}={value}   ({origin})")
    for name, setting in config.settings.items():
        if hidden := _hides(name, setting):
            shown = name if name in SECRETS else f"{name}={masked(name, setting.value)}"
            hold(f"{shown} ({setting.origin}) hides {hidden}")
    for text in config.warnings:
        hold(text)
    journals, unreadable = unfinished(config.backup_dir)
    for path in unreadable:
        console.warn(f"{path} is damaged: its run may be unfinished, and what it created or deleted is unknown")
    for journal in journals:
        console.say(_unfinished(journal, config.targets()))


def _hides(name: str, setting: Setting) -> str:
    """Return the next different value that a setting hides, with its origin; "" if there is none."""
    other = next((one for one in setting.hidden if not same_value(one.value, setting.value)), None)
    if other is None:
        return ""
    return f"{'another value' if name in SECRETS else masked(name, other.value)} in {other.origin}"


def _unfinished(journal: Journal, targets: list[str]) -> str:
    """Return how to resume, give up and undo an unfinished run."""
    from lib.backup.server_snapshots import AWAITED

    if journal.phase == AWAITED and journal.targets == targets:
        return _awaited(journal)
    script = _SCRIPTS.get(journal.command, f"{journal.command}.py")
    again = str(journal.fact("again") or f"python scripts/{script}   with the same settings and arguments")
    text = f"a run of {script} is unfinished, or still running ({journal.run_id}, at: {journal.phase})"
    if journal.targets != targets:
        return f"{text}; it works on other stores: {listed(journal.targets)}"
    text += f"\n  resume:  {again}"
    if journal.command in {"reembed", "restore"}:
        text += f"\n  give it up:  python scripts/{script} --abort"
    return f"{text}\n  undo:\n{journal.undo}" if journal.undo else text


def _awaited(journal: Journal) -> str:
    """Name the snapshot that the server may still make for a killed run of which nothing else is left."""
    collection = journal.fact("collection")
    asked = f"a killed run ({journal.run_id}) had asked Qdrant for a snapshot of '{collection}'"
    return f"{asked}: if it still appears there, the next backup prints the command that deletes it"


def settings_lines(size: int, model: str, config: Config) -> list[str]:
    """Return the lines that put the settings back if the collection's size or model differs from them; else [].

    A `.env` with another value is named even if the environment takes precedence: AutoMem may read it. A model that
    the backup does not record cannot be put back.
    """
    wanted = {"VECTOR_SIZE": str(size), "EMBEDDING_MODEL": model}
    if model == UNKNOWN_MODEL:
        del wanted["EMBEDDING_MODEL"]
    files = _files_that_disagree(wanted, config)
    lines = []
    if (size, model) != (config.vector_size, config.embedding_model):
        configured = f"{config.vector_size}d ({config.embedding_model})"
        lines = [
            "",
            f"warning: the collection is {size}d ({model}), the configuration says {configured}. Put back:",
            *(f"  export {name}={quote(value)}" for name, value in wanted.items()),
        ]
        if model == UNKNOWN_MODEL:
            lines.append(_WHICH_MODEL)
    elif files:
        lines = [
            "",
            f"warning: the collection is {size}d ({model}), as the environment says, but a file says otherwise:",
        ]
    for file in files:
        lines += [f"and in {file}:", *(f"  {name}={quote(value)}" for name, value in wanted.items())]
    return lines


def _files_that_disagree(wanted: dict[str, str], config: Config) -> list[str]:
    found = set()
    for name, value in wanted.items():
        setting = config.settings[name]
        in_file = next((one for one in (setting, *setting.hidden) if ":" in one.origin), None)
        if in_file and in_file.value != value:
            found.add(in_file.origin.rsplit(":", 1)[0])
    return sorted(found)
