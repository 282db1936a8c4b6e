"""Texts of sample memories: people, projects and technology, combined into distinct, believable sentences."""

from __future__ import annotations

import random
from dataclasses import dataclass

_PEOPLE = (
    "Alice Bob Carmen Dmitri Elena Farid Grace Hiroshi Ines Jonas Kofi Lena Marco Nadia Olivia Pavel Quinn "
    "Rosa Samir Tove Ulrich Vera Wanjiru Ximena Yusuf Zofia Anders Beatriz Chidi Daphne Emre Fiona"
)
_PROJECTS = (
    "Atlas Beacon Cobalt Delta Ember Falcon Granite Harbor Iris Juniper Kestrel Lantern Meridian Nimbus "
    "Orchid Pioneer Quartz Ripple Saffron Tundra"
)
PEOPLE, PROJECTS = _PEOPLE.split(), _PROJECTS.split()
# Three lines a topic: its name, technologies, and what is built or fails there.
_TOPICS = """
databases
    PostgreSQL, SQLite, MySQL, Redis, FalkorDB, ClickHouse
    schema migration, read replica, connection pool, slow query log, partial index, vacuum job
deployment
    Docker, Kubernetes, Railway, Terraform, Helm, Ansible
    rolling release, cache volume, health probe, container image, rollback script, canary stage
frontend
    React, Svelte, TypeScript, Tailwind, Vite, WebAssembly
    login form, dark theme, date picker, bundle size, keyboard shortcut, onboarding tour
security
    OAuth, Vault, TLS, WebAuthn, Keycloak, Argon2
    token rotation, audit trail, password reset, session cookie, access review, certificate renewal
search
    Qdrant, Elasticsearch, embeddings, BM25, Lucene, Tantivy
    relevance ranking, synonym list, vector index, query parser, snippet preview, facet counter
billing
    Stripe, SEPA, invoices, Xero, tax rules, PayPal
    refund flow, monthly statement, price table, trial period, dunning mail, currency rounding
observability
    Grafana, Prometheus, OpenTelemetry, Sentry, Loki, Jaeger
    error budget, latency alert, trace sampling, log retention, dashboard panel, on-call rota
mobile
    Swift, Kotlin, Flutter, push notifications, SQLDelight, Fastlane
    offline mode, crash report, store listing, camera permission, battery drain, deep link
data
    Airflow, Parquet, dbt, Kafka, Spark, DuckDB
    nightly export, late events, column naming, backfill run, quality check, retention window
office
    the calendar, the wiki, the stand-up, the retrospective, the roadmap, the handbook
    meeting room, travel budget, hiring plan, coffee machine, workshop agenda, holiday cover
"""
_LINES = [line.strip().split(", ") for line in _TOPICS.strip().splitlines()]
TOPICS = {
    name: (technologies, things)
    for (name,), technologies, things in zip(_LINES[0::3], _LINES[1::3], _LINES[2::3], strict=True)
}
OPENINGS: dict[str, tuple[str, ...]] = {
    "Decision": (
        "{project} goes with {tool} for the {thing}; {person} wrote the proposal",
        "Decided in the {topic} review: the {thing} of {project} moves to {tool}",
        "{person} and {other} agreed to drop {tool} from {project} and keep the {thing} simple",
    ),
    "Pattern": (
        "Whenever the {thing} changes, {tool} has to be warmed up first, seen again in {project}",
        "The {thing} in {project} fails in the same way each time {tool} is upgraded",
        "{tool} and the {thing} drift apart after a long weekend; {person} noticed it in {project}",
    ),
    "Preference": (
        "{person} prefers {tool} over anything else for the {thing}",
        "{person} wants the {thing} of {project} explained with pictures before {tool} is touched",
        "{person} likes short notes about the {thing} and dislikes meetings about {tool}",
    ),
    "Insight": (
        "The real cost of {tool} in {project} is the {thing}, not the licence",
        "{person} found that the {thing} explains most complaints about {project}",
        "Customers judge {project} by the {thing}; {tool} hardly matters to them",
    ),
    "Habit": (
        "{person} checks the {thing} with {tool} before lunch",
        "The {topic} group looks at the {thing} of {project} together with {other} on release days",
    ),
    "Context": (
        "{project} runs {tool} for the {thing}, looked after by {person}",
        "{person} joined {project} to take over the {thing} from {other}",
        "The {thing} of {project} depends on {tool} and on two people: {person} and {other}",
    ),
    "Style": (
        "Texts about the {thing} in {project} use plain words and name {tool} once",
        "{person} writes {tool} examples for {project} without abbreviations, above all for the {thing}",
    ),
}
REASONS = (
    "because {measure} fell to {number} {unit} in the trial",
    "as the contract promises {measure} under {number} {unit}",
    "now that {measure} stays below {number} {unit}",
    "since the old way took {number} {time} and annoyed {other}",
    "after an incident that lasted {number} {time}",
    "so that support can answer within {number} {time}",
)
MEASURES = {
    "median latency": "milliseconds",
    "error rate": "percent",
    "memory use": "megabytes",
    "response size": "kilobytes",
    "queue depth": "messages",
    "disk growth": "gigabytes",
}
TIMES = ("seconds", "minutes", "hours", "working days")
FOLLOW_UPS = (
    "Ticket {reference} holds the numbers.",
    "Follow-up in {reference}, owner {other}.",
    "See {reference} before changing it.",
    "Documented under {reference} by {person}.",
    "{reference} stays open until {other} has measured it twice.",
    "Reviewed with {other} in {reference}.",
)
CHINESE = (
    "{project} 项目的数据库迁移在周五完成，负责人是 {person}，编号 {reference}。",  # noqa: RUF001 - Chinese punctuation
    "{person} 决定在 {project} 中使用 {tool}，参见 {reference}。",  # noqa: RUF001 - Chinese punctuation
    "{project} 的备份每天凌晨三点运行，出错时通知 {person}（{reference}）。",  # noqa: RUF001 - Chinese punctuation
)


@dataclass(frozen=True)
class Draft:
    """A text and the words in it."""

    content: str
    type: str
    topic: str
    project: str
    person: str
    tool: str
    reference: str


def write_draft(rng: random.Random, number: int) -> Draft:
    """Write one memory's text. Its ticket reference contains `number`, so that no two drafts of a run are equal."""
    topic = rng.choice(tuple(TOPICS))
    tools, things = TOPICS[topic]
    kind = rng.choice(tuple(OPENINGS))
    person, other = rng.sample(PEOPLE, 2)
    project = rng.choice(PROJECTS)
    measure = rng.choice(tuple(MEASURES))
    words = {
        "topic": topic,
        "project": project,
        "person": person,
        "other": other,
        "tool": rng.choice(tools),
        "thing": rng.choice(things),
        "measure": measure,
        "unit": MEASURES[measure],
        "time": rng.choice(TIMES),
        "number": str(rng.randint(2, 990)),
        "reference": f"{project[:3].upper()}-{1000 + number}",
    }
    text = f"{rng.choice(OPENINGS[kind])}, {rng.choice(REASONS)}. {rng.choice(FOLLOW_UPS)}".format_map(words)
    return Draft(text[0].upper() + text[1:], kind, topic, project, person, words["tool"], words["reference"])


def chinese_text(rng: random.Random, draft: Draft) -> str:
    """Write a Chinese sentence with the draft's person and project."""
    return rng.choice(CHINESE).format(
        project=draft.project, person=draft.person, tool=draft.tool, reference=draft.reference
    )


def long_text(rng: random.Random, number: int, words: int) -> str:
    """Write a report of about `words` English words (seven cl100k tokens for five words, roughly)."""
    parts: list[str] = []
    length = 0
    while length < words:
        sentence = write_draft(rng, number).content
        parts.append(sentence)
        length += len(sentence.split())
    return " ".join(parts)
