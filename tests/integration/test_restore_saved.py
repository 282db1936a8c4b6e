"""The verified snapshot is the one that is sent: the archive is read again only if there was no room to save it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from lib.errors import BackupDamaged
from lib.restore.preflight import verify_files
from lib.restore.run import restore
from tests.matrix import matrix
from tests.restore_support import assert_tidy, site, spoil, wanted

pytestmark = pytest.mark.qdrant


@pytest.mark.parametrize("room", matrix([True, False], True))
@pytest.mark.parametrize("meanwhile", matrix(["stays", "is damaged"], "is damaged"))
def test_the_snapshot_that_was_verified_is_restored(operator, monkeypatch, room, meanwhile):
    operator.load(80)
    operator.run("backup_automem", "--only", "qdrant")
    before, archive = operator.state(), Path(operator.archive())
    if not room:
        monkeypatch.setattr("lib.restore.inputs.has_room", lambda _size: False)
    spoil(operator)
    spoilt = operator.state()
    with ExitStack() as stack:
        place = site(operator)
        verified = verify_files(place, wanted(operator, archive), stack)
        if meanwhile == "is damaged":
            archive.write_bytes(archive.read_bytes()[:-5000] + bytes(5000))
        if room or meanwhile == "stays":
            restore(place, verified, lambda _: "the undo")
            assert operator.state().collection == before.collection
        else:
            with pytest.raises(BackupDamaged):
                restore(place, verified, lambda _: "the undo")
            assert operator.state() == spoilt
    assert_tidy(operator)
