"""`--show-config`, unfinished runs, and the settings that AutoMem must be restarted with."""

from __future__ import annotations

from shlex import quote
from urllib.parse import urlsplit

from lib import dimensions
from lib.config import SECRETS, Config, masked, same_value
from lib.console import Console, hold, table
from lib.dimensions import OPENAI, UNKNOWN_MODEL, EmbeddingSpec, is_plain, model_settings, provider_problem
from lib.env_files import DEFAULT, Setting
from lib.errors import DONE, MigrationError, listed
from lib.journal import Journal, open_journals, unfinished

_WHICH_MODEL = (
    "  # and EMBEDDING_MODEL to the model of these vectors, which the backup does not record: with another one"
    " recall finds nothing"
)
_SCRIPTS = {"backup": "backup_automem.py", "restore": "restore_from_backup.py"}
_SCRIPTS |= dict.fromkeys(("reembed", "spot_check"), "reembed_embeddings.py")


def restart_lines(provider: str, *, named: bool) -> str:
    """Return how to restart AutoMem. An `export` reaches no container, and `restart` keeps the old environment."""
    *most, last = ["VECTOR_SIZE", *model_settings(provider, "", named=named)]
    them = "them" if len(most) > 1 else "both"
    return (
        f"  restart AutoMem so that it sees {', '.join(most)} and {last}:\n"
        f"    Docker:   set {them} in AutoMem's .env, then  docker compose up -d --force-recreate flask-api\n"
        "    systemd:  sudo systemctl restart automem\n"
        f"    Railway:  set {them} as variables, then  railway up"
    )


def chosen(spec: EmbeddingSpec, reason: str) -> str:
    """Return the model, its size, its endpoint and why AutoMem uses it, as one line."""
    endpoint = dimensions.public_url(spec.base_url)
    where = urlsplit(endpoint).netloc or endpoint
    return f"{spec.model} at {spec.size}d from {where}{', ' if reason else ''}{reason}"


def require_provider(config: Config, console: Console) -> None:
    """Raise `provider_problem`; only warn if an unfinished run has deleted the collection: it must be completed."""
    from lib.backup.phases import COMMAND, DELETING

    problem = provider_problem(config.settings, config.spec)
    if problem is None:
        return
    if not any(one.has_reached(DELETING) for one in open_journals(config.backup_dir, config.targets(), COMMAND)):
        raise problem
    console.warn(f"{problem}\n{problem.next_step}")


def show_config(config: Config, console: Console) -> int:
    """Print every setting with its origin, secrets masked, and the live state of each store that answers."""
    live = _live(config)
    # The value is after its origin: the longest ones, not all origins, wrap in a narrow terminal.
    rows = [(name, origin, value, _hides(name, config.settings[name])) for name, value, origin in config.rows()]
    for text in config.warnings:
        console.warn(text)
    spec, reason = config.spec, dimensions.reason_shown(config.settings, config.spec)
    problem = provider_problem(config.settings, spec)
    embedding = {"provider": spec.provider, "model": spec.model, "size": spec.size}
    embedding |= {"endpoint": dimensions.public_url(spec.base_url), "why": reason, "problem": str(problem or "")}
    settings = {
        name: {"value": value, "from": origin, **({"hides": other} if other else {})}
        for name, origin, value, other in rows
    }
    count = 4 if any(row[-1] for row in rows) else 3
    text = table([row[:count] for row in rows], ("setting", "from", "value", "hides")[:count])
    text += f"\n\nembedding: {chosen(spec, reason)}" + (f"\na re-embed is refused: {problem}" if problem else "")
    text += f"\n\n{table(list(live.items()), ('live', 'state'))}"
    console.result({"settings": settings, "live": live, "embedding": embedding}, text)
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
    require_graph(source.conn, source.graph)
    seen = counts(source.conn, source.graph)
    return f"'{source.graph}': {seen.nodes:,} nodes, {seen.relationships:,} relationships"


def _live_collection(config: Config) -> str:
    from lib import connect
    from lib.backup.collection import known_model
    from lib.backup.phases import journalled_stamp
    from lib.clients.qdrant.collection import get_state

    source = connect.open_collection(config)
    state = get_state(source.qdrant, source.collection)
    journalled = journalled_stamp(config.backup_dir, config.targets()[-1], state.size)
    made_by = known_model(state.size, state.raw["config"], source.spec, journalled)
    model = f"{made_by['model']} ({made_by['model_known']})"
    return f"'{state.name}': {state.points:,} points, {state.size}d {state.distance}, {model}"


def announce(config: Config, console: Console, *, runs: bool = True) -> None:
    """Print unfinished runs (with `runs`) before a command begins, and the settings with -v; hold the warnings.

    When quiet, only a run is printed that may have left a store without its collection: the errors would mislead.
    """
    from lib.backup.phases import DELETING

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
    for journal in journals if runs else ():
        is_lost = journal.targets == config.targets() and journal.has_reached(DELETING)
        show = console.notice if is_lost else console.say
        show(_unfinished(journal, config.targets()))


def _hides(name: str, setting: Setting) -> str:
    """Return the next different value that a setting hides, with its origin; "" if there is none."""
    other = next((one for one in setting.hidden if not same_value(one.value, setting.value)), None)
    if other is None:
        return ""
    return f"{'another value' if name in SECRETS else masked(name, other.value)} in {other.origin}"


def _unfinished(journal: Journal, targets: list[str]) -> str:
    """Return how to resume, give up and undo an unfinished run."""
    from lib.backup.phases import AWAITED, DELETING, STAGED

    if journal.phase == AWAITED and journal.targets == targets:
        asked = f"a killed run ({journal.run_id}) had asked Qdrant for a snapshot of '{journal.fact('collection')}'"
        return f"{asked}: if it still appears there, the next backup prints the command that deletes it"
    script = _SCRIPTS.get(journal.command, f"{journal.command}.py")
    phase = journal.phase.replace("proved", "verified")  # a journal keeps the words of the first version
    again = journal.fact("again") or f"(with the same settings and arguments)  python scripts/{script}"
    text = f"a run of {script} is unfinished, or still running ({journal.run_id}, at: {phase})"
    if journal.targets != targets:
        return f"{text}; it works on other stores: {listed(journal.targets)}"
    if journal.phase == STAGED:
        again = again.replace(" --no-switch", "")  # all that it asks for is done
    text += f"\n  resume:  {again}"
    if journal.command in {"reembed", "restore"} and not journal.has_reached(DELETING):  # else --abort is refused
        text += f"\n  give it up:  python scripts/{script} --abort"
    return f"{text}\n  undo:\n{journal.undo}" if journal.undo else text


def settings_lines(size: int, model: str, config: Config, provider: str = OPENAI) -> list[str]:
    """Return the lines that put the settings back if the collection's size or model differs from them; else [].

    A `.env` with another value is named even if the environment takes precedence: AutoMem may read it. A model that
    the backup does not record cannot be put back, nor the size of a collection without an unnamed vector (0).
    """
    if not size:
        return []
    spec = config.spec
    named = not is_plain(config.settings, spec.provider)
    models = {} if model == UNKNOWN_MODEL else model_settings(provider, model, named=named)
    wanted = {"VECTOR_SIZE": str(size), **models}
    assignments = [f"{name}={quote(value)}" for name, value in wanted.items()]
    files = set()
    for name, value in wanted.items():
        setting = config.settings[name]
        in_file = next((one for one in (setting, *setting.hidden) if ":" in one.origin), None)
        if in_file and in_file.value != value:
            files.add(in_file.origin.rsplit(":", 1)[0])
    lines, warning = [], f"warning: the collection is {size}d ({model}),"
    if (size, model, provider) != (spec.size, spec.model, spec.provider):
        lines = ["", f"{warning} the configuration says {spec.size}d ({spec.model}). Put back:"]
        lines += [f"  export {one}" for one in assignments] + ([_WHICH_MODEL] if model == UNKNOWN_MODEL else [])
    elif files:
        lines = ["", f"{warning} as the environment says, but a file says otherwise:"]
    for file in sorted(files):
        lines += [f"and in {file}:", *(f"  {one}" for one in assignments)]
    return lines
