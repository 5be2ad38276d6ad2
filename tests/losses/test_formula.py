from __future__ import annotations

import pytest

from jettclip.losses.formula import PRESETS, Recipe, Summand, find_recipe, parse_formula
from jettclip.settings import LossSettings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clip@long", [Summand(1.0, "clip", "long")]),
        ("2*clip@short", [Summand(2.0, "clip", "short")]),
        (" .5 * kd@short+1.25*mse @ long ", [Summand(0.5, "kd", "short"), Summand(1.25, "mse", "long")]),
    ],
)
def test_reads_weights_terms_and_views(text: str, expected: list[Summand]) -> None:
    assert parse_formula(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1*clop@long", r"'1\*clop@long' is not .*a term of clip, kd, mse"),
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


def test_presets_have_their_published_constants() -> None:
    # arXiv 2103.00020, section 2.5; arXiv 2403.15378 and github.com/beichenzbc/Long-CLIP; github.com/Phrandime/JettCLIP
    assert find_recipe(LossSettings(loss="openclip")) == Recipe("1*clip@long", 0.0, None, None, 100.0)
    assert find_recipe(LossSettings(loss="longclip")) == Recipe("1*clip@long + 1*clip@short", 0.1, None, 100.0, 0.0)
    assert find_recipe(LossSettings(loss="jettclip")) == Recipe(
        "0.8*clip@long + 0.4*clip@short + 1.5*kd@long + 0.5*kd@short", 0.1, 100.0, 100.0, 0.0
    )
    # arXiv 2311.17049, section 4.2: lambda = 1; its code (github.com/apple/ml-mobileclip) has no principal components
    assert find_recipe(LossSettings(loss="mobileclip-dr")) == Recipe(
        "1*kd@long + 1*kd@short", 0.0, None, None, 100.0, pca_components=0
    )
    assert {name for name, recipe in PRESETS.items() if recipe.pca_components != 32} == {"mobileclip-dr"}
    assert find_recipe(LossSettings()) == PRESETS["openclip"]
    for recipe in PRESETS.values():
        assert parse_formula(recipe.formula)


def test_a_formula_has_openclips_constants() -> None:
    assert find_recipe(LossSettings(loss="kd@long")) == Recipe("kd@long", 0.0, None, None, 100.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"label_smoothing": 0.0},
        {"teacher_scale": 50.0},
        {"logit_scale_init": 14.0},
        {"logit_scale_max": 200.0, "label_smoothing": 0.2},
        {"pca_components": 0},
        {"pca_components": 16},
    ],
)
def test_settings_override_the_presets_constants(changed: dict[str, float]) -> None:
    for preset in ("jettclip", "mobileclip-dr"):
        assert find_recipe(LossSettings(loss=preset, **changed)) == PRESETS[preset]._replace(**changed)
