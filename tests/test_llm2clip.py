"""A model that reads stored embeddings of captions instead of captions, from the command line to the metrics."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from jettclip.data.features import StoreInfo, digest, store_path, write_store
from jettclip.data.pipeline import get_wds_dataset
from jettclip.main import find_mistakes, main
from jettclip.models.factory import create_model_and_transforms
from jettclip.params import parse_args
from jettclip.report import METRICS, read_metrics
from jettclip.settings import DataSettings
from support import caption, picture, sample, write_shard

pytestmark = pytest.mark.usefixtures("restored_logging")

MODEL, WIDTH = "LLM2CLIP-Nano", 384
VIEWS = ("short", "long")


def captions(number: int) -> dict[str, str]:
    return {"short": f"thing {number}", "long": caption(number)}


def embeddings(number: int, width: int = WIDTH) -> dict[str, Tensor]:
    """Returns what a language model might make of a sample's captions; it does not normalise."""
    generator = torch.Generator().manual_seed(number)
    return {view: torch.randn(width, generator=generator) * 5 for view in VIEWS}


def members(number: int, width: int = WIDTH) -> dict[str, Any]:
    """Returns a sample whose caption members hold its embeddings."""
    vectors = {
        f"{view}_caption": row.numpy().astype("<f4").tobytes() for view, row in embeddings(number, width).items()
    }
    return sample(number, png=picture(number), **vectors)


def texts(number: int) -> dict[str, Any]:
    """Returns a sample whose caption members hold text."""
    return sample(number, png=picture(number), **{f"{view}_caption": text for view, text in captions(number).items()})


def write_embeddings(shard: str, numbers: range, width: int = WIDTH) -> None:
    """Writes the store llm of a shard."""
    rows = {view: torch.stack([embeddings(n, width)[view] for n in numbers]) for view in VIEWS}
    digests = {view: [digest(captions(n)[view]) for n in numbers] for view in VIEWS}
    info = StoreInfo("LLM", "12ab", 1.0, False, "{}", width)
    write_store(store_path(shard, "llm"), [f"{n:06d}" for n in numbers], rows, digests, info)


def write_data(folder: Path, source: str, width: int = WIDTH, val_width: int = WIDTH) -> Path:
    """Writes two shards to train on and one to evaluate on, with embeddings in the members or in the store llm."""
    for name, numbers, its_width in (
        ("train/000000", range(14), width),
        ("train/000001", range(14, 24), width),
        ("val/000000", range(100, 112), val_width),
    ):
        made = [members(n, its_width) if source == "members" else texts(n) for n in numbers]
        shard = write_shard(folder / f"{name}.tar", made)
        if source == "tars":  # in another order than the samples
            write_shard(
                Path(shard.replace(".tar", "_text_embeddings.tar")),
                [
                    {
                        "__key__": f"{n:06d}",
                        **{
                            f"{view}SV_captions": row.numpy().tobytes()
                            for view, row in embeddings(n, its_width).items()
                        },
                    }
                    for n in reversed(numbers)
                ],
            )
        elif source != "members":
            write_embeddings(shard, numbers, its_width)
    return folder


def flags(folder: Path, name: str, source: str, **changed: Any) -> list[str]:
    given = {
        "train-data": str(folder / "train" / "{000000..000001}.tar"), "val-data": str(folder / "val" / "000000.tar"),
        "text-embeddings": source, "model": MODEL, "loss": "1*clip@long + 1*clip@short", "pca-components": 4,
        "device": "cpu", "precision": "fp32", "workers": 0, "batch-size": 8, "epochs": 2, "lr": 1e-3, "warmup": 2,
        "lr-scheduler": "const", "log-every-n-steps": 1, "logs": str(folder / "logs"), "name": name, **changed,
    }  # fmt: skip
    return [f"--{flag}={value}" for flag, value in given.items() if value is not None]


def metrics(folder: Path, name: str, kind: str = "train") -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "logs" / name / METRICS) if line["kind"] == kind]


def losses(folder: Path, name: str) -> list[tuple[int, float, float, float]]:
    return [(line["step"], line["loss"], line["clip@long"], line["clip@short"]) for line in metrics(folder, name)]


def log(folder: Path, name: str) -> str:
    return (folder / "logs" / name / "out.log").read_text()


@torch.no_grad()
def recall_of(folder: Path, name: str, view: str) -> dict[str, float]:
    """Computes the recall of the saved weights on the validation samples, without loader or evaluator."""
    checkpoint = folder / "logs" / name / "checkpoints" / "epoch_2"
    model, _, transform = create_model_and_transforms(MODEL, str(checkpoint))
    model.eval()
    numbers = range(100, 112)
    pictures = [Image.open(io.BytesIO(picture(number))).convert("RGB") for number in numbers]
    vectors = torch.stack([embeddings(number)[view] for number in numbers])
    image = F.normalize(model.encode_image(torch.stack([transform(one) for one in pictures])))
    scores = image @ F.normalize(model.encode_text(vectors)).T
    found = {}
    for way, rows in (("image_to_text", scores), ("text_to_image", scores.T)):
        places = (rows > rows.diagonal().unsqueeze(1)).sum(dim=1)
        found |= {f"{view}/{way}_R@{k}": float((places < k).float().mean()) for k in (1, 5, 10)}
    return found


@pytest.mark.parametrize("source", ["members", "llm"])
def test_a_run_over_embeddings_trains_resumes_and_evaluates(source: str, tmp_path: Path) -> None:
    data = write_data(tmp_path, source)
    assert main(flags(data, "whole", source)) == 0
    assert [line[0] for line in losses(data, "whole")] == list(range(1, 7))  # 24 samples, batches of 8, 2 epochs
    val = metrics(data, "whole", "val")
    assert [line["samples"] for line in val] == [12, 12]
    for name, value in (recall_of(data, "whole", "short") | recall_of(data, "whole", "long")).items():
        assert val[-1][name] == pytest.approx(value), name

    assert main(flags(data, "parts", source, epochs=1)) == 0
    assert main([*flags(data, "parts", source), "--resume", "latest"]) == 0
    assert losses(data, "parts") == losses(data, "whole")

    checkpoint = f"--pretrained={data}/logs/whole/checkpoints/epoch_2"
    assert main([*flags(data, "alone", source, **{"train-data": None}), checkpoint]) == 0
    alone = metrics(data, "alone", "val")[0]
    assert {k: v for k, v in alone.items() if k != "step"} == {k: v for k, v in val[-1].items() if k != "step"}


def test_members_store_and_tars_are_read_alike(tmp_path: Path) -> None:
    for source in ("members", "llm", "tars"):
        data = write_data(tmp_path / source, source)
        assert main(flags(data, "a", source, epochs=1, **{"val-data": None})) == 0
    assert losses(tmp_path / "members", "a") == losses(tmp_path / "llm", "a") == losses(tmp_path / "tars", "a")


def test_a_sample_without_a_short_embedding_is_dropped_and_counted(tmp_path: Path) -> None:
    data = write_data(tmp_path, "members")
    lacking = {name: value for name, value in members(14).items() if name != "short_caption"}
    write_shard(data / "train" / "000001.tar", [lacking, *(members(n) for n in range(15, 24))])
    assert main(flags(data, "a", "members", epochs=1, **{"max-drop-rate": 0.5})) == 0
    last = metrics(data, "a")[-1]
    assert last["dropped_by_reason"] == {"short caption is missing": 1}
    assert "first-sentence" not in log(data, "a")  # no policy can make an embedding
    assert metrics(data, "a", "val")[0]["samples"] == 12


def test_evaluation_needs_only_the_embeddings_that_the_loss_reads(tmp_path: Path) -> None:
    data = write_data(tmp_path, "members")
    only_long = [{k: v for k, v in members(n).items() if k != "short_caption"} for n in range(100, 112)]
    write_shard(data / "val" / "000000.tar", only_long)
    assert main(flags(data, "a", "members", epochs=1, loss="openclip", **{"pca-components": None})) == 0
    val = metrics(data, "a", "val")[0]
    assert val["samples"] == 12
    assert "long/text_to_image_R@1" in val
    assert "short/text_to_image_R@1" not in val


@pytest.mark.parametrize(("width", "val_width"), [(100, 100), (WIDTH, 100)])
def test_a_store_of_another_width_is_refused_before_training(width: int, val_width: int, tmp_path: Path) -> None:
    data = write_data(tmp_path, "llm", width, val_width)
    assert main(flags(data, "a", "llm")) == 1
    assert "the embeddings of store 'llm' have width 100, and LLM2CLIP-Nano reads 384" in log(data, "a")
    assert not (data / "logs" / "a" / METRICS).exists()


def test_members_of_another_width_end_the_run_at_the_first_batch(tmp_path: Path) -> None:
    data = write_data(tmp_path, "members", width=100)
    assert main(flags(data, "a", "members")) == 1
    assert "none of the first 100 samples is usable" in log(data, "a")
    assert "embedding is of another width: 100 among the members, and LLM2CLIP-Nano reads 384" in log(data, "a")
    assert not metrics(data, "a")


def test_a_member_of_another_width_is_dropped_and_counted(tmp_path: Path) -> None:
    data = write_data(tmp_path, "members")
    write_shard(data / "train" / "000001.tar", [members(14, 7), *(members(n) for n in range(15, 24))])
    assert main(flags(data, "a", "members", epochs=1, **{"max-drop-rate": 0.5, "val-data": None})) == 0
    reasons = metrics(data, "a")[-1]["dropped_by_reason"]
    assert reasons == {"short embedding is of another width": 1}
    assert "7 among the members, and LLM2CLIP-Nano reads 384" in log(data, "a")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", MODEL, "--train-data", "x.tar"], "give --text-embeddings the name of their store, or 'members'"),
        (["--model", MODEL, "--val-data", "x.tar"], "give --text-embeddings"),
        (["--model", "Nano-248", "--val-data", "x.tar", "--text-embeddings", "llm"], "--model Nano-248 reads text"),
        (["--model", MODEL, "--imagenet-val", "x"], "--imagenet-val: --model LLM2CLIP-Nano reads stored embeddings"),
        (
            ["--model", MODEL, "--val-data", "x.tar", "--text-embeddings", "llm", "--val-truncate", "77"]
            + ["--force-context-length", "77"],
            "--val-truncate, --force-context-length: --model LLM2CLIP-Nano reads stored embeddings, not text",
        ),
        (
            ["--model", "Nano-248", "--train-data", "x.tar", "--distill-model", MODEL, "--distill-pretrained", "y"],
            "--distill-model LLM2CLIP-Nano reads stored embeddings",
        ),
    ],
)
def test_text_and_embeddings_are_not_confused(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(given, find_mistakes)
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_model_over_embeddings_is_no_mistake() -> None:
    parse_args(["--model", MODEL, "--train-data", "x.tar", "--text-embeddings", "members"], find_mistakes)


def test_captions_of_text_need_a_tokenizer(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", [texts(0)])
    with pytest.raises(ValueError, match="need a tokenizer"):
        get_wds_dataset(DataSettings(), shard, lambda image: image, None, is_train=False, batch_size=1)  # type: ignore
