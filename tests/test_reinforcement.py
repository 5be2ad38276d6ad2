"""Samples that carry teachers' features and augmentations, as DataCompDR's do, from the shards to the metrics."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, Compose, InterpolationMode, PILToTensor, RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from jettclip.data.augmentation import OPERATIONS, draw, dump, parse
from jettclip.data.pipeline import get_wds_dataset
from jettclip.main import main
from jettclip.report import METRICS, read_metrics
from jettclip.settings import DataSettings
from jettclip.types import Batch, BatchInfo
from support import sample, write_shard

pytestmark = pytest.mark.usefixtures("restored_logging")

SIZE = (40, 48)  # height and width of the pictures
AUGMENTATIONS, SYNTHETIC, WIDTHS = 4, 2, (6, 10)


def photograph(number: int) -> bytes:
    generator = np.random.default_rng(number)
    small = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize(SIZE[::-1], Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def arrays(number: int) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(number + 1000)
    rows = {"image_emb": AUGMENTATIONS, "text_emb": 1 + SYNTHETIC}
    return {name: generator.standard_normal((count, sum(WIDTHS)), dtype=np.float32) for name, count in rows.items()}


def augmentations(number: int) -> str:
    return dump([draw(SIZE, random.Random(f"{number} {i}"), crop_size=(32, 32)) for i in range(AUGMENTATIONS)])


def reinforced(number: int) -> dict[str, Any]:
    npz = io.BytesIO()
    np.savez(npz, **arrays(number))  # type: ignore[arg-type]
    members = {
        "png": photograph(number), "txt": f"real {number}", "json": {"uid": f"{number}"}, "npz": npz.getvalue(),
        "syn.json": {"syn_text": [f"synthetic {number} {i}" for i in range(SYNTHETIC)]},
        "paug.json": {"param_aug": augmentations(number)},
    }  # fmt: skip
    return sample(number, **members)


def write_data(folder: Path, count: int = 16) -> str:
    write_shard(folder / "000000.tar", [reinforced(number) for number in range(count)])
    return str(folder / "000000.tar")


def read(url: str, epoch: int, **settings: Any) -> list[tuple[Batch, BatchInfo]]:
    mixed = settings.get("dataset_reinforcement_mix_synthetic", False)
    views = ("long",) if mixed else ("short", "long")
    loader = get_wds_dataset(
        DataSettings(dataset_reinforcement=True, distill_teacher_dimension=WIDTHS, **settings),
        url,
        Compose([RandomResizedCrop(32, interpolation=InterpolationMode.BICUBIC), PILToTensor()]),
        lambda text: torch.tensor([[ord(letter) for letter in text.ljust(20)]]),
        is_train=True,
        batch_size=8,
        views=views,
        teacher_parts=("image", *views),
    )
    loader.set_epoch(epoch)
    return [(batch, loader.last_info) for batch in loader]


def text_of(ids: Tensor) -> str:
    return "".join(chr(number) for number in ids.tolist()).strip()


def row_number(rows: np.ndarray[Any, Any], row: Tensor) -> int:
    (found,) = np.flatnonzero((rows == row.numpy()).all(axis=1))
    return int(found)


def replayed(number: int, which: int) -> Tensor:
    """Shows a picture under one of its augmentations, by torchvision's functions for PIL images."""
    augmentation = parse(augmentations(number))[which]
    image = Image.open(io.BytesIO(photograph(number))).convert("RGB")
    view = F.resized_crop(image, *augmentation.box, [32, 32], InterpolationMode.BICUBIC)
    for operation in augmentation.operations:
        if operation:
            view = _apply_op(view, OPERATIONS[operation[0]], operation[1], InterpolationMode.NEAREST, None)
    return F.pil_to_tensor(view)


def test_image_captions_and_features_belong_together(tmp_path: Path) -> None:
    url, seen, texts = write_data(tmp_path), set(), set()
    for epoch in range(6):
        for batch, info in read(url, epoch, image_decoder="pillow"):
            assert batch.teacher is not None
            assert info.dropped == {}
            for index, key in enumerate(info.keys):
                number = int(key)
                which = row_number(arrays(number)["image_emb"], batch.teacher.image[index])  # type: ignore[index]
                assert torch.equal(batch.image[index], replayed(number, which))
                assert text_of(batch.long_caption[index]) == f"real {number}"  # type: ignore[index]
                assert row_number(arrays(number)["text_emb"], batch.teacher.long[index]) == 0  # type: ignore[index]
                synthetic = row_number(arrays(number)["text_emb"], batch.teacher.short[index])  # type: ignore[index]
                text = text_of(batch.short_caption[index])  # type: ignore[index]
                assert text == f"synthetic {number} {synthetic - 1}"
                seen.add(which)
                texts.add(synthetic)
    assert seen == set(range(AUGMENTATIONS))
    assert texts == {1, 2}


def test_augmentations_are_taken_in_turn_on_request(tmp_path: Path) -> None:
    url = write_data(tmp_path)
    for epoch in range(5):
        for batch, info in read(url, epoch, dataset_reinforcement_sample_sequential=True):
            for index, key in enumerate(info.keys):
                rows = arrays(int(key))["image_emb"]
                assert row_number(rows, batch.teacher.image[index]) == epoch % AUGMENTATIONS  # type: ignore


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_synthetic_captions_take_the_place_of_real_ones_with_their_features(ratio: float, tmp_path: Path) -> None:
    url, synthetic = write_data(tmp_path), []
    mix = {"dataset_reinforcement_mix_synthetic": True, "dataset_reinforcement_mix_synthetic_ratio": ratio}
    for epoch in range(4):
        for batch, info in read(url, epoch, **mix):
            for index, key in enumerate(info.keys):
                row = row_number(arrays(int(key))["text_emb"], batch.teacher.long[index])  # type: ignore
                wanted = f"synthetic {int(key)} {row - 1}" if row else f"real {int(key)}"
                assert text_of(batch.long_caption[index]) == wanted  # type: ignore[index]
                synthetic.append(row > 0)
    share = sum(synthetic) / len(synthetic)
    assert share == ratio if ratio in (0, 1) else 0.3 < share < 0.7


def test_an_image_of_another_size_is_a_counted_drop(tmp_path: Path) -> None:
    wrong = reinforced(3)
    smaller = io.BytesIO()
    Image.open(io.BytesIO(wrong["png"])).resize((24, 20)).save(smaller, "PNG")
    wrong["png"] = smaller.getvalue()
    url = write_shard(tmp_path / "0.tar", [wrong if number == 3 else reinforced(number) for number in range(16)])
    batches = read(url, 0, max_drop_rate=0.5)
    assert "000003" not in [key for _, info in batches for key in info.keys]
    reasons = [reason for _, info in batches for reason in info.dropped]
    assert set(reasons) == {"image is of another size than its stored augmentation was drawn for"}


def test_a_run_distils_from_them_by_the_preset(tmp_path: Path) -> None:
    given = {
        "train-data": write_data(tmp_path), "model": "Nano-248", "device": "cpu", "precision": "fp32", "workers": 0,
        "batch-size": 8, "epochs": 2, "lr": 1e-3, "warmup": 1, "log-every-n-steps": 1, "logs": tmp_path / "logs",
        "name": "dr",
    }  # fmt: skip
    argv = [f"--{flag}={value}" for flag, value in given.items()]
    argv += ["--dataset-reinforcement", "--distill-teacher-dimension", "6", "10", "--distill-logit-scale", "50", "60"]
    assert main(argv) == 0
    lines = [line for line in read_metrics(tmp_path / "logs" / "dr" / METRICS) if line["kind"] == "train"]
    assert len(lines) == 4
    assert all(line["loss"] == pytest.approx(line["kd@long"] + line["kd@short"], rel=1e-5) for line in lines)
    config = json.dumps((tmp_path / "logs" / "dr" / "config.yaml").read_text())
    assert "mobileclip-dr" in config


def test_an_image_that_its_camera_turned_is_a_counted_drop(tmp_path: Path) -> None:
    turned = reinforced(3)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, so that the size is the same
    stream = io.BytesIO()
    Image.open(io.BytesIO(turned["png"])).save(stream, "PNG", exif=exif)
    turned["png"] = stream.getvalue()
    url = write_shard(tmp_path / "0.tar", [turned if number == 3 else reinforced(number) for number in range(16)])
    reasons = [reason for _, info in read(url, 0, max_drop_rate=0.5) for reason in info.dropped]
    assert set(reasons) == {"image is turned, and its stored augmentations were drawn for it as it lies"}


def test_a_transform_that_does_more_than_crop_is_refused(tmp_path: Path) -> None:
    transform = Compose([RandomResizedCrop(32), ColorJitter(0.4), PILToTensor()])
    with pytest.raises(ValueError, match=r"stored augmentations take the place .* ColorJitter.*leave that out"):
        get_wds_dataset(
            DataSettings(dataset_reinforcement=True, distill_teacher_dimension=WIDTHS),
            write_data(tmp_path),
            transform,
            lambda text: torch.zeros(1, 4),
            is_train=True,
            batch_size=8,
        )


def test_that_no_size_was_stored_is_noted(tmp_path: Path) -> None:
    (batch, info), *_ = read(write_data(tmp_path), 0)
    assert info.noted["size of the image at generation is not stored, the augmentations must fit"] >= len(batch.image)
