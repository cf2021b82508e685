"""One item in advance: the same items, the same order, and exceptions in their place."""

import threading

import pytest

from common.read_ahead import read_ahead


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
