"""What is shared is computed once, by one thread, and forgotten when it is large."""

import threading
from concurrent.futures import ThreadPoolExecutor

from liborth_cli.methods.memo import Memo


def test_threads_wait_for_the_one_that_computes():
    memo, made, gate = Memo(), [], threading.Event()

    def make():
        gate.wait(5)
        made.append(1)
        return "result"

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(memo.get, "key", make, len) for _ in range(4)]
        gate.set()
        assert {f.result() for f in futures} == {"result"}
    assert (len(made), memo.hits) == (1, 3)


def test_the_oldest_goes_first_and_the_too_large_is_not_kept():
    memo = Memo(limit=10)
    for key in ("aaaa", "bbbb"):
        memo.get(key, lambda k=key: k, len)
    memo.get("aaaa", lambda: "never", len)
    memo.get("cccc", lambda: "cccc", len)
    assert memo.get("aaaa", lambda: "made again", len) == "aaaa"
    assert memo.get("bbbb", lambda: "made again", len) == "made again"
    assert memo.get("huge", lambda: "x" * 11, len) == "x" * 11
    assert memo.get("huge", lambda: "again", len) == "again"
    assert memo.get(None, lambda: "unkept", len) == "unkept"


def test_an_error_is_not_kept():
    memo = Memo()
    for _ in range(2):
        try:
            memo.get("key", lambda: 1 / 0, lambda _: 0)
        except ZeroDivisionError:
            continue
        raise AssertionError
    assert memo.get("key", lambda: 5, lambda _: 8) == 5
