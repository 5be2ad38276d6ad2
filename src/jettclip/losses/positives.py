"""Who belongs together beyond the pairs of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from jettclip.losses.gather import gather_ids
from jettclip.losses.pairwise.block import Positives
from jettclip.types import Identity


class Identities:
    """Who is who among all ranks' rows, gathered once for all views.

    Args:
        identity: of this rank's rows.
        captions: those that the views read, of ``short`` and ``long``.

    Raises:
        ValueError: if the identity of a caption is missing.
    """

    def __init__(self, identity: Identity, captions: tuple[str, ...]) -> None:
        numbers = {"image": identity.image, **{caption: getattr(identity, caption) for caption in captions}}
        missing = [name for name, rows in numbers.items() if rows is None]
        if missing:
            raise ValueError(
                f"the loss reads {' and '.join(missing)} captions, but which of them are the same is not known; "
                "give the identity of all that it reads"
            )
        rows = torch.stack(list(numbers.values()), dim=1)
        self.rows, self.columns = (
            dict(zip(numbers, ids.unbind(dim=1), strict=True)) for ids in (rows, gather_ids(rows))
        )

    def positives(self, caption: str) -> Positives:
        """Returns what belongs together because of the same image or the same caption."""
        return Positives(*(torch.stack([ids["image"], ids[caption]], dim=1) for ids in (self.rows, self.columns)))

    def floor(self, caption: str) -> Tensor:
        """Returns what the clip term cannot go below if equal captions count as negatives, a scalar.

        Their similarities are equal, so that the best there is are n_i equal probabilities for row i, which has n_i
        captions of all ranks' like its own: the mean of ln n_i over this rank's rows, in either direction.
        """
        rows, columns = self.rows[caption].contiguous(), self.columns[caption].sort().values
        after, first = (torch.searchsorted(columns, rows, right=right) for right in (True, False))
        return (after - first).float().log().mean()
