"""Reads a data set as OpenCLIP's trainer does, for `damage.py`: its own stages, and one that takes features along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import open_clip_train.data as peer
import torch
import webdataset as wds
from torch import Tensor


def read(
    urls: list[str], transform: Callable[[Any], Tensor], tokenizer: Callable[[str], Tensor], batch_size: int
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yields the samples with their keys: image, token ids and features.

    The stages are those of `open_clip_train.data.get_wds_dataset` (open_clip_torch 3.3) without the shuffling, with the
    member ``npz`` beside image and text.
    """
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(urls),
        peer.tarfile_to_samples_nothrow,
        wds.select(peer.filter_no_caption_or_no_image),
        wds.decode("pilrgb", handler=peer.log_and_continue),
        wds.rename(key="__key__", image="jpg;png;jpeg;webp", text="txt", features="npz"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0], features=lambda npz: npz["embedding"]),
        wds.to_tuple("key", "image", "text", "features"),
        wds.batched(batch_size, partial=True),
    )
    for keys, images, texts, features in pipeline:
        for key, image, text, feature in zip(keys, images, texts, np.asarray(features), strict=True):
            yield key, [image, text, torch.from_numpy(feature)]
