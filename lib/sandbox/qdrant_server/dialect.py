"""What tells Qdrant 1.11.3 from 1.18.3 on the wire: every difference the stand-in plays, in one place.

All of it was seen on real servers of these versions.
"""

from __future__ import annotations

from dataclasses import dataclass

UPDATE, SNAPSHOT, INFO, COUNT, SCROLL = "Update Points", "Snapshot", "Get Info", "count", "Scroll"


@dataclass(frozen=True)
class Dialect:
    """One version's words and habits."""

    version: str
    name_parameter: str  # what a validation error calls the collection's name in the path
    first_operation: int  # 1.18 begins the log with an operation of its own
    indexing_threshold: int  # kilobytes of vectors
    keeps_metadata: bool  # collection metadata came with 1.16
    checks_before_accepting: bool  # 1.18 refuses a wrong dimension before it is logged, even with wait=false
    filter_enum: str  # the type that a malformed match condition is said not to be
    oversize_prefix: str
    downloads: str  # what a failed download is said to be of
    plain_upload_refusal: bool  # 1.18 answers a forbidden upload in plain text
    sparse_snapshots: (
        bool  # 1.18 writes the log as GNU sparse entries, config.json late; 1.11 plain, config.json early
    )
    refuses_to_start_damaged: bool  # 1.11 does not start with a shard that it cannot load
    closes_refused_bodies: (
        bool  # 1.18 closes the connection behind a refusal, 1.11 keeps it and stops reading
    )

    @property
    def modern(self) -> bool:
        """Whether the words of 1.18 are used."""
        return not self.refuses_to_start_damaged

    def dead(self, doing: str, peer: int, scratch: str = "") -> str:
        """The error of a collection whose shard was lost in a failed restore (status 500)."""
        if self.modern:
            if doing == SNAPSHOT:
                return "Failed to get_snapshot_creator,  Failed to restore local replica"
            cause = f"Failed to {doing},  Failed to restore local replica"
            return cause if doing == UPDATE else _failed_read(cause)
        if doing == SNAPSHOT:
            lost = "Service internal error: Failed to restore local replica"
            return f"failed to create snapshot {scratch}/0: {lost}"
        if doing == INFO:
            return "0 of 0 read operations failed"
        replica_set = f"The replica set for shard 0 on peer {peer}"
        if doing == UPDATE:
            return f"{replica_set} has no active replica"
        return f"{replica_set} does not have enough active replicas"

    def shard_absent(self) -> str:
        """The error while a restore has taken the old shard away and not yet brought the new one (status 500)."""
        return _failed_read("Local shard 0 not found")

    def not_an_archive(self) -> str:
        """The error for an upload that is no tar (status 500)."""
        if self.modern:
            return "File IO error: Malformed tar archive, reached unknown entry"
        return "Failed to open snapshot archive, malformed format"

    def segment_not_an_archive(self, path: str) -> str:
        """The error for a segment inside the snapshot that is no tar (status 500)."""
        if not self.modern:
            return self.not_an_archive()
        cause = "Service runtime error: IO Error: Malformed tar archive, reached unknown entry"
        return f'Failed to restore snapshot from "{path}": {cause}'

    def file_absent(self, path: str) -> str:
        """The error for a file that the snapshot lacks (status 500)."""
        where = f"failed to open file `{path}`: " if self.modern else ""
        return f"File IO error: {where}No such file or directory (os error 2)"

    def relative_location(self, location: str, column: int) -> str:
        """The error for a `location` that is no URL (status 400)."""
        said = (
            f'relative URL without a base: "{location}"'
            if self.modern
            else f'invalid value: string "{location}", expected relative URL without a base'
        )
        return f"Format error in JSON body: {said} at line 1 column {column}"


def _failed_read(cause: str) -> str:
    return f"1 of 1 read operations failed:\n  Service internal error: {cause}"


DIALECTS = {
    "1.11.3": Dialect(
        version="1.11.3",
        name_parameter="name",
        first_operation=0,
        indexing_threshold=20000,
        keeps_metadata=False,
        checks_before_accepting=False,
        filter_enum="Condition",
        oversize_prefix="Payload error: ",
        downloads="snapshot",
        plain_upload_refusal=False,
        sparse_snapshots=False,
        refuses_to_start_damaged=True,
        closes_refused_bodies=False,
    ),
    "1.18.3": Dialect(
        version="1.18.3",
        name_parameter="collection_name",
        first_operation=1,
        indexing_threshold=10000,
        keeps_metadata=True,
        checks_before_accepting=True,
        filter_enum="MatchInterface",
        oversize_prefix="",
        downloads="tar",
        plain_upload_refusal=True,
        sparse_snapshots=True,
        refuses_to_start_damaged=False,
        closes_refused_bodies=True,
    ),
}
