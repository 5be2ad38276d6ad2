"""Shows the findings of a check: as text to read, and as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from jettclip.prepare.findings import Findings, median, share_over

CONTEXTS = (77, 248)
"""Token limits of CLIP and of Long-CLIP (arXiv 2403.15378)."""

SMALL = 224  # pixels; most models read images of this side
_BINS = (16, 32, 77, 128, 248, 512)


def summary(found: Findings) -> dict[str, Any]:
    """Returns findings as JSON values."""
    return {
        "clean": found.is_clean,
        "shards": found.shards,
        "samples": found.samples,
        "bad_samples": found.bad,
        "problems": dict(found.problems.most_common()),
        "damage": dict(found.damaged.most_common()),
        "noted": {event: count for event, count in found.noted.most_common() if count},
        "examples": found.examples,
        "caption_tokens": {view: _tokens(lengths) for view, lengths in found.tokens.items()},
        "images": _images(found),
        "stores": {name: store.summary() for name, store in found.stores.items()},
    }


def _tokens(lengths: Counter[int]) -> dict[str, Any]:
    return {
        "captions": lengths.total(),
        "median": median(lengths),
        "max": max(lengths, default=0),
        **{f"share_over_{limit}": share_over(lengths, limit) for limit in CONTEXTS},
        "histogram": {str(length): count for length, count in sorted(lengths.items())},
    }


def _images(found: Findings) -> dict[str, Any]:
    images = found.widths.total()
    sides = {
        name: {"min": min(counts, default=0), "median": median(counts), "max": max(counts, default=0)}
        for name, counts in (("width", found.widths), ("height", found.heights))
    }
    return {
        "images": images,
        **sides,
        "mean_megapixels": found.pixels / 1e6 / max(1, images),
        "mean_kilobytes": found.image_bytes / 1e3 / max(1, images),
        f"share_smaller_than_{SMALL}": 1 - share_over(found.shorter_sides, SMALL - 1) if images else 0.0,
    }


def lines(found: Findings) -> Iterator[str]:
    """Yields findings as lines to read."""
    yield f"{found.shards} shards, {found.samples} samples, of which {found.bad} cannot be used"
    yield from _table("wrong with samples", found.problems, found.examples)
    yield from _table("wrong with files", found.damaged, found.examples)
    yield from _table("worth knowing", +found.noted, {})
    for view, lengths in found.tokens.items():
        yield from _histogram(view, lengths)
    if found.widths:
        images = _images(found)
        yield ""
        yield (
            f"images: {_sides(images['width'])} wide, {_sides(images['height'])} high, "
            f"{images['mean_megapixels']:.2f} megapixels and {images['mean_kilobytes']:.1f} kB on average, "
            f"{images[f'share_smaller_than_{SMALL}']:.1%} smaller than {SMALL}"
        )
    for name, store in found.stores.items():
        yield ""
        yield f"store {name!r}: " + (
            "; ".join(f"{t} ({n} shards)" for t, n in store.teachers.items()) or "none can be read"
        )
        for part, norms in store.norms.items():
            yield (
                f"  {part}: {norms.count} rows, norm {norms.least:.4f} to {norms.most:.4f}, "
                f"{norms.total / norms.count:.4f} on average"
            )
        if store.unused:
            yield f"  {store.unused} rows of samples that the shards do not have"
        yield from _table(f"wrong with store {name!r}", store.problems, found.examples)
        if store.problems:
            yield f"  extract store {name!r} again with --overwrite; --fix mends shards, not stores"


def _table(title: str, counts: Counter[str], examples: Mapping[str, str]) -> Iterator[str]:
    if counts:
        yield ""
        yield f"{title}:"
        width = max(map(len, counts))
        for reason, count in counts.most_common():
            yield f"  {reason:<{width}} {count:>9}" + (f"   {examples[reason]}" if reason in examples else "")


def _sides(sides: Mapping[str, int]) -> str:
    return f"{sides['min']} to {sides['max']} (median {sides['median']})"


def _histogram(view: str, lengths: Counter[int]) -> Iterator[str]:
    shares = ", ".join(f"{share_over(lengths, limit):.1%} over {limit}" for limit in CONTEXTS)
    yield ""
    yield f"{view} captions: {lengths.total()}, {median(lengths)} tokens (median) to {max(lengths)}; {shares}"
    first = 0
    for last in (*(limit for limit in _BINS if limit < max(lengths)), max(lengths)):
        count = sum(number for length, number in lengths.items() if first <= length <= last)
        yield f"  {first:>4} to {last:<6} {count:>9}  {'#' * round(40 * count / lengths.total())}".rstrip()
        first = last + 1
