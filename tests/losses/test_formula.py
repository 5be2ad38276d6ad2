from __future__ import annotations

from typing import Any

import pytest

from jettclip.losses.formula import TERMS, Summand, check_teacher_scales, describe, find_recipe, parse_formula
from jettclip.losses.presets import PRESETS, Recipe
from jettclip.settings import LossSettings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clip@long", [Summand(1.0, "clip", "long")]),
        ("2*clip@short", [Summand(2.0, "clip", "short")]),
        (" .5 * kd@short+1.25*mse @ long ", [Summand(0.5, "kd", "short"), Summand(1.25, "mse", "long")]),
        ("2e-3*gd@long + 1e8*fd@long", [Summand(0.002, "gd", "long"), Summand(1e8, "fd", "long")]),
        ("1e+8*gd@long+1.5e+02*fd@long", [Summand(1e8, "gd", "long"), Summand(150.0, "fd", "long")]),
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
        ("1e-400*clip@long", "weighs nothing"),
        (
            "clip@long + 1e400*kd@long",
            r"the weight of '1e400\*kd@long' is too large for a number; give one such as 1e8",
        ),
        ("1e+*clip@long", r"'1e\+\*clip@long' is not"),
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
        {"pca_scope": "global", "pca_detach": True, "clip_margin": 0.5, "multi_positive": True},
        {"mse_projection": "none"},
        {"pca_components": 0},
        {"pca_components": 16},
        {"pca_variance": 0.8},
        {"pca_side": "text"},
    ],
)
def test_settings_override_the_presets_constants(changed: dict[str, Any]) -> None:
    for preset in ("jettclip", "debias"):
        assert find_recipe(LossSettings(loss=preset, **changed)) == PRESETS[preset]._replace(**changed)


def test_a_number_of_components_takes_the_place_of_a_share_of_the_variance() -> None:
    assert find_recipe(LossSettings("himo-clip", pca_components=8)).pca_variance is None
    assert find_recipe(LossSettings("himo-clip", pca_components=8)).has_pca
    assert not find_recipe(LossSettings("himo-clip", pca_components=0, pca_side="image")).has_pca
    assert find_recipe(LossSettings("mobileclip-dr", pca_variance=0.5)).has_pca


@pytest.mark.parametrize(
    ("weights", "formula"),
    [
        ((0.25, 0.75), "0.25*clip@long + 0.25*clip@short + 0.75*kd@long + 0.75*kd@short"),
        ((0.0, 1.0), "1*kd@long + 1*kd@short"),
        ((2.0, 0.0), "2*clip@long + 2*clip@short"),
        ((1e20, 1e-7), "1e20*clip@long + 1e20*clip@short + 1e-7*kd@long + 1e-7*kd@short"),
        ((1e-5, 1.0), "0.00001*clip@long + 0.00001*clip@short + kd@long + kd@short"),
    ],
)
def test_mobileclips_weights_make_its_formula(weights: tuple[float, ...], formula: str) -> None:
    recipe = find_recipe(LossSettings("mobileclip-dr", distill_loss_weights=weights))
    assert parse_formula(recipe.formula) == parse_formula(formula)
    assert "e+" not in recipe.formula
    assert recipe._replace(formula="") == PRESETS["mobileclip-dr"]._replace(formula="")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            LossSettings("jettclip", distill_loss_weights=(0.0, 1.0)),
            "--distill-loss-weights 0 1 belong to --loss mobileclip-dr; in --loss 'jettclip' write the weights",
        ),
        (LossSettings("longclip", pca_side="text", pca_components=0), "no short caption read; give --pca-components"),
        (LossSettings("mobileclip-dr", pca_side="text"), "the short view would be the long one once more"),
        (LossSettings("himo-clip", pca_components=0), "'himo-clip' with --pca-side text and no principal components"),
        (
            LossSettings("openclip", logit_scale_init=200.0),
            "'openclip' would start at S = 200 .*, above its limit 100 .*; give --logit-scale-init 100, or another",
        ),
        (LossSettings("jettclip", logit_scale_max=50.0), "'jettclip' would start at S = 100 .* above its limit 50 "),
    ],
)
def test_settings_that_contradict_the_loss_are_refused(settings: LossSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_recipe(settings)


def test_a_scale_may_start_anywhere_below_its_limit() -> None:
    assert find_recipe(LossSettings("jettclip", logit_scale_init=1000.0)).logit_scale_init == 1000
    assert find_recipe(LossSettings("openclip", logit_scale_init=200.0, logit_scale_max=200.0)).logit_scale_max == 200


def test_a_formula_with_a_siglip_term_starts_as_siglip_does() -> None:
    formula = "1*siglip@long + 1*kd@long"
    assert find_recipe(LossSettings(formula)) == PRESETS["siglip"]._replace(formula=formula)


@pytest.mark.parametrize("preset", ["siglip", "clip-kd"])
def test_a_scale_that_is_asked_for_goes_before_the_checkpoints(preset: str) -> None:
    assert find_recipe(LossSettings(preset)).keeps_checkpoint_scale
    assert not find_recipe(LossSettings(preset, logit_scale_init=20.0)).keeps_checkpoint_scale


def test_teachers_scales_are_one_or_as_many() -> None:
    for scales in ((), (50.0,), (50.0, 60.0)):
        check_teacher_scales(scales, ["a", "b"])
    with pytest.raises(ValueError, match="--teacher-scale 1 2 3 must be one for all or one for each of the 2 teachers"):
        check_teacher_scales((1.0, 2.0, 3.0), ["a", "b"])
    with pytest.raises(ValueError, match="--teacher-scale 1 2 must be .* the one teacher, a"):
        check_teacher_scales((1.0, 2.0), ["a"])


def test_several_scales_are_described() -> None:
    assert "teachers' logit scale 70 and 60;" in describe(Recipe("crd@short", teacher_scale=(70.0, 60.0)))
    assert "label smoothing" not in describe(Recipe("kd@long"))
    assert "short view" not in describe(Recipe("kd@long"))
    assert "the short view sees long captions through 5 principal components" in describe(
        Recipe("clip@short", pca_components=5, pca_side="text")
    )


def test_options_are_described_where_they_differ_from_their_defaults() -> None:
    settings = LossSettings(
        "1*clip@short + 1*mse@long",
        pca_detach=True,
        pca_scope="global",
        mse_projection="none",
        clip_margin=0.25,
        multi_positive=True,
    )
    assert describe(find_recipe(settings)) == (
        "1*clip@short + 1*mse@long; label smoothing 0; logit scale from the model's, at most 100; the short view sees "
        "images through 32 principal components of all ranks' rows, whose choice has no gradient; clip margin 0.25; "
        "what shares an image or a caption is positive; no projection to the teachers' spaces"
    )
