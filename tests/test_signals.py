"""Ctrl-C that Python itself forgets is answered all the same."""

import signal

import pytest

from train.signals import kept_interrupt


class Interrupted:
    """Is interrupted while it is taken away, where Python drops every exception."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_dropped_in_a_destructor_is_raised_at_the_next_check():
    lived_on = False
    with pytest.raises(KeyboardInterrupt), kept_interrupt() as check:
        doomed = Interrupted()
        del doomed
        lived_on = True
        check()
    assert lived_on


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_dropped_after_the_last_check_is_raised_at_the_end():
    with pytest.raises(KeyboardInterrupt), kept_interrupt():
        doomed = Interrupted()
        del doomed


def test_otherwise_ctrl_c_is_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), kept_interrupt():
        signal.raise_signal(signal.SIGINT)
    with kept_interrupt() as check:
        check()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with kept_interrupt() as check:
            signal.raise_signal(signal.SIGINT)
            check()
    finally:
        signal.signal(signal.SIGINT, before)
