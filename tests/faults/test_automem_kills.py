"""A restore of AutoMem's own backup, killed: the same command again ends in the backup's state."""

from __future__ import annotations

import pytest

from tests.integration.test_automem_backup import content, write_pair
from tests.kill_support import run_killed
from tests.restore_support import assert_tidy, delete_printed_snapshots, spoil

pytestmark = pytest.mark.qdrant


@pytest.mark.core
@pytest.mark.parametrize("where", ["called live collection deleted"])  # every window: test_automem_backup_kills
def test_killed_there_it_resumes(operator, where):
    operator.load(60)
    folder = operator.folder / "automem"
    write_pair(operator, folder)
    before = content(operator)
    spoil(operator)
    run_killed(operator, where, "restore_from_backup", str(folder))
    said = operator.run("restore_from_backup", str(folder))
    delete_printed_snapshots(said.err)
    assert content(operator) == before
    assert_tidy(operator)
