"""Norms on hosts without Transformer Engine: torch's, with Megatron-Core's mark for sequence parallelism."""

from __future__ import annotations

import copy

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.layers.attention import ProjectionRMSNorm
from megatron_tied.layers.norm import RMSNorm, TorchNorm
from tests.tiny_model import TieConfig, build


def _config(normalization: str, sequence_parallel: bool) -> TransformerConfig:
    size = 2 if sequence_parallel else 1
    return TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        normalization=normalization,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("normalization", "kind"), [("RMSNorm", RMSNorm), ("LayerNorm", torch.nn.LayerNorm)])
def test_is_torchs_own_norm_with_a_mark(normalization: str, kind: type, sequence_parallel: bool) -> None:
    config = _config(normalization, sequence_parallel)
    norm = TorchNorm(config, 32, eps=0.25)
    assert type(norm) is kind
    assert norm.eps == 0.25
    x = torch.randn(5, 32)
    assert torch.equal(norm(x), kind(32, eps=0.25)(x))
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel] * (
        2 if normalization == "LayerNorm" else 1
    )
    assert config.sequence_parallel == sequence_parallel, "the config is another's"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 48), (7, 48), (0, 48)], ids=str)
def test_outputs_and_gradients_are_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    upstream = torch.randn(shape, generator=generator).to(dtype)
    found, expected = [], []
    for kind, results in ((RMSNorm, found), (torch.nn.RMSNorm, expected)):
        norm = kind(48, eps=0.01, dtype=dtype)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, 48))
        output = norm(x)
        results += [output, *torch.autograd.grad(output, (x, norm.weight), upstream)]
    torch.testing.assert_close(found, expected)


def test_refuses_what_torch_cannot_do() -> None:
    config = copy.copy(_config("LayerNorm", False))
    config.layernorm_zero_centered_gamma = True
    with pytest.raises(AssertionError, match="zero_centered_gamma"):
        TorchNorm(config, 32)


def test_every_norm_of_a_model_carries_the_mark(one_process: None) -> None:
    unmarked = {
        name
        for name, parameter in build(TieConfig(), moe_layer_freq=[0, 1, 1, 1, 1, 1]).named_parameters()
        if "norm" in name and not hasattr(parameter, "sequence_parallel")
    }
    assert not unmarked


def test_projection_norm_of_a_rank_has_the_gains_of_its_heads() -> None:
    assert ProjectionRMSNorm(_config("RMSNorm", False), 8, heads=4).weight.shape == (32,)
    assert ProjectionRMSNorm(_config("RMSNorm", True), 8, heads=4).weight.shape == (16,)
