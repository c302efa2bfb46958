"""Work ahead of the writer, in order, within a memory budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def ahead(
    pool: Executor,
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    cost: Callable[[Job], int],
    budget: int,
    last_first: bool = False,
) -> Iterator[Result]:
    """Yield work(job) for every job, in order, while later jobs are already being worked on.

    Args:
        pool: where the work is done.
        work: called in the pool.
        jobs: what to do, in order.
        cost: bytes a job holds from its start until the consumer asks for the next result.
        budget: bytes that may be held at a time; a single job may exceed it.
        last_first: begin the last job beside the first one, outside the budget; its result waits for its turn.

    Yields:
        The results.
    """
    early = pool.submit(work, jobs[-1]) if last_first else None
    rest, running, spent = deque(jobs[:-1] if early else jobs), deque[tuple[Job, Future[Result]]](), 0
    while rest or running:
        while rest and (not running or spent + cost(rest[0]) <= budget):
            job = rest.popleft()
            running.append((job, pool.submit(work, job)))
            spent += cost(job)
        job, future = running[0]
        yield future.result()
        running.popleft()
        spent -= cost(job)
    if early:
        yield early.result()
