from __future__ import annotations

import os
import signal

import pytest

from jettclip.interrupt import interruptible, raise_if_interrupted


class InterruptedInItsDestructor:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_ends_what_runs() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_is_raised_later() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible():
        raise_if_interrupted()
        InterruptedInItsDestructor()
        with pytest.raises(KeyboardInterrupt):
            raise_if_interrupted()
    assert signal.getsignal(signal.SIGINT) is before
    with interruptible():
        raise_if_interrupted()  # that was another run's
