"""Settings of the loss that its formula does not read: they would do nothing, and nobody would notice."""

from __future__ import annotations

from typing import NamedTuple

from jettclip.losses.formula import (
    PROJECTED_TERMS,
    SCALED_TERMS,
    find_recipe,
    parse_formula,
    preset_of,
    reads_short_view,
)
from jettclip.settings import USUAL_LOSS, LossSettings


class Reader(NamedTuple):
    """The only terms that read a setting, and one of them to add."""

    terms: set[str]
    remedy: str

    @property
    def named(self) -> str:
        """The terms in words."""
        *others, last = sorted(self.terms)
        return f"{', '.join(others)} and {last} terms" if others else f"{last} term"


READERS = {
    "label_smoothing": Reader({"clip"}, "1*clip@long"),
    "clip_margin": Reader({"clip"}, "1*clip@long"),
    "multi_positive": Reader({"clip", "siglip"}, "1*clip@long"),
    "teacher_scale": Reader(SCALED_TERMS, "1*kd@long"),
    "mse_projection": Reader(PROJECTED_TERMS, "1*mse@long"),
}
OF_SHORT_VIEW = ("pca_components", "pca_variance", "pca_side")
OF_COMPONENTS = ("pca_scope", "pca_detach")


def find_unused(settings: LossSettings) -> list[str]:
    """Returns what to do about each setting that makes the recipe another one, but that no term or view of it reads.

    Raises:
        ValueError: if the settings make no recipe.
    """
    loss = settings.loss or USUAL_LOSS
    recipe, before = find_recipe(settings), preset_of(loss)
    terms = {summand.term for summand in parse_formula(recipe.formula)}
    has_short = reads_short_view(recipe)
    missing = {name: one.named for name, one in READERS.items() if not one.terms & terms}
    remedies = {name: f"add {READERS[name].remedy} to the formula" for name in missing}
    for name in (*OF_SHORT_VIEW, *OF_COMPONENTS):
        if not has_short:
            missing[name], remedies[name] = "short view", "add 1*clip@short to the formula"
        elif name in OF_COMPONENTS and not recipe.has_pca:
            missing[name], remedies[name] = "short view's principal components", "give --pca-components 32"
    return [
        f"{_shown(name, value)} is for the {missing[name]}, which --loss {loss!r} does not have; leave it out, or "
        f"{remedies[name]}"
        for name, value in vars(settings).items()
        if name in missing and value not in (None, ()) and value != getattr(before, name)
        if (name, value) != ("pca_components", 0)  # which asks for nothing
    ]


def _shown(name: str, value: object) -> str:
    values = value if isinstance(value, tuple) else () if value is True else (value,)
    shown = [f"{one:g}" if isinstance(one, float) else str(one) for one in values]
    return " ".join([f"--{name.replace('_', '-')}", *shown])
