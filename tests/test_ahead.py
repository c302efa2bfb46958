"""Work ahead of the writer: in order, within the budget, the last job first when it is told so."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from liborth_cli.split.divide import ahead


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_results_come_in_order(last_first, count):
    begun = []

    def work(job):
        begun.append(job)
        return job * job

    with ThreadPoolExecutor(1) as pool:
        found = list(ahead(pool, work, range(count), lambda job: 1, 2, last_first))
    assert found == [job * job for job in range(count)]
    assert sorted(begun) == list(range(count)), "each once"
    assert begun[0] == (count - 1 if last_first else 0)


def test_nobody_runs_further_ahead_than_the_budget():
    begun = []
    with ThreadPoolExecutor(4) as pool:
        results = ahead(pool, begun.append, list(range(9)), lambda job: 10, 25)
        next(results)
        pool.submit(int).result()
        assert len(begun) == 2
        next(results)
    assert len(begun) <= 3
