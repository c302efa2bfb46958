"""What a signal does to a run that keeps states: it waits for one, once, and only where there is something to keep."""

import signal
import threading
import time

import pytest

from liborth_cli.checkpoint import pace
from liborth_cli.checkpoint.pace import Pace
from liborth_cli.errors import OutOfResources


class Ended(Exception):
    """What the handler of these tests raises."""


@pytest.fixture
def told():
    """What is told; a handler for SIGINT is there as the command line has one."""

    def end(*_):
        raise Ended

    before = signal.signal(signal.SIGINT, end)
    yield []
    assert signal.signal(signal.SIGINT, before) is end, "handlers are put back"


def test_a_signal_waits_for_the_state_of_what_is_finished(told):
    here, kept = Pace("step", told.append), []
    with pytest.raises(Ended), here.minding():
        here.done()
        assert not here.is_due, "the first minute"
        signal.raise_signal(signal.SIGINT)
        kept.append("goes on")
        here.done()
        assert here.is_due and here.waits
        with here.keeping():
            kept.append("state")
        kept.append("never")
    assert kept == ["goes on", "state"]
    for _ in range(1000):
        if told:
            break
        time.sleep(0.001)
    assert told == ["stopping behind this step, to keep what is finished; once more stops at once"]


def test_it_does_not_wait_where_nothing_is_finished_or_all_is_kept(told):
    here = Pace("step", told.append)
    with pytest.raises(Ended), here.minding():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Ended), here.minding():
        here.done()
        with here.keeping():
            pass
        signal.raise_signal(signal.SIGINT)
    assert not told


def test_a_second_one_does_not_wait_and_one_that_waits_is_not_lost_at_the_end(told):
    here = Pace("step", told.append)
    with pytest.raises(Ended), here.minding():
        here.done()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGINT)
        raise Ended
    here = Pace("step", told.append)
    with pytest.raises(Ended), here.minding():
        here.done()
        signal.raise_signal(signal.SIGINT)


def test_a_disk_without_room_keeps_none_waiting(told, tmp_path, monkeypatch):
    def full(*_):
        raise OutOfResources("full")

    monkeypatch.setattr(pace, "check_space", full)
    here = Pace("step", told.append)
    with pytest.raises(Ended), here.minding():
        here.done()
        assert "no room" in here.lack_of_room(tmp_path, 1)
        here.done()
        assert not here.is_due
        signal.raise_signal(signal.SIGINT)


def test_what_nobody_handles_and_other_threads_are_left_alone(told):
    here, seen = Pace("step", told.append), []
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with here.minding():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    known = signal.getsignal(signal.SIGINT)

    def work():
        with here.minding():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [known]
