"""Cosine and cancellation of gradients, and what is sampled of a large one."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_tied import TieConfig
from megatron_tied.layers.banks import gradient_sites
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.layers.weight_gradient import Site
from megatron_tied.monitor import use_sites
from megatron_tied.monitor.use_sites import UseSiteGradients, gradient_agreement
from tests.tiny_model import build


def products(*gradients: list[float]) -> torch.Tensor:
    stacked = torch.tensor(gradients, dtype=torch.float64)
    return stacked @ stacked.t()


def test_all_pull_one_way():
    figures = gradient_agreement(products([1.0, 2.0], [2.0, 4.0], [0.5, 1.0]))
    assert figures["gradient_cosine"] == pytest.approx(1)
    assert figures["gradient_cosine_min"] == pytest.approx(1)
    assert figures["gradient_cancellation"] == pytest.approx(0)


def test_two_that_cancel():
    figures = gradient_agreement(products([1.0, -3.0], [-1.0, 3.0]))
    assert (figures["gradient_cosine"], figures["gradient_cancellation"]) == (pytest.approx(-1), pytest.approx(1))


def test_mean_and_smallest_of_the_pairs():
    figures = gradient_agreement(products([1.0, 0.0], [0.0, 2.0], [1.0, 1.0]))
    assert figures["gradient_cosine"] == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)
    assert figures["gradient_cosine_min"] == pytest.approx(0)
    assert figures["gradient_cancellation"] == pytest.approx(1 - math.hypot(2, 3) / (3 + math.sqrt(2)))


def test_without_gradients_there_is_no_figure():
    assert all(math.isnan(value) for value in gradient_agreement(torch.zeros(3, 3, dtype=torch.float64)).values())


@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 10, 20), (2, 64, 64)])
def test_a_sample_is_bounded_and_sees_every_column(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(use_sites, "_SAMPLE", 200)
    columns = torch.arange(shape[-1]).expand(shape).contiguous()
    sample = use_sites._sample(columns)
    assert min(200, columns.numel()) / 2 < sample.numel() <= 200
    assert set(sample.tolist()) == set(range(shape[-1]))


def test_a_small_gradient_is_taken_whole():
    gradient = torch.randn(4, 6, 8)
    assert torch.equal(use_sites._sample(gradient), gradient.flatten())


def test_a_sampled_cosine_is_near_the_whole_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(use_sites, "_SAMPLE", 2**14)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(8, 512, 256, generator=generator)
    pair = [common + torch.randn(common.shape, generator=generator) for _ in range(2)]
    whole = gradient_agreement(products(*(gradient.flatten().tolist() for gradient in pair)))
    samples = torch.stack([use_sites._sample(gradient) for gradient in pair]).double()
    found = gradient_agreement(samples @ samples.t())
    assert found["gradient_cosine"] == pytest.approx(whole["gradient_cosine"], abs=0.02)


def with_gradient(gradient: torch.Tensor) -> Site:
    """A use site that gives `gradient` [experts, out, in]: each expert's tokens are the unit vectors."""
    experts, _, width = gradient.shape
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * width
    return Site(torch.eye(width).repeat(experts, 1), gradient.transpose(1, 2).flatten(0, 1), ends)


@pytest.mark.usefixtures("one_process")
def test_weights_of_different_size_count_by_their_size(monkeypatch: pytest.MonkeyPatch):
    """The gradients of one weight agree, those of another, half as large, are opposed: both sampled to one length."""
    monkeypatch.setattr(use_sites, "_SAMPLE", 500)
    model = build(TieConfig(banks=[0, 0]), num_layers=2)
    sites = list(gradient_sites(next(tied_layers(model)).experts))
    watch = UseSiteGradients(model)
    watch.begin()
    generator = torch.Generator().manual_seed(0)
    for site, shape, sign in zip(sites, ((8, 32, 32), (8, 32, 16)), (1, -1), strict=True):
        gradient = torch.randn(shape, generator=generator)
        site.add(with_gradient(gradient))
        site.add(with_gradient(sign * gradient))
    (found,) = map(gradient_agreement, watch.take().values())
    assert found["gradient_cosine"] == pytest.approx(1 / 3, abs=0.06)
    assert found["gradient_cancellation"] == pytest.approx(1 - math.sqrt(2 / 3), abs=0.03)
