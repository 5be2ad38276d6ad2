"""Zero-shot classification of ImageNet, with OpenCLIP's class names and prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from jettclip import openclip
from jettclip.models.two_towers import TwoTowers
from jettclip.ranks import rank_and_world_size


def imagenet_folder(path: str, transform: Callable[..., Tensor]) -> ImageFolder:
    """Opens an image folder with a subfolder a class, in the order of OpenCLIP's class names.

    Raises:
        ValueError: if it has not one subfolder with images for each class.
    """
    try:
        folder = ImageFolder(path, transform=transform)
    except FileNotFoundError as error:
        raise ValueError(
            f"--imagenet-val {path} is not a folder with a subfolder of images a class: {error}"
        ) from error
    if len(folder.classes) != len(openclip.IMAGENET_CLASSNAMES):
        raise ValueError(
            f"--imagenet-val {path} has {len(folder.classes)} class folders, ImageNet has "
            f"{len(openclip.IMAGENET_CLASSNAMES)}; give the folder that holds n01440764 and the others"
        )
    return folder


@torch.no_grad()
def zero_shot_metrics(
    model: TwoTowers,
    tokenizer: Callable[..., Tensor],
    images: Dataset[Any],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Computes top-1 and top-5 accuracy; in a process group, each rank classifies a share of the images.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        images: pairs of image tensor and class index.
    """
    rank, world_size = rank_and_world_size()
    total = len(images)  # type: ignore[arg-type]
    with autocast():
        classifier = openclip.build_zero_shot_classifier(
            model, tokenizer, openclip.IMAGENET_CLASSNAMES, openclip.OPENAI_IMAGENET_TEMPLATES, 10, device
        )
    hits = torch.zeros(2, dtype=torch.float64, device=device)
    loader = DataLoader(Subset(images, range(rank, total, world_size)), batch_size, num_workers=workers)
    for batch, labels in tqdm(loader, "zero-shot", unit="batch", disable=None, leave=False):
        with autocast():
            scores = model.encode_image(batch.to(device), normalize=True).float() @ classifier.float()
        right = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels.to(device).unsqueeze(1)
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    if world_size > 1:
        dist.all_reduce(hits)
    top1, top5 = (hits / total).tolist()
    return {"imagenet-zeroshot-val-top1": top1, "imagenet-zeroshot-val-top5": top5}
