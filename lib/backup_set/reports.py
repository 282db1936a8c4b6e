"""The reports of finished re-embeddings: `reports/reembed_<run>.json`, and the same as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.files import private_dir, write_atomic

REPORT_DIR = "reports"


def write_document(folder: Path, run_id: str, document: Mapping[str, Any]) -> Path:
    """Write what a run did as JSON, 0600; one that was written for this run before is replaced."""
    path = private_dir(folder / REPORT_DIR) / f"reembed_{run_id}.json"
    # Escaped to ASCII: a text may hold half a character, which no UTF-8 can.
    write_atomic(path, json.dumps(document, indent=2).encode() + b"\n")
    return path


def write_page(document: Path, page: str) -> Path:
    """Write the page beside its document, 0600."""
    path = document.with_suffix(".html")
    write_atomic(path, page.encode("utf-8", "replace"))
    return path
