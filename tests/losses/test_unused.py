from __future__ import annotations

from typing import Any

import pytest

from jettclip.losses.presets import PRESETS
from jettclip.losses.unused import find_unused
from jettclip.settings import LossSettings


@pytest.mark.parametrize(
    ("loss", "changed", "message"),
    [
        ("siglip", {"label_smoothing": 0.1}, "--label-smoothing 0.1 is for the clip term"),
        ("kd@long", {"clip_margin": 0.5}, "--clip-margin 0.5 is for the clip term"),
        ("kd@long", {"multi_positive": True}, "--multi-positive is for the clip and siglip terms"),
        ("openclip", {"teacher_scale": (70.0, 60.0)}, "--teacher-scale 70 60 is for the crd, gd and kd terms"),
        ("mse@long", {"teacher_scale": (70.0,)}, "--teacher-scale 70 is for the crd, gd and kd terms"),
        ("jettclip", {"mse_projection": "none"}, "--mse-projection none is for the cosine, fd, gd, icl and mse terms"),
        ("clip@long", {"pca_components": 8}, "--pca-components 8 is for the short view"),
        ("clip@long", {"pca_variance": 0.8}, "--pca-variance 0.8 is for the short view"),
        ("clip@long", {"pca_side": "text"}, "--pca-side text is for the short view"),
        ("clip@long", {"pca_scope": "global"}, "--pca-scope global is for the short view"),
        ("clip@long", {"pca_detach": True}, "--pca-detach is for the short view"),
        ("mobileclip-dr", {"pca_scope": "global"}, "--pca-scope global is for the short view's principal components"),
        ("mobileclip-dr", {"pca_detach": True}, "--pca-detach is for the short view's principal components"),
    ],
)
def test_a_setting_that_nothing_reads_is_named_with_its_remedy(
    loss: str, changed: dict[str, Any], message: str
) -> None:
    (said,) = find_unused(LossSettings(loss, **changed))
    what, remedy = said.split("; ")
    assert what == f"{message}, which --loss {loss!r} does not have"
    assert remedy.startswith("leave it out, or ")
    addition = remedy.removeprefix("leave it out, or ")
    if addition.startswith("add "):
        remedied = LossSettings(f"{loss if '@' in loss else PRESETS[loss].formula} + {addition.split()[1]}", **changed)
    else:
        assert addition == "give --pca-components 32"
        remedied = LossSettings(loss, pca_components=32, **changed)
    assert find_unused(remedied) == []


def test_all_of_them_are_named() -> None:
    settings = LossSettings("siglip", label_smoothing=0.1, clip_margin=0.1, pca_detach=True)
    flags = {message.split()[0] for message in find_unused(settings)}
    assert flags == {"--label-smoothing", "--clip-margin", "--pca-detach"}


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("siglip", {"label_smoothing": 0.0, "pca_components": 32, "mse_projection": "linear", "pca_side": "image"}),
        ("siglip", {"multi_positive": True}),
        ("mobileclip-dr", {"pca_components": 32, "pca_scope": "global"}),
        ("mobileclip-dr", {"pca_variance": 0.9, "pca_detach": True}),
        ("mobileclip-dr", {"distill_loss_weights": (0.25, 0.75), "clip_margin": 0.5}),
        ("longclip", {"pca_components": 0}),
        ("openclip", {"pca_components": 0}),
        ("himo-clip", {"pca_components": 0, "pca_side": "image"}),
        ("himo-clip", {"pca_components": 8, "pca_scope": "global"}),
        ("clip-kd", {"mse_projection": "linear", "teacher_scale": (50.0,)}),
        ("gd@long", {"mse_projection": "none", "teacher_scale": (50.0,)}),
        *((preset, {}) for preset in PRESETS),
    ],
)
def test_what_is_read_or_changes_nothing_is_left_alone(loss: str, settings: dict[str, Any]) -> None:
    assert find_unused(LossSettings(loss, **settings)) == []
