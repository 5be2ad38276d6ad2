"""Writes metrics: ``metrics.jsonl`` always, TensorBoard and Weights & Biases on request; no tracker can stop a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from jettclip.files import whole_file

METRICS = "metrics.jsonl"

Values = Mapping[str, Any]


class Sink(Protocol):
    """Something that takes metrics."""

    def write(self, kind: str, step: int, values: Values) -> None:
        """Takes the values of one step; `kind` is ``train`` or ``val``."""

    def close(self) -> None:
        """Flushes what was taken."""


class Reporter:
    """Fans metrics out to sinks; one that fails is dropped with a warning, and the run goes on.

    Args:
        folder: of the run; None writes nothing, as every rank but the first should.
        trackers: of ``tensorboard`` and ``wandb``.
        name: of the run, in Weights & Biases.
        config: of the run, for the trackers to show.
        project, notes: in Weights & Biases.
        first_step: steps taken when training goes on: what a stopped run wrote past them is removed. None keeps all.
    """

    def __init__(
        self,
        folder: Path | None,
        trackers: list[str],
        *,
        name: str = "",
        config: Values | None = None,
        project: str = "",
        notes: str = "",
        first_step: int | None = None,
    ) -> None:
        self._sinks: dict[str, Sink] = {}
        if folder is None:
            return
        makers: dict[str, Callable[[], Sink]] = {"metrics.jsonl": lambda: JsonLines(folder / METRICS, first_step)}
        if "tensorboard" in trackers:
            makers["tensorboard"] = lambda: TensorBoard(folder / "tensorboard", first_step)
        if "wandb" in trackers:
            makers["wandb"] = lambda: WandB(folder, name, config or {}, project, notes)
        for sink, make in makers.items():
            self._guard(sink, lambda sink=sink, make=make: self._sinks.update({sink: make()}))  # type: ignore[misc]

    def log(self, kind: str, step: int, values: Values) -> None:
        """Writes the values of a step to every sink."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, lambda sink=sink: sink.write(kind, step, values))  # type: ignore[misc]

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every sink, as leaving a ``with`` does."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.close)

    def _guard(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker raises, training matters more
            self._sinks.pop(name, None)
            logging.warning(f"{name} failed and gets no more metrics: {type(error).__name__}: {error}")


class JsonLines:
    """One JSON object a line: kind, step, values."""

    def __init__(self, path: Path, first_step: int | None) -> None:
        if path.exists():  # rewritten whole, since a killed run may have left its last line unfinished
            kept = [line for line in read_metrics(path) if first_step is None or line["step"] <= first_step]
            with whole_file(path) as partial:
                Path(partial).write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._stream = path.open("a")

    def write(self, kind: str, step: int, values: Values) -> None:
        """Appends a line."""
        self._stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path, first_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=None if first_step is None else first_step + 1)

    def write(self, kind: str, step: int, values: Values) -> None:
        """Writes the numbers among the values."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandB:
    """Weights & Biases; works offline with ``WANDB_MODE=offline``."""

    def __init__(self, folder: Path, name: str, config: Values, project: str, notes: str) -> None:
        import wandb

        self._run = wandb.init(
            project=project, name=name, id=name, notes=notes, config=dict(config), dir=folder, resume="allow"
        )

    def write(self, kind: str, step: int, values: Values) -> None:
        """Logs the numbers among the values."""
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


def set_up_logging(file: Path | None, rank: int, debug: bool = False) -> None:
    """Sends log lines to the console and to a file; ranks other than 0, without a file, only speak up for warnings."""
    logging.captureWarnings(True)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    level = logging.WARNING if rank and file is None else logging.DEBUG if debug else logging.INFO
    where = f" rank {rank}" if rank else ""
    logging.basicConfig(
        level=level,
        format=f"%(asctime)s{where} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl``, without the last line if a killed run left it unfinished."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            logging.warning(f"{path} has an unfinished line, which is left out")
    return lines
