"""The tracked router losses against the papers' formulas, applied to the routers' own logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker
from torch import Tensor

from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.monitor.moe_losses import take_moe_losses
from tests.oracle.aux_losses import load_balancing_loss, router_z_loss
from tests.tiny_model import FIELDS, TieConfig, build, inputs, loss

AUX, Z = FIELDS["moe_aux_loss_coeff"], FIELDS["moe_z_loss_coeff"]
TOP_K = FIELDS["moe_router_topk"]


@pytest.fixture(autouse=True)
def clean_tracker(one_process: None) -> Iterator[None]:
    clear_aux_losses_tracker()
    yield
    clear_aux_losses_tracker()


@contextmanager
def router_logits(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Each router call's logits [sequence, batch, experts], in order."""
    seen: list[Tensor] = []

    def keep(router: torch.nn.Module, arguments: tuple, output: tuple) -> None:
        seen.append((arguments[0] @ router.weight.T).detach())

    hooks = [layer.router.register_forward_hook(keep) for layer in tied_layers(model)]
    yield seen
    for hook in hooks:
        hook.remove()


def per_batch(logits: Tensor) -> float:
    return load_balancing_loss(logits.flatten(0, 1), TOP_K).item()


def per_sequence(logits: Tensor) -> float:
    """The balance within each sequence, averaged over the batch."""
    return sum(load_balancing_loss(sequence, TOP_K).item() for sequence in logits.unbind(1)) / logits.shape[1]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_means_over_layers_and_micro_batches():
    model = build()
    with router_logits(model) as seen:
        for seed in range(3):
            loss(model, inputs(seed=seed))
    assert len(seen) == 6 * 3
    found = take_moe_losses(model.config, 6, micro_batches=3)
    aux, z = mean([per_batch(x) for x in seen]), mean([router_z_loss(x.flatten(0, 1)).item() for x in seen])
    assert (found.aux_loss, found.z_loss) == pytest.approx((aux, z), rel=1e-5)
    assert found.objective == pytest.approx(6 * (AUX * aux + Z * z), rel=1e-5)


def test_what_was_taken_is_forgotten():
    model = build()
    loss(model, inputs())
    first = take_moe_losses(model.config, 6, 1)
    assert first.aux_loss > 0.5
    assert vars(take_moe_losses(model.config, 6, 1)) == {"aux_loss": 0.0, "z_loss": 0.0, "objective": 0.0}
    loss(model, inputs())
    assert take_moe_losses(model.config, 6, 1) == first


def test_balance_within_sequences():
    model = build(moe_router_load_balancing_type="seq_aux_loss")
    with router_logits(model) as seen:
        loss(model, inputs(sequences=3))
    found = take_moe_losses(model.config, 6, 1)
    assert found.aux_loss == pytest.approx(mean([per_sequence(x) for x in seen]), rel=1e-5)
    assert found.aux_loss != pytest.approx(mean([per_batch(x) for x in seen]), rel=1e-3)


def test_two_kinds_of_balance_at_once_each_with_its_coefficient():
    model = build(
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"],
        moe_aux_loss_coeff=[0.5, 0.25],
        moe_z_loss_coeff=None,
    )
    with router_logits(model) as seen:
        loss(model, inputs(sequences=3))
    found = take_moe_losses(model.config, 6, 1)
    batch, sequence = sum(map(per_batch, seen)), sum(map(per_sequence, seen))
    assert found.objective == pytest.approx(0.5 * batch + 0.25 * sequence, rel=1e-5)
    assert found.z_loss == 0.0


def test_only_moe_layers_count():
    model = build(TieConfig(banks=[0, 1, 1]), moe_layer_freq=[0, 1, 1, 0, 1, 0])
    with router_logits(model) as seen:
        loss(model, inputs())
    assert len(seen) == 3
    found = take_moe_losses(model.config, 3, 1)
    assert found.aux_loss == pytest.approx(mean([per_batch(x) for x in seen]), rel=1e-5)


def test_wider_layers_are_weighed_by_their_own_number_of_experts():
    model = build(TieConfig(banks=[0, 1, 1, 1, 2, 2], num_tied_experts=16))
    with router_logits(model) as seen:
        loss(model, inputs())
    assert [logits.shape[-1] for logits in seen] == [8, 16, 16, 16, 16, 16]
    assert take_moe_losses(model.config, 6, 1).aux_loss == pytest.approx(mean([per_batch(x) for x in seen]), rel=1e-5)


@pytest.mark.parametrize(
    "off", [{"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}, {"moe_router_load_balancing_type": "none"}]
)
def test_what_is_off_is_zero(off):
    model = build(**off)
    loss(model, inputs())
    found = take_moe_losses(model.config, 6, 1)
    assert found.aux_loss == 0.0
    assert found.objective == pytest.approx(6 * Z * found.z_loss if "moe_z_loss_coeff" not in off else 0.0)


def test_evaluation_is_not_tracked():
    model = build()
    model.eval()
    with torch.no_grad():
        loss(model, inputs())
    assert take_moe_losses(model.config, 6, 1).aux_loss == 0.0


def test_recompute_counts_a_micro_batch_once():
    model = build(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    loss(model, inputs()).backward()
    recomputed = take_moe_losses(model.config, 6, 1)
    loss(build(), inputs())
    assert vars(recomputed) == pytest.approx(vars(take_moe_losses(model.config, 6, 1)), rel=1e-6)
