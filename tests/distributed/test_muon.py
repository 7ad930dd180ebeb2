"""Muon over ZeRO's partitions and expert parallel ranks equals torch's own over whole matrices in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import launch
from tests.distributed.muon_worker import (
    ADAMW,
    ADAMW_DECAY,
    ADAMW_LR,
    CASES,
    CLIP,
    DECAY,
    LR,
    NO_ROUTER_LOSSES,
    batches,
    trained,
)
from tests.distributed.training_run import micro_batch
from tests.tiny_model import FIELDS, TIE, build

HEADS, GROUPS = FIELDS["num_attention_heads"], FIELDS["num_query_groups"]
WIDTH = FIELDS["hidden_size"] // HEADS


def matrices(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of one of the model's tensors that Muon is for, as views, or as copies where none can be made."""
    if "experts" in name:
        return list(tensor)
    if "linear_qkv" in name:
        by_group = tensor.view(GROUPS, HEADS // GROUPS + 2, WIDTH, -1)
        parts = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
        return [part.reshape(-1, tensor.shape[-1]) for part in parts]
    return [tensor]


def put_back(name: str, tensor: torch.Tensor, parts: list[torch.Tensor]) -> None:
    if "linear_qkv" in name:
        query, key, value = (part.view(GROUPS, -1, WIDTH, tensor.shape[-1]) for part in parts)
        tensor.copy_(torch.cat([query, key, value], dim=1).view_as(tensor))
    else:
        tensor.copy_(torch.stack(parts).view_as(tensor))


def is_muon(name: str) -> bool:
    return any(part in name for part in ("experts", "linear_qkv", "linear_proj"))


@pytest.fixture(scope="module")
def reference(one_process: None) -> dict[str, torch.Tensor]:
    """Ten steps of the same model with torch's optimizers."""
    model = build(TIE, **NO_ROUTER_LOSSES)
    named = dict(model.named_parameters())
    divided = {name: 3**0.5 if "layers.1." in name else 2**0.5 if "layers.4." in name else 1.0 for name in named}
    copies = {
        name: [torch.nn.Parameter(part.detach().clone()) for part in matrices(name, weight)]
        for name, weight in named.items()
        if is_muon(name)
    }
    others = [weight for name, weight in named.items() if not is_muon(name)]
    muon = torch.optim.Muon(
        [{"params": parts, "lr": LR / (divided[name] if "experts" in name else 1.0)} for name, parts in copies.items()],
        lr=LR,
        weight_decay=DECAY,
    )
    adamw = torch.optim.AdamW(others, lr=ADAMW_LR, weight_decay=ADAMW_DECAY, **ADAMW)
    for batch in batches():
        tokens, positions, mask, labels = micro_batch(batch, 0, 1)
        model(tokens, positions, mask, labels=labels).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for name, parts in copies.items():
            for part, gradient in zip(parts, matrices(name, named[name].grad), strict=True):
                part.grad = gradient.contiguous()
        with pytest.MonkeyPatch.context() as patch:
            # torch rounds to bf16 before it iterates, by which the last bit of a gradient can change the third digit.
            patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
            muon.step()
        adamw.step()
        with torch.no_grad():
            for name, parts in copies.items():
                put_back(name, named[name], parts)
        model.zero_grad()
    return {name: weight.detach().clone() for name, weight in named.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("muon")
    launch("tests.distributed.muon_worker", 2, str(directory))
    return directory


def test_one_process_is_torchs(reference: dict[str, torch.Tensor], launched: None) -> None:
    start = dict(build(TIE, **NO_ROUTER_LOSSES).named_parameters())
    found = trained(0)
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        torch.testing.assert_close(
            found[name], expected, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert (start[name] - expected).abs().max() > 1e-3, f"{name} has hardly moved"


@pytest.mark.parametrize(("ep", "stage", "offload"), CASES)
def test_two_ranks_are_torchs(
    reference: dict[str, torch.Tensor], ranks: Path, ep: int, stage: int, offload: str
) -> None:
    found = load_file(ranks / f"ep{ep}-zero{stage}-{offload}.safetensors")
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        torch.testing.assert_close(
            found[name], expected, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
