from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jettclip.models.checkpoints import read_weights
from jettclip.models.torchscript import is_torchscript, read_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4).half().T)  # columns lie together
        self.shared = torch.arange(12.0)[2:8:2]  # part of a larger storage
        self.register_buffer("counts", torch.tensor([1, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype) * self.shared.sum()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.Sequential(Block(), torch.nn.Linear(3, 2))
        self.register_buffer("input_resolution", torch.tensor(224))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("yes", torch.tensor([True, False]))
        self.register_buffer("brain", torch.tensor([1.5], dtype=torch.bfloat16))
        self.register_buffer("long_float", torch.tensor([0.1], dtype=torch.float64))
        self.register_buffer("short_int", torch.tensor([7], dtype=torch.int32))
        self.name = "ViT"

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def write(path: Path, traced: bool = False) -> dict[str, Tensor]:
    model = Model()
    archive = torch.jit.trace(model, torch.randn(2, 4)) if traced else torch.jit.script(model)
    torch.jit.save(archive, path)
    return {**model.state_dict(), "blocks.0.shared": model.blocks[0].shared}


@pytest.mark.parametrize("traced", [True, False])
def test_every_tensor_is_read_as_it_was_written(tmp_path: Path, traced: bool) -> None:
    expected = write(tmp_path / "model.pt", traced)
    assert is_torchscript(tmp_path / "model.pt")
    found = read_torchscript(tmp_path / "model.pt")
    assert found.keys() - {"blocks.0.shared"} == expected.keys() - {"blocks.0.shared"}  # a trace may not keep it
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "zip.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "empty.pt").write_bytes(b"")
    assert not any(is_torchscript(tmp_path / f"{name}.pt") for name in ("zip", "legacy", "empty", "absent"))


class Malicious:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def rewrite(source: Path, target: Path, **members: bytes) -> Path:
    """Copies an archive with other content of members, given by the end of their names."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            replaced = [data for name, data in members.items() if entry.filename.endswith(f"/{name}.pkl")]
            new.writestr(entry.filename, replaced[0] if replaced else old.read(entry))
    return target


@pytest.mark.parametrize(("function", "named"), [(os.system, "system"), (eval, "eval"), (getattr, "getattr")])
def test_what_an_archive_would_call_is_refused(tmp_path: Path, function: Any, named: str) -> None:
    write(tmp_path / "model.pt")
    target = tmp_path / "executed"
    code = f"open({str(target)!r}, 'w')" if named == "eval" else f"touch {target}"
    pickled = pickle.dumps({"x": Malicious(function, code)}, protocol=2)
    bad = rewrite(tmp_path / "model.pt", tmp_path / "bad.pt", data=pickled)
    with pytest.raises(pickle.UnpicklingError, match=rf"it refers to \w+\.{named}, which a CLIP model has no use for"):
        read_torchscript(bad)
    with pytest.raises(ValueError, match="bad.pt cannot be read as a checkpoint .*it refers to") as error:
        read_weights(bad)
    assert "\n" not in str(error.value)
    assert not target.exists()


def test_the_constants_and_the_code_of_an_archive_are_not_read(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.pt")
    target = tmp_path / "executed"
    pickled = pickle.dumps(Malicious(os.system, f"touch {target}"), protocol=2)
    odd = rewrite(tmp_path / "model.pt", tmp_path / "odd.pt", constants=pickled)
    assert read_torchscript(odd).keys() == expected.keys()
    assert not target.exists()


def storage(number: Any = "0", count: Any = 12, size: Any = (3, 4), stride: Any = (4, 1), offset: int = 0) -> bytes:
    """Returns a pickled tensor over a storage of the archive, whose numbers need not be true."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, number, "cpu", count) if value is marked else None

    marked = object()
    stream = io.BytesIO()
    call = Malicious(torch._utils._rebuild_tensor_v2, marked, offset, size, stride, False, {})
    Pickler(stream, protocol=2).dump({"x": call})
    return stream.getvalue()


@pytest.mark.parametrize(
    "pickled",
    [storage(number="999"), storage(number="../../data.pkl"), storage(count=10**6), storage(size=(3, 400)),
     storage(offset=11), storage(size=(-1, 4)), storage(size=(10**10,), stride=(0,)),
     storage(count=6, size=(2, 3)), b"", b"\x80\x02.", b"\x80\x02}q\x00", pickle.dumps([1])],
)  # fmt: skip
def test_numbers_that_are_not_true_are_an_error(tmp_path: Path, pickled: bytes) -> None:
    write(tmp_path / "model.pt")
    bad = rewrite(tmp_path / "model.pt", tmp_path / "bad.pt", data=pickled)
    with pytest.raises(ValueError, match="bad.pt cannot be read as a checkpoint") as error:
        read_weights(bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_told(tmp_path: Path, kept: float) -> None:
    write(tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match="cut.pt cannot be read as a checkpoint") as error:
        read_weights(tmp_path / "cut.pt")
    assert "\n" not in str(error.value)


def test_a_storage_that_swells_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as good, zipfile.ZipFile(tmp_path / "swells.pt", "w") as bad:
        for entry in good.infolist():
            packed = zipfile.ZIP_DEFLATED if "/data/" in entry.filename else zipfile.ZIP_STORED
            bad.writestr(entry.filename, good.read(entry), packed)
    with pytest.raises(ValueError, match="its storage 0 is not of the size that it should be"):
        read_weights(tmp_path / "swells.pt")


def test_tensors_in_containers_are_read_as_well(tmp_path: Path) -> None:
    model = Model()
    model.others = (torch.ones(2), torch.zeros(3))
    torch.jit.script(model).save(tmp_path / "model.pt")
    read = read_torchscript(tmp_path / "model.pt")
    assert torch.equal(read["others.0"], torch.ones(2))
    assert torch.equal(read["others.1"], torch.zeros(3))


def test_an_archive_leaves_nothing_behind_for_the_next(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.pt")
    # protocol 2: the class Module, and a BUILD whose second state sets attributes of the class itself
    spoils = b"\x80\x02c__torch__.Module\nModule\n(}X\x0c\x00\x00\x00__setstate__ccollections\nOrderedDict\nstb."
    bad = rewrite(tmp_path / "model.pt", tmp_path / "spoils.pt", data=spoils)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_weights(bad)
    assert read_torchscript(tmp_path / "model.pt").keys() >= expected.keys()
