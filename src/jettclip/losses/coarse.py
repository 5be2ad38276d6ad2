"""What the short view sees of images, or of long captions: the principal components of their batch."""

from __future__ import annotations

import logging
from typing import NamedTuple

from torch import Tensor

from jettclip.losses.gather import is_distributed, is_first_rank
from jettclip.losses.pca import Components, principal_components
from jettclip.losses.presets import Recipe
from jettclip.ranks import rank_and_world_size


class Coarsening:
    """Reduces features to the principal components that a recipe keeps, and reports once if that is all of them.

    How many there are is read, and reported, at the call after, when that waits for nothing.

    Args:
        recipe: how many components, or how much variance, of images or of texts, in which scope, and whether their
            choice has a gradient.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.is_global = recipe, recipe.pca_scope == "global"
        self._checks_rank = is_first_rank()
        self._previous: _Kept | None = None

    @property
    def is_shared(self) -> bool:
        """Tells whether all rows that are compared are reduced to the same components."""
        return self.is_global or not is_distributed()

    def __call__(self, features: Tensor) -> Tensor | Components:
        """Returns the principal components of features [b, D], or the features if those hold everything."""
        found = principal_components(
            features,
            self.recipe.pca_components,
            variance=self.recipe.pca_variance,
            detach=self.recipe.pca_detach,
            is_global=self.is_global,
        )
        if self._checks_rank:
            # the copy of the call before is complete: torch.linalg.eigh, which this call is through with, waits for it
            if self._previous is not None and int(self._previous.rank) <= self._previous.components:
                self._report(self._previous)
                self._checks_rank = False
            rank = found.rank.to("cpu", non_blocking=True)
            self._previous = _Kept(rank, found.directions.shape[1], *features.shape)
        return found.coordinates if found.is_whole else found

    def _report(self, kept: _Kept) -> None:
        ranks = rank_and_world_size()[1]
        kind = "image" if self.recipe.pca_side == "image" else "long caption"
        variance = self.recipe.pca_variance
        flag = f"--pca-components {self.recipe.pca_components}" if variance is None else f"--pca-variance {variance:g}"
        logging.warning(
            f"{flag} keeps everything of {kept.rows * (ranks if self.is_global else 1)} {kind} features of width "
            f"{kept.width}, whose rank is {int(kept.rank)}, so the short view sees whole {kind} features; "
            f"give {'fewer' if variance is None else 'less'}, or a larger --batch-size of different {kind}s"
            + (", or --pca-scope global" if ranks > 1 and not self.is_global else "")
        )


class _Kept(NamedTuple):
    """What is known of a call."""

    rank: Tensor  # of the features, on the CPU, perhaps still on its way there
    components: int
    rows: int
    width: int
