"""What the short view sees of images, or of long captions: the principal components of their batch."""

from __future__ import annotations

import logging

from torch import Tensor

from jettclip.losses.gather import is_first_rank
from jettclip.losses.pca import Components, principal_components
from jettclip.losses.presets import Recipe
from jettclip.ranks import rank_and_world_size


class Coarsening:
    """Reduces features to the principal components that a recipe keeps, and reports once if that is all of them.

    Args:
        recipe: how many components, or how much variance, of images or of texts.
        is_global: find the components of all ranks' rows.
        detach: let no gradient through the choice of the components.
    """

    def __init__(self, recipe: Recipe, *, is_global: bool, detach: bool) -> None:
        self.recipe, self.is_global, self.detach = recipe, is_global, detach
        self._checks_rank = is_first_rank()

    def __call__(self, features: Tensor) -> Tensor | Components:
        """Returns the principal components of features [b, D], or the features if those hold everything."""
        found = principal_components(
            features,
            self.recipe.pca_components,
            variance=self.recipe.pca_variance,
            detach=self.detach,
            is_global=self.is_global,
        )
        # to read the rank costs no wait for a GPU beyond the one that the eigendecomposition has just ended with
        if self._checks_rank and int(found.rank) <= found.directions.shape[1]:
            self._checks_rank = False
            self._report(features, int(found.rank))
        return found.coordinates if found.is_whole else found

    def _report(self, features: Tensor, rank: int) -> None:
        ranks = rank_and_world_size()[1]
        kind = "image" if self.recipe.pca_side == "image" else "long caption"
        variance = self.recipe.pca_variance
        flag = f"--pca-components {self.recipe.pca_components}" if variance is None else f"--pca-variance {variance:g}"
        logging.warning(
            f"{flag} keeps everything of {len(features) * (ranks if self.is_global else 1)} {kind} features of width "
            f"{features.shape[1]}, whose rank is {rank}, so the short view sees whole {kind} features; "
            f"give {'fewer' if variance is None else 'less'}, or a larger --batch-size of different {kind}s"
            + (", or --pca-scope global" if ranks > 1 and not self.is_global else "")
        )
