"""What a proof read is kept for the restore; what the disk does not take is read again."""

from __future__ import annotations

import errno
import io

import pytest

from lib.restore.inputs import SavedSnapshots

TEXTS = [b"the first snapshot", b"the second"]


def passed(kept: SavedSnapshots) -> list[bytes]:
    """What a proof reads of each snapshot, five bytes at a time."""
    found = []
    for text in TEXTS:
        stream, pieces = kept.copying(io.BytesIO(text)), []
        while piece := stream.read(5):
            pieces.append(piece)
        found.append(b"".join(pieces))
    return found


def test_what_passes_is_kept_and_given_as_often_as_asked():
    kept = SavedSnapshots(room=True)
    assert passed(kept) == TEXTS
    for _ in range(2):
        assert [kept.stream(number).read() for number in range(2)] == TEXTS


def test_without_room_nothing_is_kept():
    kept = SavedSnapshots(room=False)
    assert passed(kept) == TEXTS
    assert kept.stream(0) is None


@pytest.mark.parametrize("after", [0, 4])
def test_a_disk_that_fills_up_takes_nothing_from_the_proof(monkeypatch, after):
    class Full(io.BytesIO):
        def write(self, piece):
            nonlocal after
            after -= 1
            if after < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(piece)

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    kept = SavedSnapshots(room=True)
    assert passed(kept) == TEXTS
    assert kept.stream(0) is None
    assert kept.stream(1) is None
