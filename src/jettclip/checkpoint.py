"""Checkpoints: whole or not there, with everything that a run needs to go on as if it had not stopped.

A checkpoint is a folder ``epoch_3/``:

    model.safetensors   the weights, under the names of OpenCLIP's CustomTextCLIP; --pretrained takes the folder
    state.pt            optimizer, gradient scaler, the loss's own parameters, random states; read with weights_only
    checkpoint.json     epoch, step, versions, and a digest of the two files; written last

It is written under another name and renamed, so a killed run leaves no half checkpoint under the final name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from jettclip.engine.base import Engine
from jettclip.models.checkpoints import WEIGHTS
from jettclip.ranks import rank_and_world_size
from jettclip.seeding import random_state, set_random_state

STATE = "state.pt"
MANIFEST = "checkpoint.json"
_TOWERS, _LOSS = "towers.", "loss."
_SCALARS = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class Position:
    """How far training has come."""

    epoch: int  # epochs completed
    step: int  # steps taken


def save_checkpoint(
    folder: Path, engine: Engine, position: Position, described: Mapping[str, str] | None = None
) -> Path | None:
    """Writes ``epoch_<n>`` into a folder; every rank must call it, rank 0 writes.

    Args:
        folder: the run's checkpoints.
        engine: what to save.
        position: how far training has come.
        described: what stands beside the weights, as the metadata of their file.

    Returns:
        the checkpoint, on rank 0.
    """
    state = engine.state_dict()
    random_states = _gather(random_state())
    if random_states is None:
        return None
    student = {name: tensor.detach().cpu().contiguous() for name, tensor in state.pop("student").items()}
    towers = {name.removeprefix(_TOWERS): t for name, t in student.items() if name.startswith(_TOWERS)}
    towers |= {name: towers[name].reshape(()) for name in _SCALARS if name in towers}  # 0-D, as OpenCLIP has them
    state["loss"] = {name.removeprefix(_LOSS): t for name, t in student.items() if name.startswith(_LOSS)}
    state["random"] = random_states

    final = folder / f"epoch_{position.epoch}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # save_file would deny others to read it
    (partial / WEIGHTS).write_bytes(save(towers, {**(described or {"format": "pt"})}))
    torch.save(state, partial / STATE)
    manifest = {
        **asdict(position),
        "versions": {name: version(name) for name in ("jettclip", "torch", "open_clip_torch", "timm")},
        "digests": {name: _digest(partial / name) for name in (WEIGHTS, STATE)},
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for name in (WEIGHTS, STATE, MANIFEST):
        _sync(partial / name)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _sync(folder)
    return final


def read_position(path: Path) -> Position:
    """Returns how far training had come at a checkpoint.

    Raises:
        ValueError: if it is no whole checkpoint.
    """
    manifest = _manifest(path)
    if manifest is None:
        raise ValueError(
            f"--resume {path} is not a whole checkpoint of jettclip (a folder with {MANIFEST}); "
            "to start from other weights, give them as --pretrained"
        )
    return Position(manifest["epoch"], manifest["step"])


def load_checkpoint(path: Path, engine: Engine) -> Position:
    """Restores an engine and this rank's random state from a checkpoint; every rank must call it.

    Raises:
        ValueError: if the checkpoint is damaged, or of another model, loss or optimizer.
    """
    position = read_position(path)
    try:
        towers = load_file(path / WEIGHTS)
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        towers |= {name: towers[name].reshape(1) for name in _SCALARS if name in towers}
        state["student"] = {
            **{_TOWERS + name: tensor for name, tensor in towers.items()},
            **{_LOSS + name: tensor for name, tensor in state.pop("loss").items()},
        }
        random_states = state.pop("random")
        _check_loss(path, state["student"], engine.state_dict()["student"])
        engine.load_state_dict(state)
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"--resume {path} does not fit this run: {error}") from error
    rank, ranks = rank_and_world_size()
    if ranks == len(random_states):
        set_random_state(random_states[rank])
    else:
        logging.warning(f"{path} is of {len(random_states)} ranks, this run has {ranks}: random states start anew")
    return position


def _check_loss(path: Path, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError where nothing but the loss's parameters differ, and the bias that only a sigmoid loss needs."""
    then, now = ({name: list(value.shape) for name, value in state.items()} for state in (saved, expected))
    others = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if others and all(name.startswith(_LOSS) or name == f"{_TOWERS}logit_bias" for name in others):
        found = ", ".join(f"{name} is {then.get(name, 'missing')}, here {now.get(name, 'missing')}" for name in others)
        raise ValueError(
            f"it was trained with another --loss, --mse-projection or --pretrained, or other teachers ({found}); "
            f"give the same, or start a new run with --pretrained {path}"
        )


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint of the last epoch in a folder, passing over damaged ones with a warning; None if none."""
    found = []
    for path in folder.glob("epoch_*"):
        manifest = _manifest(path)
        if manifest is not None:
            found.append((manifest["epoch"], path, manifest["digests"]))
    # not by step, since an epoch may have become shorter
    for _, path, digests in sorted(found, key=lambda checkpoint: checkpoint[0], reverse=True):
        if all((path / name).exists() and _digest(path / name) == known for name, known in digests.items()):
            return path
        logging.warning(f"{path} is damaged, its files do not have the digests in {MANIFEST}; taking the one before")
    return None


def find_checkpoint(resume: str | None, folder: Path | None) -> Path | None:
    """Returns the checkpoint that ``--resume`` means: a path, or ``latest`` for the newest in the run's folder.

    All ranks get rank 0's answer.

    Raises:
        ValueError: if a path does not exist.
    """
    if resume is None:
        return None
    path: Path | None = Path(resume)
    if resume == "latest":
        found = [latest_checkpoint(folder) if folder else None]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        path = found[0]
        logging.info(f"Resuming from {path}" if path else f"No checkpoint in {folder}: starting from the beginning")
    elif not Path(resume).exists():
        raise ValueError(f"--resume {resume} does not exist; give a checkpoint folder, or latest")
    return path


def delete_checkpoint(folder: Path, epoch: int) -> None:
    """Deletes the checkpoint after an epoch, if it is there."""
    path = folder / f"epoch_{epoch}"
    if path.exists():
        logging.info(f"Deleting {path}, there is a newer one")
        shutil.rmtree(path, ignore_errors=True)


def _gather(value: Any) -> list[Any] | None:
    """Returns every rank's value on rank 0, None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest


def _digest(path: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def _sync(path: Path) -> None:
    """Makes sure that what was written survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
