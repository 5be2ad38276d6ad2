"""What a model costs: parameters, multiply-accumulates, and the latency of its towers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jettclip.models.factory import create_model
from jettclip.models.reparameterize import reparameterize
from jettclip.models.two_towers import TwoTowers

LENGTHS = (77, 248)
"""Tokens of a caption at which text towers are counted."""

ROUNDS, LEAST_ROUNDS, SECONDS = 30, 5, 10.0
"""A latency is the median of so many rounds, or of fewer but at least so many once the seconds are spent."""

Latency = dict[str, dict[str, float]]
"""Milliseconds by tower, ``image`` or ``text``, and by form, ``trained`` or ``reparameterized``."""


@dataclass(frozen=True)
class Profile:
    """What one model costs."""

    model: str
    image_parameters: int
    text_parameters: int
    image_macs: int  # of one image
    text_macs: dict[str, int]  # of one caption, by its tokens ("77"), or of one stored "embedding"
    latency_ms: dict[str, Latency]  # by device


def profile(name: str, devices: Sequence[str] = ("cpu",)) -> Profile:
    """Counts and times a model with random weights, on one image and one caption of its whole context.

    Raises:
        ValueError: for an unknown name.
    """
    model = create_model(name).eval()
    longest = longest_text(model)
    lengths = {str(length): length for length in LENGTHS if length <= longest} or {str(longest): longest}
    if model.embedding_width:
        lengths = {"embedding": 1}
    image = example_image(model)
    counted = Profile(
        model=name,
        image_parameters=count_parameters(model.visual),
        text_parameters=count_parameters(model.text),
        image_macs=count_macs(partial(model.encode_image, image)),
        text_macs={
            key: count_macs(partial(model.encode_text, example_text(model, length))) for key, length in lengths.items()
        },
        latency_ms={},
    )
    folded = reparameterize(model)
    for device in devices:
        counted.latency_ms[device] = tower_latencies(model.to(device), folded.to(device))
    return counted


def longest_text(model: TwoTowers) -> int:
    """Returns the tokens of the longest caption; an embedding counts as one."""
    return 1 if model.embedding_width else model.context_length


def example_image(model: TwoTowers, rows: int = 1) -> Tensor:
    """Returns random normalised images, float [rows, 3, H, W], on the model's device."""
    size = model.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(rows, 3, height, width, device=model.logit_scale.device)


def example_text(model: TwoTowers, length: int, rows: int = 1) -> Tensor:
    """Returns random captions, ids int64 [rows, length], or float embeddings for an adapter, on the model's device.

    The first caption fills its row; the second ends, with the largest id, at half of it, the third at a third.
    """
    device = model.logit_scale.device
    if model.embedding_width:
        return torch.randn(rows, model.embedding_width, device=device)
    end = model.text.vocab_size - 1
    ids = torch.randint(1, end, (rows, length), device=device)
    for row in range(rows):
        last = (length - 1) // (row + 1)
        ids[row, last] = end
        ids[row, last + 1 :] = 0
    return ids


def count_parameters(module: nn.Module) -> int:
    """Returns the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(function: Callable[[], object]) -> int:
    """Counts the multiply-accumulates of convolutions and matrix products in a call.

    Those of attention are among them, all of them also under a causal mask. Look-ups in tables, normalisation,
    activations and other element-wise work are not.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for the whole layer, which the counter does not know
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def tower_latencies(model: TwoTowers, folded: TwoTowers) -> Latency:
    """Times the towers of a model and of its reparameterised copy, on one image and one caption of the whole context.

    On the CPU they run on one thread. A tower in which nothing was folded is timed once, as trained.

    Returns:
        median milliseconds, by tower and form.
    """
    image, text = example_image(model), example_text(model, longest_text(model))
    return {
        "image": _time_forms(model.visual, folded.visual, image),
        "text": _time_forms(model.text, folded.text, text),
    }


def _time_forms(tower: nn.Module, folded: nn.Module, value: Tensor) -> dict[str, float]:
    forms = {"trained": tower}
    if folded.state_dict().keys() != tower.state_dict().keys():
        forms["reparameterized"] = folded
    return time_interleaved({form: partial(module, value) for form, module in forms.items()})


def time_interleaved(functions: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Times functions in turns, so that what else the machine does falls on all of them.

    Returns:
        the median milliseconds of each.
    """
    times: dict[str, list[float]] = {key: [] for key in functions}
    with one_thread(), torch.inference_mode():
        for _ in range(2):  # warm up
            for function in functions.values():
                wait_for(function())
        stop = time.perf_counter() + SECONDS
        for round in range(ROUNDS):
            if round >= LEAST_ROUNDS and time.perf_counter() > stop:
                break
            for key, function in functions.items():
                start = time.perf_counter()
                wait_for(function())
                times[key].append(1000 * (time.perf_counter() - start))
    return {key: statistics.median(values) for key, values in times.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute on one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wait_for(tensor: Tensor) -> None:
    """Waits until a tensor is computed."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def table(profiles: Sequence[Profile]) -> str:
    """Returns a Markdown table with aligned columns, a row a model."""
    devices = list(profiles[0].latency_ms)
    timed = [(device, tower) for device in devices for tower in ("image", "text")]
    rows = [["model", "image M", "text M", "image GMACs", *(f"text GMACs at {length}" for length in LENGTHS)]]
    rows[0] += [f"{tower} ms, {device}" for device, tower in timed]
    for found in profiles:
        millions = [f"{count / 1e6:.2f}" for count in (found.image_parameters, found.text_parameters)]
        gmacs = [f"{found.image_macs / 1e9:.3f}", *(_text_gmacs(found.text_macs, length) for length in LENGTHS)]
        latency = [_arrow(found.latency_ms[device][tower]) for device, tower in timed]
        rows.append([f"`{found.model}`", *millions, *gmacs, *latency])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def _text_gmacs(macs: Mapping[str, int], length: int) -> str:
    if str(length) in macs:
        return f"{macs[str(length)] / 1e9:.3f}"
    other = next((key for key in macs if key not in map(str, LENGTHS)), "")  # a shorter context, or an embedding
    if not other or length != LENGTHS[0]:
        return "-"
    return f"{macs[other] / 1e9:.3f} {'an embedding' if other == 'embedding' else f'at {other}'}"


def _arrow(milliseconds: Mapping[str, float]) -> str:
    return " -> ".join(f"{value:.1f}" for value in milliseconds.values())
