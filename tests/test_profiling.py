from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import nn

from jettclip import profiling
from jettclip.models.factory import create_model
from jettclip.models.reparameterize import reparameterize
from jettclip.profiling import (
    Profile,
    count_macs,
    count_parameters,
    example_text,
    profile,
    table,
    time_interleaved,
    tower_latencies,
)
from support import tiny_towers


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ROUNDS", 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), 2 * 6 * 4 * 4 * 4 * 3 * 3),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), (1, 8, 6, 6), 8 * 6 * 6 * 5 * 5),
        (nn.Conv1d(8, 8, 11, padding=5, groups=8), (1, 8, 9), 8 * 9 * 11),
        (nn.Sequential(nn.LayerNorm(5), nn.GELU()), (2, 5), 0),
    ],
)
def test_macs_are_those_counted_by_hand(module: nn.Module, shape: tuple[int, ...], expected: int, device: str) -> None:
    module = module.to(device).eval()
    assert count_macs(lambda: module(torch.zeros(shape, device=device))) == expected


@pytest.mark.parametrize("is_masked", [False, True])
def test_macs_of_attention_are_counted_where_torch_runs_it_as_one_operation(is_masked: bool) -> None:
    rows, length, width = 2, 7, 32
    attention = nn.MultiheadAttention(width, 4, batch_first=True).eval()
    x = torch.zeros(rows, length, width)
    mask = torch.zeros(rows, length, dtype=torch.bool) if is_masked else None
    projections, products = 4 * rows * length * width**2, 2 * rows * length**2 * width
    assert count_macs(lambda: attention(x, x, x, key_padding_mask=mask, need_weights=False)) == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_of_mobileclips_text_transformer() -> None:
    with torch.device("meta"):
        tower = create_model("MobileCLIP-S1-248", device="meta").text.eval()
        for length, known in ((77, 2.98), (248, 10.12)):
            macs = count_macs(partial(tower, torch.zeros(1, length, dtype=torch.long)))
            assert macs == 12 * (12 * length * 512**2 + 2 * length**2 * 512) + 512**2
            assert round(macs / 1e9, 2) == known


@pytest.mark.usefixtures("few_rounds")
def test_a_model_is_profiled_whole() -> None:
    found = profile("Nano-248")
    model = create_model("Nano-248")
    assert found.image_parameters == sum(p.numel() for p in model.visual.parameters())
    assert found.text_parameters == sum(p.numel() for p in model.text.parameters())
    cells, width = 16 * 16, 128  # four blocks over 8 x 8 patches of 128 x 128 pixels
    convolutions = cells * width * (3 * 8 * 8 + 4 * (5 * 5 + width))
    assert found.image_macs == convolutions + 4 * 4 * width * 192
    assert found.text_macs == {
        str(length): 2 * (8 * length * width**2 + 2 * length**2 * width) + width * 192 for length in (77, 248)
    }
    assert {tower: list(times) for tower, times in found.latency_ms["cpu"].items()} == {
        "image": ["trained"],
        "text": ["trained"],
    }


@pytest.mark.usefixtures("few_rounds")
def test_lengths_beyond_the_context_are_left_out_and_an_adapter_is_counted_by_the_embedding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiling, "create_model", lambda name: tiny_towers(context_length=80))
    assert list(profile("tiny").text_macs) == ["77"]
    monkeypatch.undo()
    found = profile("LLM2CLIP-Nano")
    text = create_model("LLM2CLIP-Nano").text
    linear = [module for module in text.modules() if isinstance(module, nn.Linear)]
    assert found.text_macs == {"embedding": sum(layer.in_features * layer.out_features for layer in linear)}


@pytest.mark.parametrize(
    ("name", "text_forms"), [("MobileCLIP-S0", ["trained", "reparameterized"]), ("MobileCLIP2-S0-248", ["trained"])]
)
def test_towers_that_fold_are_timed_in_both_forms(
    name: str, text_forms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "time_interleaved", lambda functions: dict.fromkeys(functions, 1.0))
    with torch.device("meta"):
        model = create_model(name, device="meta").eval()
        found = tower_latencies(model, reparameterize(model))
    assert {tower: list(forms) for tower, forms in found.items()} == {
        "image": ["trained", "reparameterized"],
        "text": text_forms,
    }
    assert round(count_parameters(model.visual) / 1e6, 2) == 11.41
    assert round(count_parameters(model.text) / 1e6, 2) == (42.44 if name == "MobileCLIP-S0" else 63.52)


def test_functions_are_timed_in_turns_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ROUNDS", 3)
    ticks = iter([0.0, *[value for start in range(6) for value in (10 * start, 10 * start + start + 1)]])
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    calls: list[str] = []

    def call(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.zeros(1)

    # the calls take 1, 2, ... 6 s, a and b in turns
    assert time_interleaved({"a": lambda: call("a"), "b": lambda: call("b")}) == {"a": 3000, "b": 4000}
    assert calls == ["a", "b"] * 5
    assert threads == [1, 4]


def test_timing_stops_early_where_a_call_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "SECONDS", 0.0)
    calls: list[int] = []

    def call() -> torch.Tensor:
        calls.append(1)
        return torch.zeros(1)

    time_interleaved({"a": call})
    assert len(calls) == 2 + profiling.LEAST_ROUNDS


def test_example_captions_end_at_different_places() -> None:
    ids = example_text(tiny_towers(), 30, 3)
    assert ids.argmax(dim=1).tolist() == [29, 14, 9]
    assert ids[1, 15:].sum() == ids[2, 10:].sum() == 0
    assert example_text(tiny_towers(), 1, 3).tolist() == [[49407]] * 3


def test_the_table_is_aligned_and_says_what_is_missing() -> None:
    latency = {"cpu": {"image": {"trained": 20.0, "reparameterized": 10.04}, "text": {"trained": 3.0}}}
    profiles = [
        Profile("Long", 11_410_000, 42_440_000, 2_390_000_000, {"77": 1_320_000_000, "248": 4_420_000_000}, latency),
        Profile("Short", 500_000, 1, 1, {"77": 1_000_000}, latency),
        Profile("Stored", 500_000, 1, 1, {"embedding": 20_000_000}, latency),
    ]
    lines = table(profiles).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(re.fullmatch("-+:?", cell) for cell in cells[1])
    assert cells[2] == ["`Long`", "11.41", "42.44", "2.390", "1.320", "4.420", "20.0 -> 10.0", "3.0"]
    assert cells[3][4:6] == ["0.001", "-"]
    assert cells[4][4:6] == ["0.020 an embedding", "-"]
