"""Conversations side by side: order, urgency, and what ends them."""

from __future__ import annotations

import threading
import time

import pytest

from common.config import UserError
from llm_parts.crew import FIRST, Crew


def ask_twice(number):
    first, second = yield [number, number + 1]
    (third,) = yield [first + second]
    return third


def test_answers_come_in_the_order_of_the_questions_and_conversations_go_on_by_themselves():
    def slowly(number):
        time.sleep(0.002 * (7 - number % 7))
        return 10 * number

    with Crew(slowly, n_threads=5) as crew:
        talks = [crew.start(ask_twice(number)) for number in range(20)]
        assert crew.results(talks) == [10 * (10 * n + 10 * (n + 1)) for n in range(20)]


def test_a_conversation_without_questions_is_done_at_once():
    def silent():
        assert (yield []) == []
        return "nothing asked"

    with Crew(lambda number: number, n_threads=1) as crew:
        assert crew.start(silent()).value == "nothing asked"


def test_urgent_questions_and_those_that_follow_are_asked_first():
    asked, gate = [], threading.Event()

    def ask(name):
        gate.wait()
        asked.append(name)
        time.sleep(0.02)  # so that the conversation can go on before all is asked
        return name

    def one(name):
        yield [name]

    def two():
        yield ["begun"]
        yield ["follows"]

    with Crew(ask, n_threads=1) as crew:
        talks = [crew.start(two()), *(crew.start(one(f"later {n}")) for n in range(3))]
        talks.append(crew.start(one("urgent"), urgency=FIRST))
        gate.set()
        crew.results(talks)
    assert asked.index("urgent") == 1  # the first was being asked already
    assert asked.index("follows") < asked.index("later 2")


@pytest.mark.parametrize("problem", [UserError("no key"), ZeroDivisionError("theirs")])
def test_a_problem_ends_the_handing_out_and_what_is_under_way_is_taken_in(problem):
    taken, asked = [], []

    def ask(number):
        asked.append(number)
        time.sleep(0.02)
        if number == 3:
            raise problem
        return number

    def talk(number):
        (answer,) = yield [number]
        taken.append(answer)

    with Crew(ask, n_threads=4) as crew, pytest.raises(type(problem), match=str(problem)):
        crew.results([crew.start(talk(number)) for number in range(100)])
    assert len(asked) < 20
    assert sorted(taken) == sorted(set(asked) - {3})
