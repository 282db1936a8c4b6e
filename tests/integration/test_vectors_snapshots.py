from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest

from lib.clients.qdrant import collection, points, snapshots
from lib.clients.qdrant.snapshot_format import inspect_snapshot
from lib.clients.qdrant.transport import NoAnswer, Qdrant, QdrantError
from lib.errors import BackupDamaged, MigrationError, MissingData, StoreFailed, StoreUnreachable
from lib.verify.compare import vectors_differ
from tests.faulty_proxy import Fault, FaultyProxy, answer
from tests.real_qdrant import RealQdrant
from tests.vectors_support import (
    BreakingProxy,
    create_small,
    fill,
    ids_of,
    payload_of,
    vectors_of,
)

pytest_plugins = ["tests.vectors_fixtures"]
pytestmark = pytest.mark.qdrant


def fetch(q: Qdrant, name: str, snapshot: snapshots.Snapshot) -> tuple[bytes, str]:
    data = io.BytesIO()
    return_value = snapshots.download(q, name, snapshot, data.write)
    return data.getvalue(), return_value


def assert_whole(q: Qdrant, name: str) -> None:
    found = [point for page in points.scroll(q, name, payload=True, vector=True) for point in page]
    assert [point.id for point in found] == ids_of(50)
    assert [point.payload for point in found] == [payload_of(index) for index in range(50)]
    assert not vectors_differ(np.stack([point.vector for point in found]), vectors_of(50, 8)).any()
    assert set(collection.get_state(q, name).raw["payload_schema"]) == {"tags", "importance"}


def test_a_snapshot_is_made_listed_fetched_and_deleted(q: Qdrant, filled: str):
    assert snapshots.list_snapshots(q, filled) == []
    made = snapshots.create(q, filled)
    assert snapshots.list_snapshots(q, filled) == [made]
    seen: list[int] = []
    data = io.BytesIO()
    fetched = snapshots.download(q, filled, made, data.write, seen.append)
    assert fetched == made.checksum
    assert made.size == len(data.getvalue())
    assert hashlib.sha256(data.getvalue()).hexdigest() == made.checksum
    assert sum(seen) == made.size
    facts = inspect_snapshot(io.BytesIO(data.getvalue()))
    assert (facts.size, facts.distance, facts.absent_shards) == (8, "Cosine", [])
    snapshots.delete(q, filled, made.name)
    assert snapshots.list_snapshots(q, filled) == []
    snapshots.delete(q, filled, made.name)  # it is absent, which is no error


def test_config_in_the_snapshot_is_the_live_one(q: Qdrant, filled: str):
    data, _ = fetch(q, filled, snapshots.create(q, filled))
    live = collection.get_state(q, filled).raw["config"]
    config = inspect_snapshot(io.BytesIO(data)).config
    assert {key: config[key] for key in live} == live


def test_a_download_resumes_after_a_broken_connection(q: Qdrant, filled: str):
    made = snapshots.create(q, filled)
    whole, _ = fetch(q, filled, made)
    with BreakingProxy(q) as proxy:
        proxy.cut_after = [len(whole) // 3, 700, len(whole) // 4]
        pauses: list[float] = []
        data, fetched = fetch(Qdrant(proxy.url, sleep=pauses.append), filled, made)
    assert data == whole
    assert len(pauses) == 3
    assert fetched == made.checksum


def test_a_proxy_that_lets_nothing_through_ends_in_an_error(q: Qdrant, filled: str):
    made = snapshots.create(q, filled)
    with BreakingProxy(q) as proxy:
        proxy.cut_after = [5000, *[0] * 20]
        with pytest.raises(StoreUnreachable):
            fetch(Qdrant(proxy.url, sleep=lambda _: None), filled, made)
        assert proxy.connections < 10


def test_bytes_that_are_not_the_servers_are_noticed(q: Qdrant, filled: str):
    made = snapshots.create(q, filled)
    other = snapshots.Snapshot(made.name, made.size, "0" * 64, made.created)
    with pytest.raises(BackupDamaged, match=made.checksum):
        fetch(q, filled, other)


def test_a_lost_answer_does_not_make_a_second_snapshot(q: Qdrant, filled: str):
    with BreakingProxy(q) as proxy:
        proxy.swallow = b"POST /collections/"
        made = snapshots.create(Qdrant(proxy.url), filled, seconds=30)
        assert proxy.swallow == b""
    assert snapshots.list_snapshots(q, filled) == [made]
    assert fetch(q, filled, made)[1] == made.checksum


def test_a_snapshot_of_nothing_is_missing_data(q: Qdrant, names: list[str]):
    with pytest.raises(MissingData):
        snapshots.create(q, names[1])
    with pytest.raises(MissingData):
        fetch(q, names[1], snapshots.Snapshot("none.snapshot", 1, None, ""))


def test_a_snapshot_sent_from_a_file_brings_the_collection_back(
    q: Qdrant, filled: str, names: list[str], tmp_path: Path
):
    made = snapshots.create(q, filled)
    data, _ = fetch(q, filled, made)
    path = tmp_path / "copy"
    path.write_bytes(data)
    filename = snapshots.unique_filename("back")
    seen: list[int] = []
    answered = snapshots.upload_and_restore(
        q,
        names[1],
        path,
        size=len(data),
        filename=filename,
        checksum=made.checksum,
        progress=seen.append,
    )
    assert answered
    assert sum(seen) == len(data)
    assert_whole(q, names[1])
    assert [snapshot.name for snapshot in snapshots.list_snapshots(q, names[1])] == [filename]
    assert_whole(q, filled)


def test_a_restore_whose_answer_is_lost_is_waited_for_not_repeated(q: Qdrant, filled: str, names: list[str]):
    made = snapshots.create(q, filled)
    data, _ = fetch(q, filled, made)
    with BreakingProxy(q) as proxy:
        far = Qdrant(proxy.url)
        snapshots.preflight_upload(far, names[1])
        far.close()
        proxy.swallow = made.checksum.encode()
        answered = snapshots.upload_and_restore(
            far,
            names[1],
            io.BytesIO(data),
            size=len(data),
            filename=snapshots.unique_filename("back"),
            checksum=made.checksum,
            seconds=30,
        )
    assert not answered
    assert_whole(q, names[1])
    assert len(snapshots.list_snapshots(q, names[1])) == 1


def test_a_source_that_ends_early_restores_nothing(q: Qdrant, filled: str, names: list[str]):
    made = snapshots.create(q, filled)
    data, _ = fetch(q, filled, made)
    with pytest.raises(BackupDamaged, match="ends 1 bytes early"):
        snapshots.upload_and_restore(
            q,
            names[1],
            io.BytesIO(data[:-1]),
            size=len(data),
            filename=snapshots.unique_filename("short"),
            checksum=made.checksum,
        )
    assert not collection.exists(q, names[1])


def test_a_wrong_checksum_restores_nothing(q: Qdrant, filled: str, names: list[str]):
    data, _ = fetch(q, filled, snapshots.create(q, filled))
    with pytest.raises(BackupDamaged, match="is not the one of the backup") as caught:
        snapshots.upload_and_restore(
            q,
            names[1],
            io.BytesIO(data),
            size=len(data),
            filename=snapshots.unique_filename("wrong"),
            checksum="1" * 64,
        )
    assert "checksum mismatch" in str(caught.value.__cause__).lower()
    assert not collection.exists(q, names[1])


def test_the_server_restores_from_itself_once_that_is_verified(q: Qdrant, filled: str, names: list[str]):
    made = snapshots.create(q, filled)
    location = snapshots.can_fetch_itself(q, filled, made, probe=names[2])
    assert location is not None
    assert not collection.exists(q, names[2])
    assert snapshots.recover(q, names[1], location, made.checksum)
    assert_whole(q, names[1])
    assert snapshots.list_snapshots(q, names[1]) == []


@pytest.mark.parametrize("source", ["its own file", "its own address"])
def test_a_server_reads_its_own_file_before_it_fetches_from_its_address(own_qdrant, monkeypatch, source):
    q, name = Qdrant(own_qdrant.url), "own"
    folder = f"file://{own_qdrant.folder}/snapshots" if isinstance(own_qdrant, RealQdrant) else snapshots._OWN_FOLDER
    monkeypatch.setattr(snapshots, "_OWN_FOLDER", folder if source == "its own file" else "file:///nowhere")
    create_small(q, name, 8)
    fill(q, name, 50, 8)
    made = snapshots.create(q, name)
    location = snapshots.can_fetch_itself(q, name, made, probe="probe")
    assert location is not None
    assert location.startswith(folder if source == "its own file" else q.base_url)
    assert snapshots.recover(q, "copy", location, made.checksum)
    assert_whole(q, "copy")
    assert snapshots.list_snapshots(q, name) == [made]
    assert collection.list_collections(q) == ["copy", name]


def test_no_url_if_the_server_cannot_fetch_itself(q: Qdrant, filled: str, names: list[str]):
    made = snapshots.create(q, filled)
    missing = snapshots.Snapshot("none.snapshot", made.size, made.checksum, made.created)
    assert snapshots.can_fetch_itself(q, filled, missing, probe=names[2]) is None
    other = snapshots.Snapshot(made.name, made.size, "2" * 64, made.created)
    assert snapshots.can_fetch_itself(q, filled, other, probe=names[2]) is None
    assert not collection.exists(q, names[2])


def test_a_recover_whose_answer_is_lost_is_waited_for(q: Qdrant, filled: str, names: list[str]):
    made = snapshots.create(q, filled)
    location = snapshots.can_fetch_itself(q, filled, made, probe=names[2])
    with BreakingProxy(q) as proxy:
        proxy.swallow = b"/snapshots/recover"
        answered = snapshots.recover(Qdrant(proxy.url), names[1], location, made.checksum, seconds=30)
    assert not answered
    assert_whole(q, names[1])


def test_a_fetch_that_fails_creates_nothing(q: Qdrant, names: list[str]):
    with pytest.raises(QdrantError):
        snapshots.recover(q, names[1], "http://127.0.0.1:9/x.snapshot", "0" * 64)
    assert not collection.exists(q, names[1])


def test_a_gateway_that_reports_a_restarting_server_does_not_end_the_wait(q: Qdrant, filled: str):
    down = Fault(b"GET /collections ", times=6, answer=answer(502, "Bad Gateway"))
    with FaultyProxy(int(q.base_url.rpartition(":")[2]), down) as proxy:
        snapshots.wait_restored(Qdrant(f"http://127.0.0.1:{proxy.port}", sleep=lambda _: None), filled, 30)
    assert down.hits == 6


def test_a_restore_that_never_comes_is_given_up(q: Qdrant, names: list[str]):
    with pytest.raises(StoreFailed, match="is missing"):
        snapshots.wait_restored(q, names[1], 0.1)


def test_nothing_is_restored_onto_a_collection_that_exists(q: Qdrant, filled: str):
    """A restore that fails after it has cleared the collection leaves nothing of it."""
    made = snapshots.create(q, filled)
    data, _ = fetch(q, filled, made)
    with pytest.raises(MigrationError, match=r"exists .*clear it first"):
        snapshots.recover(q, filled, "http://127.0.0.1:9/x.snapshot", made.checksum)
    with pytest.raises(MigrationError, match=r"exists .*clear it first"):
        snapshots.upload_and_restore(
            q, filled, io.BytesIO(data), size=len(data), filename="onto.snapshot", checksum=made.checksum
        )
    assert_whole(q, filled)


def test_an_upload_that_breaks_midway_is_not_waited_for(q: Qdrant, filled: str, names: list[str]):
    made = snapshots.create(q, filled)
    data, _ = fetch(q, filled, made)

    class Breaking(io.BytesIO):
        def read(self, size: int = -1, /) -> bytes:
            if self.tell() > len(data) // 2:
                raise ConnectionResetError
            return super().read(min(size, 1000))

    with pytest.raises(NoAnswer):
        snapshots.upload_and_restore(
            q,
            names[1],
            Breaking(data),
            size=len(data),
            filename=snapshots.unique_filename("half"),
            checksum=made.checksum,
        )
    assert not collection.exists(q, names[1])


def test_an_upload_that_a_gateway_ends_midway_is_not_waited_for(q: Qdrant, names: list[str]):
    size, checksum = 48 << 20, "1" * 64  # more than the buffers of a connection hold
    gone = Fault(checksum.encode(), answer=answer(502, "Bad Gateway"), hang_up=True)
    with FaultyProxy(int(q.base_url.rpartition(":")[2]), gone) as proxy:
        far = Qdrant(f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(QdrantError, match="502: Bad Gateway"):
            snapshots.upload_and_restore(
                far,
                names[1],
                io.BytesIO(bytes(size)),
                size=size,
                filename="gone.snapshot",
                checksum=checksum,
                seconds=1,
            )
    assert gone.hits == 1
