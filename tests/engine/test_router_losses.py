"""The router's gradient from its losses alone, against their closed forms, at any accumulation and loss scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from megatron_tied import initialize, parameter_groups
from megatron_tied.layers.moe_layer import tied_layers
from tests.engine.test_engine import ds_config
from tests.tiny_model import FIELDS, Inputs, build, inputs, loss

pytestmark = pytest.mark.usefixtures("launched")

AUX, Z = 0.5, 0.25
LAST = FIELDS["num_layers"] - 1
STATIC_SCALE = 2**10


def closed_form(x: Tensor, weight: Tensor, aux_coeff: float, z_coeff: float) -> Tensor:
    """The gradient of both losses with respect to router weights [experts, hidden], for router inputs [tokens, hidden].

    Balancing: E sum_e f_e P_e with f_e the fraction of the k T choices that fell on expert e, a constant, and P_e the
    mean probability: d/dlogit_tj = E / T p_tj (f_j - sum_e f_e p_te). z-loss: the mean square of
    l_t = logsumexp(logits_t): d/dlogit_tj = 2 l_t p_tj / T.
    """
    tokens, experts, k = len(x), len(weight), FIELDS["moe_router_topk"]
    logits = x @ weight.T
    p = logits.softmax(-1)
    f = torch.nn.functional.one_hot(logits.topk(k).indices, experts).sum((0, 1)) / (k * tokens)
    balancing = experts / tokens * p * (f - (p * f).sum(-1, keepdim=True))
    z = 2 * logits.logsumexp(-1, keepdim=True) * p / tokens
    return (aux_coeff * balancing + z_coeff * z).T @ x


def found_and_expected(batches: list[Inputs], precision: str, stage: int, **ds: Any) -> tuple[Tensor, Tensor]:
    """The last router's gradient, without that of the language model loss, and the mean of the closed forms."""
    model = build(precision=precision, moe_aux_loss_coeff=AUX, moe_z_loss_coeff=Z, moe_router_dtype="fp32")
    router = list(tied_layers(model))[LAST].router
    weight = router.weight.detach().double()
    groups = parameter_groups(model, lr=0.0)
    config = ds_config(stage=stage, accumulation=len(batches), **ds)
    engine = initialize(model, config, optimizer=torch.optim.SGD(groups, lr=0.0))[0]
    seen: list[Tensor] = []
    router.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1).double()))
    for index, batch in enumerate(batches):
        engine.backward(loss(engine, batch) * 0.0)
        if index < len(batches) - 1:
            engine.step()
    expected = [closed_form(x, weight, AUX, Z) for x in seen]
    return safe_get_full_grad(router.weight).double(), torch.stack(expected).mean(0)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_closed_form_at_every_accumulation(accumulation: int, stage: int) -> None:
    found, expected = found_and_expected([inputs(seed=n) for n in range(accumulation)], "fp32", stage)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_closed_form_at_a_loss_scale_of_1024(accumulation: int, stage: int) -> None:
    batches = [inputs(seed=n) for n in range(accumulation)]
    fp16 = {"enabled": True, "loss_scale": STATIC_SCALE}
    found, expected = found_and_expected(batches, "fp16", stage, fp16=fp16)
    # In fp16 an input or a weight has 11 bits; a factor of the loss scale or of the accumulation would be 2 or more.
    assert (found / STATIC_SCALE - expected).norm() < 2e-3 * expected.norm()
