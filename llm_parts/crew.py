"""Many conversations with a model at once, led by one thread.

A conversation is a generator: it yields questions, is sent their answers in the order of the questions, and may ask
again before it returns what it found out.

    def find_out(question):
        [answer] = yield [question]
        if answer.doubtful:
            [answer] = yield [question.in_other_words()]
        return answer.value

    with client.crew() as crew:
        talks = [crew.start(find_out(question)) for question in questions]
        values = crew.results(talks)

Only the calls themselves run in threads. The generators run in the thread that waits for their results, so whatever
they read and write needs no lock; and which questions are asked depends on the answers alone, never on their order.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

from common.config import UserError

Question = TypeVar("Question")
Reply = TypeVar("Reply")
Value = TypeVar("Value")

Talk = Generator[Sequence[Any], list[Any], Value]

FIRST, SOON, LATER = 0, 1, 2  # how urgent a conversation is: others wait for it, or for nothing but a free place


@dataclass
class Running(Generic[Value]):
    """A conversation under way."""

    talk: Talk[Value]
    urgency: int
    is_done: bool = False
    value: Value | None = None
    answers: dict[int, Any] = field(default_factory=dict)  # to the questions that are open, by their place
    n_asked: int = 0


@dataclass(frozen=True)
class _Arrival:
    running: Running[Any]
    place: int
    answer: Any
    problem: BaseException | None


class Crew(Generic[Question, Reply]):
    """Asks the questions of many conversations, the urgent ones first, at most `n_threads` at a time.

    `ask` is called from the threads. The first exception that it raises ends the handing out of questions; what is
    being asked by then is still taken in, then the exception is raised (a UserError before any other).
    """

    def __init__(self, ask: Callable[[Question], Reply], *, n_threads: int) -> None:
        self._ask = ask
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="llm")
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, int, Running[Any], int, Any]] = []  # a heap, the most urgent on top
        self._is_ending = False
        self._arrived: SimpleQueue[_Arrival] = SimpleQueue()
        self._n_open = 0  # questions handed out of which nothing was taken in yet

    def start(self, talk: Talk[Value], *, urgency: int = LATER) -> Running[Value]:
        """Begin a conversation: its first questions are asked as soon as there is a free place."""
        running = Running(talk, urgency)
        self._go_on(running, None)
        return running

    def result(self, running: Running[Value]) -> Value:
        """What a conversation found out; meanwhile all others go on too."""
        while not running.is_done:
            self._take_in(self._arrived.get())
        return running.value  # type: ignore[return-value]

    def results(self, talks: Iterable[Running[Value]]) -> list[Value]:
        """What several conversations found out, in their order."""
        return [self.result(running) for running in talks]

    def close(self) -> None:
        """Ask nothing more and wait for the calls in flight."""
        self._drop_waiting()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Crew[Question, Reply]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- in the thread of the caller ---------------------------------------------------------------------------------

    def _take_in(self, arrival: _Arrival) -> None:
        self._n_open -= 1
        if arrival.problem is not None:
            self._end(arrival.problem)
        running = arrival.running
        running.answers[arrival.place] = arrival.answer
        if len(running.answers) == running.n_asked:
            self._go_on(running, [running.answers[place] for place in range(running.n_asked)])

    def _go_on(self, running: Running[Any], answers: list[Any] | None) -> None:
        """Send a conversation its answers and hand out the questions that it has then."""
        try:
            questions = next(running.talk) if answers is None else running.talk.send(answers)
            while not questions:
                questions = running.talk.send([])
        except StopIteration as end:
            running.is_done, running.value = True, end.value
            return
        running.answers, running.n_asked = {}, len(questions)
        # What was begun is finished first, so that the last conversations do not begin late and end alone.
        urgency = running.urgency if answers is None else min(running.urgency, SOON)
        self._hand_out(running, questions, urgency)

    def _hand_out(self, running: Running[Any], questions: Sequence[Any], urgency: int) -> None:
        with self._lock:
            if self._is_ending:
                return
            for place, question in enumerate(questions):
                heapq.heappush(self._waiting, (urgency, next(self._numbers), running, place, question))
            self._n_open += len(questions)
        for _ in questions:
            self._pool.submit(self._ask_next)

    def _end(self, problem: BaseException) -> None:
        """Take in what is still being asked, so that it is kept, and raise the problem."""
        self._n_open -= self._drop_waiting()
        while self._n_open:
            arrival = self._arrived.get()
            if isinstance(arrival.problem, UserError) and not isinstance(problem, UserError):
                problem = arrival.problem
            if arrival.problem is None:
                self._take_in(arrival)
            else:
                self._n_open -= 1
        raise problem

    def _drop_waiting(self) -> int:
        with self._lock:
            self._is_ending = True
            n_dropped = len(self._waiting)
            self._waiting.clear()
        return n_dropped

    # --- in the threads ----------------------------------------------------------------------------------------------

    def _ask_next(self) -> None:
        with self._lock:
            if self._is_ending or not self._waiting:
                return
            _, _, running, place, question = heapq.heappop(self._waiting)
        try:
            arrival = _Arrival(running, place, self._ask(question), None)
        except BaseException as problem:
            with self._lock:
                self._is_ending = True
            arrival = _Arrival(running, place, None, problem)
        self._arrived.put(arrival)
