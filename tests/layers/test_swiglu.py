"""The experts' activation against PyTorch's own operators, one after the other."""

from __future__ import annotations

import pytest
import torch

from megatron_tied.layers import swiglu
from megatron_tied.layers.swiglu import weighted_swiglu


def plain(hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up * probs.unsqueeze(-1)).to(hidden.dtype)


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients(
    tokens: int, rows: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows is not None:
        monkeypatch.setattr(swiglu, "_ELEMENTS", rows * 24)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 48, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(tokens, generator=generator).requires_grad_()
    upstream = torch.randn(tokens, 24, generator=generator).to(dtype)
    outputs = [function(hidden, probs) for function in (weighted_swiglu, plain)]
    torch.testing.assert_close(outputs[0], outputs[1])
    found, expected = (torch.autograd.grad(output, (hidden, probs), upstream) for output in outputs)
    torch.testing.assert_close(found, expected, **({} if dtype != torch.bfloat16 else {"rtol": 0.02, "atol": 0.05}))


def test_only_its_arguments_are_kept() -> None:
    hidden, probs = torch.randn(8, 32, requires_grad=True), torch.rand(8, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        weighted_swiglu(hidden, probs)
    assert {tensor.data_ptr() for tensor in kept} == {hidden.data_ptr(), probs.data_ptr()}
