"""Keeps Ctrl-C: Python drops an exception that a signal raises while an object is being destroyed, and runs on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_interrupted = threading.Event()


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt on SIGINT, as Python does, and remembers it for `raise_if_interrupted`."""
    _interrupted.clear()
    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def raise_if_interrupted() -> None:
    """Raises KeyboardInterrupt if there was one that never arrived."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt
