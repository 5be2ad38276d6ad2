"""Pairs a model's images and texts view by view, and gathers what the terms compare them with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from jettclip.losses.coarse import Coarsening
from jettclip.losses.formula import Summand
from jettclip.losses.gather import gather_rows, row_offset
from jettclip.losses.pca import Components
from jettclip.losses.presets import Recipe
from jettclip.losses.view import COARSE, Matches, Parts, whole
from jettclip.types import VIEWS, at_least_float32

Compared = Mapping[str, tuple[str, ...]]
"""What each term compares rows with, of ``image``, ``text`` and ``column``: the fields of `Parts`."""

STUDENT: Compared = dict.fromkeys(("clip", "kd", "crd", "siglip"), ("column",))
TEACHER: Compared = {"kd": ("column",), "crd": ("column",), "icl": ("image", "text")}


class Matching:
    """Makes `Matches` of a model's features, for the views of the summands that look at it.

    Args:
        summands: of the formula.
        recipe: what the short view sees.
        coarsen: finds the principal components.
        compared: what the terms compare with; all ranks' rows of it are gathered, in one exchange.
        with_captions: gather the captions that the clip term reads, too.
        keeps_whole: rebuild features from their principal components at once.
    """

    def __init__(
        self,
        summands: Iterable[Summand],
        recipe: Recipe,
        coarsen: Coarsening,
        compared: Compared,
        *,
        with_captions: bool = False,
        keeps_whole: bool = False,
    ) -> None:
        self.coarsen, self.keeps_whole = coarsen, keeps_whole
        self.coarse_of = "long" if recipe.pca_side == "text" else "image"
        self.parts: dict[str, Parts] = {}
        gathered: set[str] = set()
        for _, term, view in summands:
            parts = self.parts[view] = parts_of(recipe, view)
            gathered |= {getattr(parts, side) for side in compared.get(term, ())}
            if with_captions and term == "clip":
                gathered.add(recipe.caption_of(view))
        self.gathered = [part for part in ("image", *VIEWS, COARSE) if part in gathered]  # the same order on all ranks

    def __call__(self, features: Mapping[str, Tensor], scale: Tensor | float) -> dict[str, Matches]:
        """Returns the matches of every view; `features` [b, D] have ``image`` and the captions that the views read."""
        own: dict[str, Tensor | Components] = {part: at_least_float32(rows) for part, rows in features.items()}
        if any(COARSE in parts for parts in self.parts.values()):
            coarse = self.coarsen(whole(own[self.coarse_of]))
            own[COARSE] = whole(coarse) if self.keeps_whole else coarse
        gathered = gather_rows({part: whole(own[part]) for part in self.gathered})
        offset = row_offset(len(features["image"]))
        return {view: Matches(parts, own, gathered, scale, offset) for view, parts in self.parts.items()}


def parts_of(recipe: Recipe, view: str) -> Parts:
    """Returns what a view pairs."""
    caption = recipe.caption_of(view)
    if view == "long" or not recipe.has_pca:
        return Parts("image", caption)
    return Parts("image", COARSE) if recipe.pca_side == "text" else Parts(COARSE, caption)
