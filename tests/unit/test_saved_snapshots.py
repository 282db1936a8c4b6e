"""Snapshots read by the verification are saved for the restore; if the disk is too small, they are read again."""

from __future__ import annotations

import errno
import io

import pytest

from lib.restore.inputs import SavedSnapshots

TEXTS = [b"the first snapshot", b"the second"]


def read_all(saved: SavedSnapshots) -> list[bytes]:
    """What a verification reads of each snapshot, five bytes at a time."""
    found = []
    for text in TEXTS:
        stream, pieces = saved.copying(io.BytesIO(text)), []
        while piece := stream.read(5):
            pieces.append(piece)
        found.append(b"".join(pieces))
    return found


def test_what_is_read_is_saved_and_can_be_read_repeatedly():
    saved = SavedSnapshots(room=True)
    assert read_all(saved) == TEXTS
    for _ in range(2):
        assert [saved.stream(number).read() for number in range(2)] == TEXTS
    saved.close()
    assert saved.stream(0) is None


def test_without_room_nothing_is_saved():
    saved = SavedSnapshots(room=False)
    assert read_all(saved) == TEXTS
    assert saved.stream(0) is None


@pytest.mark.parametrize("after", [0, 4])
def test_a_disk_that_fills_up_does_not_disturb_the_verification(monkeypatch, after):
    class Full(io.BytesIO):
        def write(self, piece):
            nonlocal after
            after -= 1
            if after < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(piece)

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    saved = SavedSnapshots(room=True)
    assert read_all(saved) == TEXTS
    assert saved.stream(0) is None
    assert saved.stream(1) is None
