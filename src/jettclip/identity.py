"""Tells which rows of a batch show the same image, or have the same caption, by numbers that agree on every rank."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from jettclip.types import Batch, BatchInfo, Identity

# 2**64 over the golden ratio, as int64: its multiples keep far from one another, so that no value moves one place onto
# that of another; and the constants of `_mix`
_PLACE, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def number_of(content: bytes) -> int:
    """Returns a signed 64-bit number that is a function of some bytes, by XXH3: that of an image in `BatchInfo`."""
    return int.from_bytes(xxhash.xxh3_64_digest(content), "big", signed=True)


def identity_of(batch: Batch, info: BatchInfo) -> Identity:
    """Returns who is who in a batch, on its device and without waiting for it.

    Images are told apart by their encoded bytes, or by the samples' keys where `info` does not number them. Captions
    are told apart by what the student reads of them: those that are equal once cut to its context length are the same,
    and those of which padding was moved before the text are not.

    Raises:
        ValueError: if `info` is of another number of samples.
    """
    rows, device = len(batch.image), batch.image.device
    images = info.images or [number_of(key.encode("utf-8", "surrogatepass")) for key in info.keys]
    if len(images) != rows:
        raise ValueError(f"a batch of {rows} rows comes with the names of {len(images)} samples; give one a row")
    numbers = torch.tensor(images, dtype=torch.int64, pin_memory=device.type == "cuda")
    captions = (None if view is None else row_numbers(view) for view in (batch.short_caption, batch.long_caption))
    return Identity(numbers.to(device, non_blocking=True), *captions)


def row_numbers(captions: Tensor) -> Tensor:
    """Returns a number for every caption, equal for equal ones and, but for chances near 2**-64, for no others.

    Zeros count for nothing, so that captions may be padded to any length.

    Args:
        captions: token ids int64 [b, L], or embeddings float [b, D], which are compared bit by bit as float32.

    Returns:
        int64 [b].
    """
    if captions.is_floating_point():
        captions = captions.float().view(torch.int32)
    values = captions.long()
    places = torch.arange(1, values.shape[1] + 1, device=values.device) * _PLACE
    return _mix((_mix(values + places) * (values != 0)).sum(dim=1))


def _mix(numbers: Tensor) -> Tensor:
    """Scatters int64 over all of their values, one to one: the end of SplitMix64 (doi 10.1145/2660193.2660195)."""
    numbers = (numbers ^ _shifted(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * _SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shifts the bits of int64 to the right as if they had no sign."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)
