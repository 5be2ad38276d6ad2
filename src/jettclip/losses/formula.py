"""Reads a loss formula: ``0.8*clip@long + 0.4*clip@short + 1.5*kd@long``, or a preset that stands for one."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from jettclip.settings import USUAL_LOSS, LossSettings
from jettclip.types import VIEWS

TERMS = ("clip", "kd", "mse")
TEACHER_TERMS = ("kd", "mse")
_SUMMAND = re.compile(r"(?:(?P<weight>\d+|\d*\.\d+)\*)?(?P<term>[a-z_]+)@(?P<view>[a-z_]+)")


class Summand(NamedTuple):
    """A weighted term over a view."""

    weight: float
    term: str
    view: str


class Recipe(NamedTuple):
    """A formula with the constants it is published with; scales are S = exp(logit_scale)."""

    formula: str
    label_smoothing: float = 0.0
    teacher_scale: float | None = None  # None: each teacher's own
    logit_scale_init: float | None = None  # None: the model's, or the checkpoint's
    logit_scale_max: float = 100.0  # 0: no limit
    pca_components: int = 32  # of the image features that the short view sees; 0: all


PRESETS = {
    # arXiv 2103.00020: symmetric cross-entropy, S = 1/0.07 to start with and at most 100
    "openclip": Recipe("1*clip@long"),
    # arXiv 2403.15378 and its code: both captions alike, smoothing 0.1, S starts at 100 and is not limited
    "longclip": Recipe("1*clip@long + 1*clip@short", 0.1, logit_scale_init=100.0, logit_scale_max=0.0),
    # JettCLIP's code (github.com/Phrandime/JettCLIP): Long-CLIP's, and relational distillation at S = 100
    "jettclip": Recipe(
        "0.8*clip@long + 0.4*clip@short + 1.5*kd@long + 0.5*kd@short",
        0.1,
        teacher_scale=100.0,
        logit_scale_init=100.0,
        logit_scale_max=0.0,
    ),
    # arXiv 2311.17049, equations 2 to 4 with lambda = 1, as for S0 to S2: summed over the real captions, which are the
    # long view, and the synthetic ones, which are the short view and paired with whole image features too
    "mobileclip-dr": Recipe("1*kd@long + 1*kd@short", pca_components=0),
}


def parse_formula(text: str) -> list[Summand]:
    """Reads the summands of a formula.

    Raises:
        ValueError: naming the summand that is not ``[weight*]term@view``, occurs twice, or weighs nothing.
    """
    summands = []
    for part in re.sub(r"\s", "", text).split("+"):
        match = _SUMMAND.fullmatch(part)
        if match is None or match["term"] not in TERMS or match["view"] not in VIEWS:
            near = difflib.get_close_matches(text.lower(), PRESETS, 1)
            raise ValueError(
                f"--loss {text!r}: {part!r} is not [weight*]term@view with a term of {', '.join(TERMS)} and a view of "
                f"{', '.join(VIEWS)}, such as 0.5*kd@short" + (f"; did you mean the preset {near[0]}?" if near else "")
            )
        summand = Summand(float(match["weight"] or 1), match["term"], match["view"])
        if summand.weight == 0:
            raise ValueError(f"--loss {text!r}: {part!r} weighs nothing; leave it out")
        summands.append(summand)
    if len({(s.term, s.view) for s in summands}) < len(summands):
        raise ValueError(f"--loss {text!r} names a term twice for one view; add up their weights")
    return summands


def find_recipe(settings: LossSettings) -> Recipe:
    """Returns the preset's recipe, or one for a formula, with what the settings change in it.

    Raises:
        ValueError: if it is neither a preset nor a formula.
    """
    loss = settings.loss or USUAL_LOSS
    recipe = PRESETS.get(loss) or Recipe(loss)
    parse_formula(recipe.formula)
    names = ("label_smoothing", "teacher_scale", "logit_scale_init", "logit_scale_max", "pca_components")
    changed = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    return recipe._replace(**changed)
