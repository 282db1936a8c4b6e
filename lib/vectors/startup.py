"""Whether it is still the server that was asked: what one had begun, the next one knows nothing of."""

from __future__ import annotations

from lib.errors import MigrationError
from lib.vectors.transport import Qdrant


def startup(q: Qdrant) -> str | None:
    """When this server process was started, in its own words (1.11.3 and 1.18.3); None where it does not say.

    A key for one collection may not ask for it (https://qdrant.tech/documentation/guides/security/).
    """
    try:
        told = q.json("GET", "/telemetry", params={"details_level": "0"}, retry=False)
    except MigrationError:
        return None
    app = told.get("app") if isinstance(told, dict) else None
    moment = app.get("startup") if isinstance(app, dict) else None
    return str(moment) if moment else None


def restarted(q: Qdrant, before: str | None) -> bool:
    """Whether surely another process answers than the one that said `before`."""
    now = startup(q) if before else None
    return now is not None and now != before
