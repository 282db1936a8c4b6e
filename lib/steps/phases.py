"""What the journal of a re-embedding announces, in the order in which it comes."""

from __future__ import annotations

# Beside the live collection, which serves all the while.
STAGING, READ, STAGED = "staging", "live payloads read", "staged and proved"
SNAPPED = "snapshot of the staged collection made"
# The live collection is exchanged.
RECOVERED = "settings taken from the backup"
KEPT = "payloads kept"
DELETING, DELETED = "deleting the live collection", "live collection deleted"
PLACING, PLACED = "putting the staged collection in place", "staged collection in place"
CREATED = "collection created"
# The end.
PROVED, TIDYING = "proved", "removing the staged collection"
