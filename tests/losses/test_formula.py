from __future__ import annotations

from typing import Any

import pytest

from jettclip.losses.formula import TERMS, Summand, describe, find_recipe, parse_formula
from jettclip.losses.presets import PRESETS, Recipe
from jettclip.settings import LossSettings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clip@long", [Summand(1.0, "clip", "long")]),
        ("2*clip@short", [Summand(2.0, "clip", "short")]),
        (" .5 * kd@short+1.25*mse @ long ", [Summand(0.5, "kd", "short"), Summand(1.25, "mse", "long")]),
        ("2e-3*gd@long + 1e8*fd@long", [Summand(0.002, "gd", "long"), Summand(1e8, "fd", "long")]),
        (" + ".join(f"{term}@long" for term in TERMS), [Summand(1.0, term, "long") for term in TERMS]),
    ],
)
def test_reads_weights_terms_and_views(text: str, expected: list[Summand]) -> None:
    assert parse_formula(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1*clop@long", r"'1\*clop@long' is not .*a term of clip, kd, crd, siglip, icl, gd, mse, fd, cosine"),
        ("1*clip@wide", r"'1\*clip@wide' is not .*a view of short, long"),
        ("clip", "'clip' is not"),
        ("1*clip@long + ", "'' is not"),
        ("", "'' is not"),
        ("-1*clip@long", r"'-1\*clip@long' is not"),
        ("1*clip@long - 1*kd@long", "is not"),
        ("0*clip@long", r"'0\*clip@long' weighs nothing; leave it out"),
        ("0.0*clip@long + clip@short", "weighs nothing"),
        ("1*clip@long + 2*clip@long", "names a term twice for one view; add up their weights"),
    ],
)
def test_a_wrong_formula_is_refused_by_its_summand(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_formula(text)


@pytest.mark.parametrize(
    ("typo", "preset"),
    [("jetclip", "jettclip"), ("long-clip", "longclip"), ("OpenCLIP", "openclip"), ("mobileclip", "mobileclip-dr")],
)
def test_a_preset_with_a_typo_is_answered_with_the_near_one(typo: str, preset: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean the preset {preset}"):
        find_recipe(LossSettings(loss=typo))
    with pytest.raises(ValueError, match="such as 0.5") as unlike:
        find_recipe(LossSettings(loss="@@@"))
    assert "did you mean" not in str(unlike.value)


def test_a_formula_has_openclips_constants() -> None:
    assert find_recipe(LossSettings(loss="kd@long")) == Recipe("kd@long", 0.0, (), None, 100.0, 32, None, "image")
    assert find_recipe(LossSettings()) == PRESETS["openclip"]


@pytest.mark.parametrize(
    "changed",
    [
        {"label_smoothing": 0.0},
        {"teacher_scale": (50.0, 60.0)},
        {"logit_scale_init": 14.0},
        {"logit_scale_max": 200.0, "label_smoothing": 0.2},
        {"pca_components": 0},
        {"pca_components": 16},
        {"pca_variance": 0.8},
        {"pca_side": "text"},
    ],
)
def test_settings_override_the_presets_constants(changed: dict[str, Any]) -> None:
    for preset in ("jettclip", "mobileclip-dr"):
        assert find_recipe(LossSettings(loss=preset, **changed)) == PRESETS[preset]._replace(**changed)


def test_a_number_of_components_takes_the_place_of_a_share_of_the_variance() -> None:
    assert find_recipe(LossSettings("himo-clip", pca_components=8)).pca_variance is None
    assert find_recipe(LossSettings("himo-clip", pca_components=8)).has_pca
    assert not find_recipe(LossSettings("himo-clip", pca_components=0)).has_pca
    assert find_recipe(LossSettings("mobileclip-dr", pca_variance=0.5)).has_pca


@pytest.mark.parametrize(
    ("weights", "formula"),
    [
        ((0.25, 0.75), "0.25*clip@long + 0.25*clip@short + 0.75*kd@long + 0.75*kd@short"),
        ((0.0, 1.0), "1*kd@long + 1*kd@short"),
        ((2.0, 0.0), "2*clip@long + 2*clip@short"),
        ((1e-5, 1.0), "0.00001*clip@long + 0.00001*clip@short + kd@long + kd@short"),
    ],
)
def test_mobileclips_weights_make_its_formula(weights: tuple[float, ...], formula: str) -> None:
    recipe = find_recipe(LossSettings("mobileclip-dr", distill_loss_weights=weights))
    assert parse_formula(recipe.formula) == parse_formula(formula)
    assert recipe._replace(formula="") == PRESETS["mobileclip-dr"]._replace(formula="")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            LossSettings("kd@long", clip_margin=0.5),
            r"--clip-margin 0.5 is for the clip term, .*'kd@long' does not have",
        ),
        (LossSettings("siglip", clip_margin=0.5), "leave it out, or add 1.clip@long"),
        (
            LossSettings("kd@long", multi_positive=True),
            "--multi-positive is for the clip and siglip terms, .* has neither",
        ),
        (
            LossSettings("jettclip", distill_loss_weights=(0.0, 1.0)),
            "--distill-loss-weights 0 1 belong to --loss mobileclip-dr; in --loss 'jettclip' write the weights",
        ),
    ],
)
def test_settings_of_a_term_that_is_not_there_are_refused(settings: LossSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_recipe(settings)


def test_several_scales_are_described() -> None:
    assert "teachers' logit scale 70 and 60;" in describe(Recipe("crd@short", teacher_scale=(70.0, 60.0)))
    assert "label smoothing" not in describe(Recipe("kd@long"))
    assert "short view" not in describe(Recipe("kd@long"))
    assert "the short view sees long captions through 5 principal components" in describe(
        Recipe("clip@short", pca_components=5, pca_side="text")
    )
