"""The bounded map: results in order, never more at once than asked, nothing read ahead, an error waits for the rest. And read_ahead."""

from __future__ import annotations

import threading

import pytest

from lib.concurrency import bounded_map, read_ahead


def test_results_come_in_the_items_order_though_the_first_ends_last():
    first = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert first.wait(60)
        elif item == 2:
            first.set()
        return item * item

    assert list(bounded_map(work, range(7), 3)) == [0, 1, 4, 9, 16, 25, 36]


def test_never_more_at_once_than_threads_and_none_read_ahead():
    lock, all_in = threading.Lock(), threading.Barrier(3)
    now, most, read = 0, 0, []

    def items():
        for item in range(9):
            read.append(item)
            yield item

    def work(item: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        all_in.wait(60)  # three do meet; a fourth would break it in the end
        with lock:
            now -= 1
        return item

    for done in bounded_map(work, items(), 3):
        assert len(read) <= done + 4
    assert most == 3


def test_the_first_error_is_raised_when_those_at_work_have_ended():
    failed, ended = threading.Event(), []

    def work(item: int) -> None:
        if item == 0:
            failed.set()
            raise ValueError("no room")
        assert failed.wait(60)
        ended.append(item)

    with pytest.raises(ValueError, match="no room"):
        list(bounded_map(work, iter(range(100)), 4))
    assert set(ended) <= {1, 2, 3}
    assert threading.active_count() == 1 or not any("bounded_map" in one.name for one in threading.enumerate())


def test_read_ahead_reads_one_item_more_than_is_used():
    read, is_read = [], threading.Semaphore(0)

    def items():
        for item in range(4):
            read.append(item)
            is_read.release()
            yield item

    for used in read_ahead(items()):
        for _ in range(2 if used == 0 else 1 if used < 3 else 0):
            assert is_read.acquire(timeout=60)
        assert read == list(range(min(used + 2, 4)))


def test_read_ahead_raises_an_error_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("no room")

    used = []
    with pytest.raises(ValueError, match="no room"):
        used.extend(read_ahead(items()))
    assert used == [1]


def test_read_ahead_ends_its_thread_when_its_user_stops():
    source = read_ahead(iter(range(100)))
    assert next(source) == 0
    source.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("read_ahead")]
