"""Ways to make the short caption of a long one, and to move a caption among its padding."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_END = re.compile(
    r"""(?<=[.!?]) (?<!\b[^\W\d_]\.) (?<!\bvs\.) (?<!\b[MD]r\.) (?<!\bMrs\.) (?<!\bSt\.) (?<!\bNo\.) \s+
    | (?<=[.!?]["'”’)\]]) (?!\s+[a-z]) \s+
    | (?<=[。！？]) (?![。！？”’」』）]) \s*
    | (?<=[。！？][”’」』）]) \s*
    | \n\s*\n""",
    re.VERBOSE,
)
_FULL_WIDTH = re.compile("[。！？][”’」』）]?$")


def sentences(caption: str) -> list[str]:
    """Splits a caption into its sentences, which keep their stops; there is at least one.

    A sentence ends with ``.``, ``!`` or ``?`` before a blank, also where a quotation mark or bracket closes in between
    and no small letter follows; with ``。``, ``！`` or ``？`` before anything; and at an empty line. The full stop of a
    single letter (``e.g.``, ``p.m.``, ``J. Doe``) and of ``vs.``, ``Mr.``, ``Mrs.``, ``Dr.``, ``St.`` and ``No.`` ends
    none, so that a sentence that ends with one letter runs into the next. Not known are other abbreviations, an
    ellipsis inside a sentence, and numbers of lists (``1. A dog``): these are split.
    """
    return [piece for piece in map(str.strip, _END.split(caption)) if piece] or [caption]


def _joined(chosen: list[str]) -> str:
    """Puts sentences one after the other, with a blank after those that end with no full-width stop."""
    return "".join(f"{sentence}{'' if _FULL_WIDTH.search(sentence) else ' '}" for sentence in chosen).strip()


def first_sentence(caption: str, generator: random.Random | None = None) -> str:
    """Returns the text before the first full stop that a blank follows (Long-CLIP, arXiv 2403.15378).

    Where there is none, as in Chinese, it is the first of the `sentences`.
    """
    parts = [part for part in caption.replace("\n", " ").split(". ") if part.strip()]
    return parts[0] if len(parts) > 1 else sentences(caption)[0]


def drop_summary(caption: str, generator: random.Random | None = None) -> str:
    """Returns all sentences but the first, which sums the others up (DeBias-CLIP, arXiv 2602.22419).

    A caption of one sentence stays as it is.
    """
    first, *rest = sentences(caption)
    return _joined(rest) if rest else first


def sample_sentences(caption: str, generator: random.Random) -> str:
    """Returns some of the sentences but the first, in shuffled order (DeBias-CLIP, arXiv 2602.22419).

    Of n sentences, a number is drawn from 1 to n - 1, and so many of the n - 1 that are left without the first. A
    caption of one sentence stays as it is.
    """
    first, *rest = sentences(caption)
    return _joined(generator.sample(rest, generator.randint(1, len(rest)))) if rest else first


def pad_shift(ids: Tensor, generator: random.Random) -> Tensor:
    """Moves a random share of the padding from behind the caption to between its start token and its text.

    The number that is moved is uniform, from none of the pads to all (DeBias-CLIP, arXiv 2602.22419). The end token is
    the one with the largest id, as in CLIP's vocabulary.

    Args:
        ids: token ids int64 [L].
        generator: draws the number.

    Returns:
        int64 [L].
    """
    end = int(ids.argmax()) + 1
    moved = end + generator.randint(0, len(ids) - end)
    return torch.cat([ids[:1], ids[end:moved], ids[1:end], ids[moved:]])


POLICIES: dict[str, Callable[[str, Any], str]] = {
    "first-sentence": first_sentence,
    "drop-summary": drop_summary,
    "sample-sentences": sample_sentences,
}
"""Ways to make a short caption of a long one and a generator, by the name that ``--short-caption-policy`` takes."""


def is_random(policy: str) -> bool:
    """Tells whether a policy draws another text in every epoch, so that no features of it can be stored."""
    return policy == "sample-sentences"
