"""What many tests need: shards made on the fly, tiny models, several gloo ranks."""

from __future__ import annotations

import importlib.util
import io
import json
import multiprocessing
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from jettclip.models.text_tower import build_text_tower
from jettclip.models.two_towers import TwoTowers

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
WORDS = ("red", "green", "blue", "apple", "dog", "cat", "house", "tree", "river", "car", "big", "small", "near", "over")


def picture(seed: int, size: int = 16, format: str = "PNG") -> bytes:
    """Returns an encoded picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def caption(seed: int, words: int = 12) -> str:
    """Returns two sentences of random words."""
    chosen = [str(word) for word in np.random.default_rng(seed).choice(WORDS, words)]
    return " ".join(chosen[:4]) + ". " + " ".join(chosen[4:]) + "."


def sample(number: int, **members: bytes | str | dict[str, Any]) -> dict[str, Any]:
    """Returns the members of an ordinary sample, of which some may be given: ``txt=...``, ``json={...}``."""
    return {
        "__key__": f"{number:06d}",
        **(members or {"png": picture(number), "long_caption": caption(number), "short_caption": f"thing {number}"}),
    }


def write_shard(path: Path, samples: Sequence[Mapping[str, Any]]) -> str:
    """Writes samples ``{"__key__": ..., extension: bytes, str or JSON}`` to a tar; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for members in samples:
            for extension, value in members.items():
                if extension != "__key__":
                    data = value if isinstance(value, bytes) else value if isinstance(value, str) else json.dumps(value)
                    data = data.encode() if isinstance(data, str) else data
                    entry = tarfile.TarInfo(f"{members['__key__']}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return str(path)


def write_shards(folder: Path, sizes: Sequence[int]) -> str:
    """Writes shards of ordinary samples with running numbers as keys; returns their urls, joined by ``::``."""
    urls, first = [], 0
    for index, size in enumerate(sizes):
        urls.append(write_shard(folder / f"{index:06d}.tar", [sample(first + i) for i in range(size)]))
        first += size
    return "::".join(urls)


def tiny_towers(
    *,
    context_length: int = 32,
    causal: bool = False,
    mask_padding: bool = True,
    width: int = 16,
    logit_scale: float = 1 / 0.07,
    **preprocess: Any,
) -> TwoTowers:
    """Builds a model of a few thousand parameters over pictures of 16 x 16, or `size`, and CLIP's vocabulary."""
    config = {
        "context_length": context_length, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
        "no_causal_mask": not causal,
    }  # fmt: skip
    cfg = {"size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), **preprocess}
    visual = torch.nn.Sequential(torch.nn.AvgPool2d(cfg["size"] // 4), torch.nn.Flatten(), torch.nn.Linear(48, width))
    text = build_text_tower(config, width, quick_gelu=False, mask_padding=mask_padding)
    return TwoTowers(
        visual,
        text,
        embed_dim=width,
        mean=cfg["mean"],
        std=cfg["std"],
        logit_scale=logit_scale,
        preprocess_cfg=cfg,
    )


def unit_rows(rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns random rows of unit length around a common direction, as features of a trained model lie."""
    return torch.nn.functional.normalize(torch.randn(rows, width, dtype=dtype) + 0.5, dim=1)


def load_script(name: str) -> ModuleType:
    """Imports a program of scripts/, anew for each test."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Calls ``function(*arguments)`` in each of several gloo ranks; returns what each returned.

    The ranks are forked, so the function may be a closure; what it returns must pickle (tensors as they are).
    """
    context = multiprocessing.get_context("fork")
    pipes = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, world_size, f"{folder}/rendezvous", theirs, function, arguments), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append((process, ours))
        results = []
        try:
            for rank, (_, pipe) in enumerate(pipes):
                if not pipe.poll(timeout):
                    raise TimeoutError(f"rank {rank} of {world_size} has not answered in {timeout} s")
                ok, value = pipe.recv()
                if not ok:
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{value}")
                results.append(torch.load(io.BytesIO(value), weights_only=False))
        finally:
            for process, pipe in pipes:
                pipe.close()
                process.join(5)
                process.kill()
    return results


def _rank(rank: int, world_size: int, rendezvous: str, pipe: Any, function: Any, arguments: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
        stream = io.BytesIO()
        torch.save(function(*arguments), stream)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send((True, stream.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
