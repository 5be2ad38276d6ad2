"""Chooses how similarities are computed: in tiles, or all at once."""

from __future__ import annotations

from functools import partial

from jettclip.losses.pairwise import dense, tiled


class Pairwise:
    """The functions over similarities, with the tile that ``--loss-tile`` asks for.

    Args:
        tile: rows of similarities at a time, a number or ``auto``; ``off`` for whole matrices.
    """

    def __init__(self, tile: str = "auto") -> None:
        self.is_dense = tile == "off"
        module = dense if self.is_dense else tiled
        rows = int(tile) if tile.isdecimal() else 0
        self.softmax_terms = partial(module.softmax_terms, tile=rows)
        self.one_way = partial(module.one_way, tile=rows)
        self.sigmoid_term = partial(module.sigmoid_term, tile=rows)
