from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import get_tokenizer
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from jettclip import openclip
from jettclip.evaluate.zero_shot import imagenet_folder, zero_shot_metrics
from support import run_ranks, tiny_towers

COLOURS = ("red", "green", "blue", "yellow", "gray", "white", "black")


@pytest.fixture(params=[2, 7])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes an image folder of a few classes, and OpenCLIP's ImageNet of as many."""
    classes = COLOURS[: request.param]
    for index, colour in enumerate(classes):
        (tmp_path / f"n{index:03d}").mkdir()
        for number in range(index % 3 + 1):  # classes of uneven size
            picture = Image.effect_noise((16, 16), 20 + number).convert("RGB")
            Image.blend(picture, Image.new("RGB", (16, 16), colour), 0.5).save(tmp_path / f"n{index:03d}/{number}.png")
    monkeypatch.setattr(openclip, "IMAGENET_CLASSNAMES", list(classes))
    monkeypatch.setattr(openclip, "OPENAI_IMAGENET_TEMPLATES", ["a {} picture", "something {}"])
    return tmp_path


def uint8(image: Image.Image) -> Tensor:
    return pil_to_tensor(image.convert("RGB"))


def measure(folder: Path, **options: Any) -> dict[str, float]:
    torch.manual_seed(0)
    return zero_shot_metrics(
        tiny_towers().eval(),
        get_tokenizer("ViT-B-32", context_length=32),
        imagenet_folder(str(folder), uint8),
        **{
            "batch_size": 3,
            "workers": 0,
            "device": torch.device("cpu"),
            "autocast": nullcontext,
            **options,
        },
    )


@torch.no_grad()
def accuracy_by_hand(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    model, tokenizer = tiny_towers().eval(), get_tokenizer("ViT-B-32", context_length=32)
    prompts = [
        [template.format(c) for template in ("a {} picture", "something {}")] for c in openclip.IMAGENET_CLASSNAMES
    ]
    weights = torch.stack([model.encode_text(tokenizer(texts), normalize=True).mean(dim=0) for texts in prompts])
    weights /= weights.norm(dim=1, keepdim=True)
    top1, top5 = [], []
    for path in sorted(folder.glob("*/*.png")):
        scores = weights @ model.encode_image(uint8(Image.open(path)).unsqueeze(0), normalize=True)[0]
        order = scores.argsort(descending=True).tolist()
        label = int(path.parent.name[1:])
        top1.append(order[0] == label)
        top5.append(label in order[:5])
    return {
        "imagenet-zeroshot-val-top1": sum(top1) / len(top1),
        "imagenet-zeroshot-val-top5": sum(top5) / len(top5),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_classification_by_hand(folder: Path, batch_size: int) -> None:
    assert measure(folder, batch_size=batch_size) == pytest.approx(accuracy_by_hand(folder))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same(folder: Path, ranks: int) -> None:
    alone = measure(folder)
    for metrics in run_ranks(ranks, measure, folder):
        assert metrics == pytest.approx(alone)


def test_half_precision_is_compared_in_full(folder: Path) -> None:
    metrics = measure(folder, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert all(0 <= value <= 1 for value in metrics.values())


def test_a_folder_of_other_classes_is_refused(folder: Path) -> None:
    count = len(openclip.IMAGENET_CLASSNAMES)
    (folder / "n999").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "n999/0.png")
    with pytest.raises(ValueError, match=f"has {count + 1} class folders, ImageNet has {count}"):
        imagenet_folder(str(folder), uint8)


@pytest.mark.parametrize("content", [None, "", "n000"])
def test_a_folder_without_images_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "val"
    if content is not None:
        (path / content).mkdir(parents=True)
    with pytest.raises(ValueError, match="is not a folder with a subfolder of images a class"):
        imagenet_folder(str(path), uint8)
