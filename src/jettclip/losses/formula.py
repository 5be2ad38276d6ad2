"""Reads a loss formula: ``0.8*clip@long + 0.4*clip@short + 1.5*kd@long``, or a preset that stands for one."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from jettclip.losses.presets import PRESETS, Recipe
from jettclip.settings import USUAL_LOSS, LossSettings
from jettclip.types import VIEWS

SOFTMAX_TERMS = ("clip", "kd", "crd")
"""Terms over the same softmax of the student's similarities, which are computed together."""

DISTANCES = ("mse", "fd", "cosine")
TERMS = (*SOFTMAX_TERMS, "siglip", "icl", "gd", *DISTANCES)
TEACHER_TERMS = ("kd", "crd", "icl", "gd", *DISTANCES)
_SUMMAND = re.compile(r"(?:(?P<weight>(?:\d+|\d*\.\d+)(?:e-?\d+)?)\*)?(?P<term>[a-z_]+)@(?P<view>[a-z_]+)")


class Summand(NamedTuple):
    """A weighted term over a view."""

    weight: float
    term: str
    view: str


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
        ValueError: if it is neither a preset nor a formula, or the settings are for a term that it does not have.
    """
    loss = settings.loss or USUAL_LOSS
    recipe = PRESETS.get(loss) or Recipe(loss)
    if settings.distill_loss_weights:
        recipe = recipe._replace(formula=_mobileclip_formula(loss, settings.distill_loss_weights))
    terms = {summand.term for summand in parse_formula(recipe.formula)}
    if settings.clip_margin and "clip" not in terms:
        raise ValueError(
            f"--clip-margin {settings.clip_margin:g} is for the clip term, which --loss {loss!r} does not have; "
            "leave it out, or add 1*clip@long"
        )
    if settings.multi_positive and not terms & {"clip", "siglip"}:
        raise ValueError(
            f"--multi-positive is for the clip and siglip terms, and --loss {loss!r} has neither; "
            "leave it out, or add 1*clip@long"
        )
    if settings.pca_components is not None:
        recipe = recipe._replace(pca_variance=None)
    names = [name for name in Recipe._fields if name != "formula"]
    changed = {name: getattr(settings, name) for name in names if getattr(settings, name) not in (None, ())}
    return recipe._replace(**changed)


def _mobileclip_formula(loss: str, weights: tuple[float, ...]) -> str:
    clip, kd = weights
    if loss != "mobileclip-dr":
        raise ValueError(
            f"--distill-loss-weights {clip:g} {kd:g} belong to --loss mobileclip-dr; in --loss {loss!r} write the "
            "weights before the terms, such as 0.25*clip@long + 0.75*kd@long"
        )
    weighed = [(weight, term) for weight, term in ((clip, "clip"), (kd, "kd")) if weight]
    return " + ".join(f"{weight!r}*{term}@{view}" for weight, term in weighed for view in ("long", "short"))


def views_of(recipe: Recipe) -> tuple[str, ...]:
    """Returns the captions that a recipe reads, of ``short`` and ``long``."""
    named = {recipe.caption_of(summand.view) for summand in parse_formula(recipe.formula)}
    return tuple(view for view in VIEWS if view in named)


def teacher_parts_of(recipe: Recipe) -> tuple[str, ...]:
    """Returns what a recipe needs of the teachers, of ``image``, ``short`` and ``long``."""
    named = {recipe.caption_of(one.view) for one in parse_formula(recipe.formula) if one.term in TEACHER_TERMS}
    return ("image", *(view for view in VIEWS if view in named)) if named else ()


def describe(recipe: Recipe) -> str:
    """Returns a formula and its constants in words."""
    summands = parse_formula(recipe.formula)
    terms = {summand.term for summand in summands}
    said = [recipe.formula]
    if "clip" in terms:
        said.append(f"label smoothing {recipe.label_smoothing:g}")
    if terms & {"kd", "crd", "gd"}:
        said.append("teachers' logit scale " + (" and ".join(map("{:g}".format, recipe.teacher_scale)) or "their own"))
    start = "the model's" if recipe.logit_scale_init is None else f"{recipe.logit_scale_init:.4g}"
    limit = f"at most {recipe.logit_scale_max:g}" if recipe.logit_scale_max else "no limit"
    said.append(f"logit scale from {start}, {limit}")
    if any(summand.view == "short" for summand in summands):
        said.append(f"the short view sees {_seen(recipe)}")
    return "; ".join(said)


def _seen(recipe: Recipe) -> str:
    rows = "long captions" if recipe.pca_side == "text" else "images"
    if recipe.pca_variance is not None:
        return f"{rows} through the principal components that hold {recipe.pca_variance:g} of the variance"
    return f"{rows} through {recipe.pca_components} principal components" if recipe.pca_components else f"whole {rows}"
