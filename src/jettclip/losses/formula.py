"""Reads a loss formula: ``0.8*clip@long + 0.4*clip@short + 1.5*kd@long``, or a preset that stands for one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from jettclip.losses.presets import PRESETS, Recipe
from jettclip.settings import USUAL_LOSS, LossSettings
from jettclip.types import VIEWS

SOFTMAX_TERMS = ("clip", "kd", "crd")
"""Terms over the same softmax of the student's similarities, which are computed together."""

DISTANCES = ("mse", "fd", "cosine")
TERMS = (*SOFTMAX_TERMS, "siglip", "icl", "gd", *DISTANCES)
PROJECTED_TERMS = {"icl", "gd", *DISTANCES}
"""Terms that compare features of student and teachers, which a projection brings together."""

SCALED_TERMS = {"kd", "crd", "gd"}
"""Terms that multiply the teachers' similarities by their scale."""

TEACHER_TERMS = ("kd", "crd", "icl", "gd", *DISTANCES)
_SUMMAND = re.compile(r"(?:(?P<weight>(?:\d+|\d*\.\d+)(?:e[+-]?\d+)?)\*)?(?P<term>[a-z_]+)@(?P<view>[a-z_]+)")
_PLUS = re.compile(r"(?<!\de)\+")  # between summands, and not of an exponent: 1e+8*gd@long


class Summand(NamedTuple):
    """A weighted term over a view."""

    weight: float
    term: str
    view: str


def parse_formula(text: str) -> list[Summand]:
    """Reads the summands of a formula.

    Raises:
        ValueError: naming the summand that is not ``[weight*]term@view``, occurs twice, or weighs nothing, or more than
            a number can hold.
    """
    summands = []
    for part in _PLUS.split(re.sub(r"\s", "", text)):
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
        if summand.weight == float("inf"):
            raise ValueError(f"--loss {text!r}: the weight of {part!r} is too large for a number; give one such as 1e8")
        summands.append(summand)
    if len({(s.term, s.view) for s in summands}) < len(summands):
        raise ValueError(f"--loss {text!r} names a term twice for one view; add up their weights")
    return summands


def find_recipe(settings: LossSettings) -> Recipe:
    """Returns the preset's recipe, or one for a formula, with what the settings change in it.

    Args:
        settings: without problems of their own.

    Raises:
        ValueError: if it is neither a preset nor a formula, or the settings contradict it.
    """
    loss = settings.loss or USUAL_LOSS
    recipe = preset_of(loss)
    if settings.distill_loss_weights:
        recipe = recipe._replace(formula=_mobileclip_formula(loss, settings.distill_loss_weights))
    if settings.pca_components is not None:
        recipe = recipe._replace(pca_variance=None)
    if settings.logit_scale_init is not None:
        recipe = recipe._replace(keeps_checkpoint_scale=False)
    changed = {name: getattr(settings, name) for name in set(Recipe._fields) & set(vars(settings))}
    recipe = recipe._replace(**{name: value for name, value in changed.items() if value not in (None, ())})
    _check(loss, recipe)
    return recipe


def preset_of(loss: str) -> Recipe:
    """Returns the preset's recipe, or a formula's: OpenCLIP's constants, with a siglip term those for ``--siglip``.

    Raises:
        ValueError: if it is neither a preset nor a formula.
    """
    if loss in PRESETS:
        return PRESETS[loss]
    has_bias = any(summand.term == "siglip" for summand in parse_formula(loss))
    return PRESETS["siglip"]._replace(formula=loss) if has_bias else Recipe(loss)


def _check(loss: str, recipe: Recipe) -> None:
    start, limit = recipe.logit_scale_init, recipe.logit_scale_max
    if start and limit and start > limit:
        raise ValueError(
            f"--loss {loss!r} would start at S = {start:g} (--logit-scale-init), above its limit {limit:g} "
            f"(--logit-scale-max); give --logit-scale-init {limit:g}, or another limit, 0 for none"
        )
    if reads_short_view(recipe) and recipe.pca_side == "text" and not recipe.has_pca:
        raise ValueError(
            f"--loss {loss!r} with --pca-side text and no principal components: the short view would be the long one "
            "once more, and no short caption read; give --pca-components 32, or --pca-side image"
        )


def _mobileclip_formula(loss: str, weights: tuple[float, ...]) -> str:
    clip, kd = weights
    if loss != "mobileclip-dr":
        raise ValueError(
            f"--distill-loss-weights {clip:g} {kd:g} belong to --loss mobileclip-dr; in --loss {loss!r} write the "
            "weights before the terms, such as 0.25*clip@long + 0.75*kd@long"
        )
    weighed = [(repr(weight).replace("e+", "e"), term) for weight, term in ((clip, "clip"), (kd, "kd")) if weight]
    return " + ".join(f"{weight}*{term}@{view}" for weight, term in weighed for view in ("long", "short"))


def check_teacher_scales(scales: tuple[float, ...], teachers: Sequence[str]) -> None:
    """Checks that there is a ``--teacher-scale`` for all teachers, or one for each.

    Raises:
        ValueError: if there are more, or less.
    """
    if len(scales) > 1 and len(scales) != len(teachers):
        count = f"{len(teachers)} teachers" if len(teachers) > 1 else "one teacher"
        raise ValueError(
            f"--teacher-scale {' '.join(f'{scale:g}' for scale in scales)} must be one for all or one for each of the "
            f"{count}, {', '.join(teachers)}"
        )


def reads_short_view(recipe: Recipe) -> bool:
    """Tells whether a term is over the short view."""
    return any(summand.view == "short" for summand in parse_formula(recipe.formula))


def views_of(recipe: Recipe) -> tuple[str, ...]:
    """Returns the captions that a recipe reads, of ``short`` and ``long``."""
    named = {recipe.caption_of(summand.view) for summand in parse_formula(recipe.formula)}
    return tuple(view for view in VIEWS if view in named)


def teacher_parts_of(recipe: Recipe) -> tuple[str, ...]:
    """Returns what a recipe needs of the teachers, of ``image``, ``short`` and ``long``."""
    named = {recipe.caption_of(one.view) for one in parse_formula(recipe.formula) if one.term in TEACHER_TERMS}
    return ("image", *(view for view in VIEWS if view in named)) if named else ()


def describe(recipe: Recipe) -> str:
    """Returns a formula, its constants, and the options that differ from their defaults, in words."""
    terms = {summand.term for summand in parse_formula(recipe.formula)}
    said = [recipe.formula]
    if "clip" in terms:
        said.append(f"label smoothing {recipe.label_smoothing:g}")
    if terms & SCALED_TERMS:
        said.append("teachers' logit scale " + (" and ".join(map("{:g}".format, recipe.teacher_scale)) or "their own"))
    start = "the model's" if recipe.logit_scale_init is None else f"{recipe.logit_scale_init:.4g}"
    checkpoints = " or the checkpoint's" if recipe.keeps_checkpoint_scale else ""
    limit = f"at most {recipe.logit_scale_max:g}" if recipe.logit_scale_max else "no limit"
    said.append(f"logit scale from {start}{checkpoints}, {limit}")
    if recipe.logit_bias_init is not None:
        said.append(f"bias from {recipe.logit_bias_init:g} or the checkpoint's")
    if reads_short_view(recipe):
        said.append(f"the short view sees {_seen(recipe)}")
    options = {
        f"clip margin {recipe.clip_margin:g}": recipe.clip_margin,
        "what shares an image or a caption is positive": recipe.multi_positive,
        "no projection to the teachers' spaces": recipe.mse_projection == "none",
        "a projection to a teacher's space only where widths differ": recipe.mse_projection == "auto",
    }
    return "; ".join([*said, *(words for words, is_on in options.items() if is_on)])


def _seen(recipe: Recipe) -> str:
    rows = "long captions" if recipe.pca_side == "text" else "images"
    if not recipe.has_pca:
        return f"whole {rows}"
    components = f"{recipe.pca_components} principal components"
    if recipe.pca_variance is not None:
        components = f"the principal components that hold {recipe.pca_variance:g} of the variance"
    scope = " of all ranks' rows" if recipe.pca_scope == "global" else ""
    return f"{rows} through {components}{scope}" + (", whose choice has no gradient" if recipe.pca_detach else "")
