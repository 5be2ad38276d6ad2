from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from jettclip.engine.base import Student
from jettclip.engine.optimizer import create_optimizer, optimizer_options, parameter_groups
from jettclip.losses.factory import create_loss
from jettclip.models.config import FOLDER
from jettclip.models.factory import create_model
from jettclip.settings import LossSettings
from jettclip.types import TeacherInfo
from support import tiny_towers

CONFIGS = sorted(path.stem for path in FOLDER.glob("*.json"))
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def student_of(name: str) -> Student:
    with torch.device("meta"):  # names and shapes are enough, and weights take their time
        model = create_model(name, device="meta")
    loss = create_loss(LossSettings("clip@long + mse@long"), model.embed_dim, [TeacherInfo("teacher", 8, 100.0)])
    return Student(model, loss)


def tiny_student() -> Student:
    towers = tiny_towers()
    return Student(towers, create_loss(LossSettings("clip@long"), towers.embed_dim))


def names_of(student: Student, group: dict[str, list[nn.Parameter]]) -> list[str]:
    names = {parameter: name for name, parameter in student.named_parameters()}
    return [names[parameter] for parameter in group["params"]]


def to_be_spared(student: Student) -> Iterator[str]:
    for name, _ in student.named_parameters():
        owner, _, leaf = name.rpartition(".")
        is_token_or_position = leaf in ("positional_embedding", "class_embedding", "pos_embed", "cls_token")
        is_bias, is_layer_scale = leaf.endswith("bias"), leaf in ("gamma", "scale")
        is_norm = isinstance(student.get_submodule(owner), NORMS)
        if is_bias or is_layer_scale or is_norm or is_token_or_position or leaf == "logit_scale":
            yield name


@pytest.mark.parametrize("name", [*CONFIGS, "ViT-B-32", "convnext_base"])
def test_only_weights_of_layers_decay(name: str) -> None:
    student = student_of(name)
    undecayed, decayed = parameter_groups(student, 0.2)
    assert (undecayed["weight_decay"], decayed["weight_decay"]) == (0.0, 0.2)
    spared, rest = names_of(student, undecayed), names_of(student, decayed)
    assert len(set(spared + rest)) == len(spared + rest) == len(list(student.parameters()))
    assert set(spared) == set(to_be_spared(student))
    first = "projection" if name.startswith("LLM2CLIP") else "token_embedding"  # an adapter has no tokens
    assert "towers.logit_scale" in spared
    assert {f"towers.text.{first}.weight", "loss.terms.mse.image_projections.0.weight"} <= set(rest)
    assert ("towers.text.positional_embedding" in spared) == (first == "token_embedding")


def test_fastvits_layer_scales_which_look_like_weights_do_not_decay() -> None:
    student = student_of("MobileCLIP2-S0-248")
    scales = [name for name, p in student.named_parameters() if name.endswith("gamma") and p.ndim == 3]
    assert len(scales) > 10
    assert set(scales) <= set(names_of(student, parameter_groups(student, 0.2)[0]))


def test_frozen_parameters_are_left_out() -> None:
    student = tiny_student()
    student.towers.text.requires_grad_(False)
    undecayed, decayed = parameter_groups(student, 0.2)
    assert names_of(student, undecayed) == ["towers.logit_scale", "towers.visual.2.bias"]
    assert names_of(student, decayed) == ["towers.visual.2.weight"]


def test_adamw_is_torchs_with_the_given_options() -> None:
    optimizer = create_optimizer(tiny_student(), "adamw", lr=3e-4, weight_decay=0.2, beta1=0.9, beta2=0.98, eps=1e-6)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.9, 0.98), 1e-6)
    defaults = create_optimizer(tiny_student(), "adamw", lr=1e-3, weight_decay=0.0).param_groups[0]
    assert (defaults["betas"], defaults["eps"]) == ((0.9, 0.999), 1e-8)


@pytest.mark.parametrize(
    ("name", "cls", "given", "expected"),
    [
        ("timm/sgd", "SGD", {"momentum": 0.5}, {"momentum": 0.5}),
        ("timm/lion", "Lion", {"beta1": 0.8, "beta2": 0.9}, {"betas": (0.8, 0.9)}),
        ("timm/AdamW", "AdamW", {"beta1": 0.8, "beta2": 0.9, "eps": 1e-5}, {"betas": (0.8, 0.9), "eps": 1e-5}),
        ("AdamW", "AdamW", {"eps": 1e-5}, {"eps": 1e-5}),  # OpenCLIP takes any case
    ],
)
def test_optimizers_go_by_their_names(
    name: str, cls: str, given: dict[str, float], expected: dict[str, object]
) -> None:
    optimizer = create_optimizer(tiny_student(), name, lr=3e-4, weight_decay=0.2, **given)
    assert type(optimizer).__name__ == cls
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2]
    for group in optimizer.param_groups:
        assert group["lr"] == 3e-4
        assert expected.items() <= group.items()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("adamw", {"momentum": 0.9}, "--opt adamw has no --momentum; leave out"),
        ("timm/adamw", {"momentum": 0.9}, "--opt timm/adamw has no --momentum; leave out"),
        ("timm/sgd", {"eps": 1e-6}, "has no --eps;"),
        ("timm/lion", {"eps": 1e-6, "beta1": 0.9, "beta2": 0.98}, "has no --eps;"),
        ("timm/sgd", {"beta1": 0.9, "beta2": 0.98}, "has no --beta1 and no --beta2;"),
        ("timm/adan", {"beta1": 0.9, "beta2": 0.98}, "has no --beta1 and no --beta2;"),  # it has three
        ("timm/adamw", {"beta2": 0.98}, "--beta1 None and --beta2 0.98 go together; give both"),
        ("timm/lion", {"beta1": 0.9}, "--beta1 0.9 and --beta2 None go together; give both"),
        ("lion", {}, "--opt 'lion' is not known; give adamw, or timm/NAME such as timm/lion"),
        ("timm/adamv", {}, "--opt timm/adamv: .*not found.*; use adamw, or timm/ with one of"),
    ],
)
def test_what_an_optimizer_would_ignore_is_refused(name: str, given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_options(name, **given)
    with pytest.raises(ValueError, match=message):
        create_optimizer(tiny_student(), name, lr=1e-3, weight_decay=0.0, **given)


def test_options_that_are_not_given_are_the_optimizers_own() -> None:
    for name in ("adamw", "timm/sgd", "timm/lion", "timm/adan", "timm/lookahead_adamw"):
        assert optimizer_options(name) == {}
