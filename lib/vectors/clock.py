"""What time it is at the server, by which it names its snapshots."""

from __future__ import annotations

from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from lib.vectors.transport import Qdrant


def server_time(q: Qdrant) -> datetime:
    """The server's clock (UTC, whole seconds): the `Date` of an answer, sent by 1.11.3 and 1.18.3.

    This machine's clock where a proxy took that header away.
    """
    told = q.call("GET", "/").headers.get("Date", "")
    try:
        return parsedate_to_datetime(told).astimezone(timezone.utc)
    except ValueError:
        return datetime.now(timezone.utc)
