#!/usr/bin/env python
"""Measures time and peak memory of the loss, forward and backward, against OpenCLIP's and Long-CLIP's layout of it.

    python benchmarks/loss.py                 # --quick: one small batch only

The loss is that of a long and a short view, the latter with 32 principal components, without teachers and with two of
width 768. Every side has a process of its own for every case. Its first run, after a tiny one, gives the peak memory:
what the process, or on a GPU torch, grew by. Time is the median of further runs, in turn with the other sides: CPU time
on one thread, or on a GPU wall time. Each side's loss and gradients are held against the dense formula in float64, or
for larger batches against our dense loss, and no number is given if ours are off. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import torch
from loss_sides import DENSE, LONGCLIP, OPENCLIP, SIDES, TEACHER_WIDTH, TILED, Case, Inputs, Side, draw
from torch import Tensor

# what ours may be off by, relative to the norm; in float32 the gradient through principal components is worth no more,
# where a kept and a dropped one are nearly as large
LOSS_ERROR, GRADIENT_ERROR = 1e-6, 1e-4
LARGEST_IN_FLOAT64 = 2048
TARGET_ROWS = 8192
MATRICES = {0: 10, 2: 16}  # of B x B that a dense side takes, by teachers
MIB = 1 << 20


class Measured(NamedTuple):
    """What a side took and gave."""

    mib: float
    seconds: float
    loss_error: float | None  # None: not compared
    gradient_error: float | None


class Answer(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


class Meter:
    """Tells time and memory, of this process or of its GPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def seconds(self) -> float:
        """Returns CPU time, or once the GPU is done wall time."""
        if not self.on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> float:
        """Forgets the peak memory; returns the MiB in use."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MIB
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would hide as much of what is taken
        Path("/proc/self/clear_refs").write_text("5")
        return self._resident("VmRSS")

    def peak(self) -> float:
        """Returns the peak memory in MiB."""
        return torch.cuda.max_memory_allocated() / MIB if self.on_gpu else self._resident("VmHWM")

    def room(self) -> float:
        """Returns the MiB that may still be taken."""
        if self.on_gpu:
            return torch.cuda.mem_get_info()[0] / MIB
        return _kibibytes("/proc/meminfo", "MemAvailable") / 1024

    @staticmethod
    def _resident(field: str) -> float:
        return _kibibytes("/proc/self/status", field) / 1024


def _kibibytes(path: str, field: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def answer(side: Side, inputs: Inputs) -> Answer:
    """Runs a side forward and backward."""
    loss = side(inputs)
    return Answer(loss.detach(), torch.autograd.grad(loss, inputs.leaves))


def error(found: Tensor, expected: Tensor) -> float:
    """Returns the distance relative to the norm; NaN if anything is not finite."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


class Worker:
    """A process of its own, in which one side is measured.

    Args:
        name: of the side.
        case: what it computes.
        device: cpu or cuda.
        folder: where the references lie.
    """

    def __init__(self, name: str, case: Case, device: str, folder: str) -> None:
        context = multiprocessing.get_context("fork")  # this process has not used torch, so that it can be forked
        self.pipe, theirs = context.Pipe()
        context.Process(target=self._serve, args=(theirs, name, case, device, folder), daemon=True).start()
        theirs.close()

    def receive(self) -> Any:
        """Returns what the process sends next."""
        return self.pipe.recv()

    def seconds(self) -> float:
        """Returns the time of one run."""
        self.pipe.send("run")
        return float(self.pipe.recv())

    @staticmethod
    def _serve(pipe: Any, name: str, case: Case, device: str, folder: str) -> None:
        torch.set_num_threads(1)
        meter = Meter(device)
        if name == OPENCLIP and case.teachers:
            case = case._replace(teachers=1)
        dense_mib = MATRICES[min(case.teachers * 2, 2)] * case.rows**2 * 4 / MIB
        if name != TILED and dense_mib > 0.9 * meter.room():
            pipe.send(None)
            return
        tiny = case._replace(rows=max(case.width, TEACHER_WIDTH) + 64)  # so many that they are decomposed alike
        answer(SIDES[name](tiny), draw(tiny, device, torch.float32))
        inputs, side = draw(case, device, torch.float32), SIDES[name](case)
        before = meter.reset_peak()
        given = answer(side, inputs)
        mib = meter.peak() - before
        loss_error = gradient_error = None
        with suppress(FileNotFoundError):
            expected = Answer(*torch.load(reference_path(folder, case)))
            gradient_error = max(map(error, given.gradients, expected.gradients))
            if not (name == OPENCLIP and case.teachers):  # whose loss has the teachers' entropy in it
                loss_error = error(given.loss, expected.loss)
        del given
        pipe.send((mib, loss_error, gradient_error))
        with suppress(EOFError):
            while pipe.recv():
                start = meter.seconds()
                answer(side, inputs)
                pipe.send(meter.seconds() - start)


def reference_path(folder: str, case: Case) -> str:
    """Returns where the expected answer for a case lies."""
    return f"{folder}/{'-'.join(map(str, case))}.pt"


def write_reference(case: Case, device: str, folder: str) -> None:
    """Writes the expected answer: the dense formula's in float64, of many rows our dense loss's in float32."""
    torch.set_num_threads(1)
    if MATRICES[min(case.teachers * 2, 2)] * case.rows**2 * 4 / MIB > 0.9 * Meter(device).room():
        return
    exact = case.rows <= LARGEST_IN_FLOAT64
    inputs = draw(case, device, torch.float64 if exact else torch.float32)
    torch.save(tuple(answer(SIDES[LONGCLIP if exact else DENSE](case), inputs)), reference_path(folder, case))


def measure(case: Case, repeats: int, device: str) -> dict[str, Measured]:
    """Measures all sides on one case; those that memory does not suffice for are left out."""
    with tempfile.TemporaryDirectory() as folder:
        for teachers in {case.teachers, min(case.teachers, 1)}:
            arguments = (case._replace(teachers=teachers), device, folder)
            process = multiprocessing.get_context("fork").Process(target=write_reference, args=arguments)
            process.start()
            process.join()
        workers, first = {}, {}
        for name in SIDES:
            worker = Worker(name, case, device, folder)
            if result := worker.receive():
                workers[name], first[name] = worker, result
        taken: dict[str, list[float]] = {name: [] for name in workers}
        names = list(workers)
        for _ in range(repeats):
            for name in names:
                taken[name].append(workers[name].seconds())
            names = names[1:] + names[:1]
    found = {name: Measured(mib, statistics.median(taken[name]), *errors) for name, (mib, *errors) in first.items()}
    check(case, found)
    return found


def check(case: Case, found: dict[str, Measured]) -> None:
    """Ends the program if one of our losses is not what it should be."""
    for name in (TILED, DENSE):
        if name in found:
            _, _, loss_error, gradient_error = found[name]
            for what, value, most in (("loss", loss_error, LOSS_ERROR), ("gradient", gradient_error, GRADIENT_ERROR)):
                if value is not None and not value <= most:
                    sys.exit(f"{name}: of {case} the {what} is off by {value:.1e}, so there is nothing to compare")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one batch of 2048 of width 512, and fewer repeats")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="(default: 1024 to 16384)")
    parser.add_argument("--widths", type=int, nargs="+", help="of the student's features (default: 512 and 768)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(arguments)
    batch_sizes = args.batch_sizes or ([2048] if args.quick else [1024, 2048, 4096, 8192, 16384])
    widths = args.widths or ([512] if args.quick else [512, 768])
    measured: dict[Case, dict[str, Measured]] = {}
    for width in widths:
        for teachers in (0, 2):
            print_head(width, teachers)
            for rows in batch_sizes:
                case = Case(rows, width, teachers)
                repeats = 2 if args.quick else 7 if rows <= 2048 else 3 if rows <= TARGET_ROWS else 1
                measured[case] = measure(case, repeats, args.device)
                print_rows(case, measured[case])
    report(measured, args.device)
    return 0


def print_head(width: int, teachers: int) -> None:
    """Prints the head of a table."""
    print(f"\nWidth {width}, {f'distilled from {teachers} teachers' if teachers else 'no teacher'}\n")
    print("| B | loss | peak MiB | ours, tiled / it | seconds | ours, tiled / it | error of the loss | of gradients |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|")


def print_rows(case: Case, found: dict[str, Measured]) -> None:
    """Prints the rows of a table that one case makes."""
    for name, its in found.items():
        label = f"{name}, one teacher" if name == OPENCLIP and case.teachers else name
        memory, seconds = ratios(found, name)
        errors = ["-" if value is None else f"{value:.0e}" for value in (its.loss_error, its.gradient_error)]
        cells = [f"{case.rows:,}", label, f"{its.mib:,.0f}", f"{memory:.2f}", f"{its.seconds:.2f}", f"{seconds:.2f}"]
        print(f"| {' | '.join(cells + errors)} |", flush=True)


def ratios(found: dict[str, Measured], name: str) -> tuple[float, float]:
    """Returns what our tiled loss takes of the memory and of the time of another."""
    ours, other = found[TILED], found[name]
    return ours.mib / other.mib, ours.seconds / other.seconds


def report(measured: dict[Case, dict[str, Measured]], device: str) -> None:
    """Prints what it was measured with, and the JSON: ratios at a batch size of 8192, or the largest of fewer."""
    complete = [case for case, found in measured.items() if found.keys() == SIDES.keys() and case.rows <= TARGET_ROWS]
    rows, width = max(case.rows for case in complete), complete[0].width
    summary: dict[str, float] = {}
    to_others: dict[str, dict[str, float]] = {name: {} for name in SIDES if name not in (TILED, DENSE)}
    for suffix, teachers in (("", 0), ("_kd", 2)):
        found = measured[Case(rows, width, teachers)]
        for name, its in ((DENSE, summary), *to_others.items()):
            for what, ratio in zip(("memory", "time"), ratios(found, name), strict=True):
                its[f"{what}_ratio{suffix}"] = round(ratio, 3)
    packages = ", ".join(f"{name} {version(name)}" for name in ("open_clip_torch", "torch"))
    where = "one CPU thread" if device == "cpu" else torch.cuda.get_device_name()
    print(f"\nPython {platform.python_version()}, {packages}; {where}\n")
    details = [
        {**case._asdict(), "loss": name, **its._asdict()}
        for case, by_side in measured.items()
        for name, its in by_side.items()
    ]
    print(json.dumps({**summary, "to": to_others, "batch_size": rows, "width": width, "measured": details}))


if __name__ == "__main__":
    sys.exit(main())
