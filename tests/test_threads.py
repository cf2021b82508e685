"""Items made ahead in threads: the same items, the same order, exceptions in their place, and no thread left over."""

import threading

import pytest

from common.threads import map_ahead, read_ahead, share_tiles


def test_items_come_in_order_and_nothing_is_made_before_the_first_is_asked_for():
    made = []
    items = read_ahead(made.append(n) or n for n in range(5))
    assert made == []
    assert list(items) == made == [0, 1, 2, 3, 4]
    assert list(read_ahead(iter(()))) == []


def test_the_next_item_is_made_while_the_last_one_is_worked_on():
    second_is_made = threading.Event()

    def items():
        yield 1
        second_is_made.set()
        yield 2

    ahead = read_ahead(items())
    assert next(ahead) == 1
    assert second_is_made.wait(timeout=10)  # without the thread it would wait for the next `next`
    assert next(ahead) == 2


def test_an_exception_comes_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("cut short")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="cut short"):
        next(ahead)


def test_what_is_left_alone_ends_its_thread():
    ahead = read_ahead(iter(range(1000)))
    next(ahead)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_results_come_in_the_order_of_the_items_however_long_each_takes(monkeypatch):
    monkeypatch.setattr("common.threads.available_threads", lambda: 3)
    second_is_done = threading.Event()

    def square(n):
        if n == 1:
            assert second_is_done.wait(timeout=10)  # so the first is done last
        if n == 2:
            second_is_done.set()
        return n * n

    assert list(map_ahead(square, [1, 2, 3, 4, 5, 6])) == [1, 4, 9, 16, 25, 36]
    assert list(map_ahead(square, [])) == []


def test_a_failing_item_raises_after_the_results_before_it():
    ahead = map_ahead(lambda n: 1 // n, [1, 0, 1])
    assert next(ahead) == 1
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_tiles_inside_stay_in_the_thread_of_their_item_and_outside_are_shared(monkeypatch):
    monkeypatch.setattr("common.threads.available_threads", lambda: 2)

    def threads_of_tiles(_=None):
        names, both_are_here = set(), threading.Barrier(2)

        def work(starts):
            names.add(threading.current_thread().name)
            if len(starts) < 4:  # the tiles are dealt out: each thread waits for the other
                both_are_here.wait(timeout=10)

        share_tiles(work, n_rows=8, tile_rows=2)
        return names

    assert [len(names) for names in map_ahead(threads_of_tiles, range(3))] == [1, 1, 1]
    assert len(threads_of_tiles()) == 2


def test_results_left_alone_end_their_threads():
    before = threading.active_count()
    ahead = map_ahead(abs, iter(range(1000)))
    next(ahead)
    ahead.close()
    assert threading.active_count() == before
