"""Other banks over the same weights: merging, permuting, untying."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tied.convert.checkpoint_output import checkpoint_pieces, run_of, write_checkpoint
from megatron_tied.convert.hf_source import HuggingFaceSource
from megatron_tied.convert.live_model import logits, model_of
from megatron_tied.convert.pieces import Written
from megatron_tied.convert.retied import AverageMerge, Merge, OwnerMerge, RetiedSource
from megatron_tied.convert.sources import CheckpointSource, WeightSource
from megatron_tied.inference.processes import one_process
from megatron_tied.topology import Bank, TieConfig
from tests.convert.hf_models import assert_same_bits, convert, save, some_tokens, tensors

BANKS = (0, 1, 1, 1, 2, 2)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceSource:
    return HuggingFaceSource(save("olmoe", tmp_path_factory.mktemp("untied") / "model"))


def tied(source: WeightSource, merge: Merge | None = None) -> RetiedSource:
    topology = source.config.topology(TieConfig(banks=BANKS))
    return RetiedSource(source, topology, merge or AverageMerge())


def test_owner_and_average(untied: HuggingFaceSource) -> None:
    topology = untied.config.topology(TieConfig(banks=BANKS))
    of_owner = RetiedSource(untied, topology, OwnerMerge())
    for layer in range(6):
        group = [other for other in range(6) if BANKS[other] == BANKS[layer]]
        own = [untied.read_experts(other, "up") for other in group]
        assert torch.equal(of_owner.read_experts(layer, "up"), own[0])
        torch.testing.assert_close(tied(untied).read_experts(layer, "up"), sum(own) / len(own))
    name = "decoder.layers.2.mlp.router.weight"
    assert torch.equal(of_owner.read(name), untied.read(name))


class Shuffled(OwnerMerge):
    """Layer 2's experts go to other places, and all layers get them."""

    order = torch.tensor([3, 0, 1, 2, 7, 6, 5, 4])

    def permutation(self, layer: int) -> torch.Tensor | None:
        return self.order if layer == 2 else None

    def experts(self, base: WeightSource, bank: Bank, kind: str) -> torch.Tensor:
        return base.read_experts(2, kind)[self.order]


def test_permutations_move_the_routers_of_their_layers(untied: HuggingFaceSource) -> None:
    source = RetiedSource(untied, untied.config.topology(TieConfig(banks=(0, 1, 2, 2, 3, 4))), Shuffled())
    assert torch.equal(source.read_experts(3, "down"), untied.read_experts(2, "down")[Shuffled.order])
    router = "decoder.layers.2.mlp.router.weight"
    assert torch.equal(source.read(router), untied.read(router)[Shuffled.order])
    for layer in (1, 3):
        other = router.replace("2", str(layer))
        assert torch.equal(source.read(other), untied.read(other))


def test_a_layer_whose_experts_and_router_are_permuted_computes_the_same(untied: HuggingFaceSource) -> None:
    source = RetiedSource(untied, untied.config.topology(TieConfig(banks=(0, 1, 2, 2, 3, 4))), Shuffled())

    class Third:
        """Layer 3 as it was: it is layer 2 that must not have changed."""

        config, topology = source.config, source.topology

        def read(self, name: str) -> torch.Tensor:
            return source.read(name)

        def read_experts(self, layer: int, kind: str) -> torch.Tensor:
            return untied.read_experts(layer, kind) if layer == 3 else source.read_experts(layer, kind)

    with one_process():
        found, expected = (logits(model_of(view), some_tokens()) for view in (Third(), untied))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tying_again_and_untying_keep_bits(tmp_path: Path) -> None:
    original = save("qwen3_moe_unnormalised", tmp_path / "original")
    banks = ",".join(map(str, BANKS))
    once = convert("hf", "megatron-tied", original, tmp_path / "once", "--tie-banks", banks)
    untied = convert("megatron-tied", "megatron-tied", once, tmp_path / "untied", "--tie-group-size", "1")
    assert CheckpointSource(untied).topology.describe() == "6 layers: 0 1 2 3 4 5"
    twice = convert("megatron-tied", "megatron-tied", untied, tmp_path / "twice", "--tie-banks", banks)
    # The mean of equal numbers is that number, but for rounding of thirds.
    for name, tensor in tensors(once).items():
        torch.testing.assert_close(tensors(twice)[name], tensor, rtol=1e-6, atol=0)
    other = convert("megatron-tied", "hf", untied, tmp_path / "plain")
    assert_same_bits(tensors(other), tensors(convert("megatron-tied", "hf", once, tmp_path / "plain_tied")))
    same = convert("megatron-tied", "megatron-tied", once, tmp_path / "same", "--tie-banks", banks)
    assert_same_bits(tensors(same), tensors(once))


def test_a_bf16_mean_is_rounded_once(tmp_path: Path) -> None:
    source = HuggingFaceSource(save("olmoe", tmp_path / "model", dtype=torch.bfloat16))
    mean = torch.stack([source.read_experts(layer, "gate").float() for layer in (1, 2, 3)]).mean(0)
    found = tied(source).read_experts(2, "gate")
    assert found.dtype == torch.bfloat16
    assert (found.float() - mean).abs().max() <= mean.abs().max() / 256
    assert (found == mean.bfloat16()).float().mean() > 0.999


def test_a_checkpoint_holds_each_bank_once(untied: HuggingFaceSource, tmp_path: Path) -> None:
    source = tied(untied)
    written = Written(checkpoint_pieces(source, None))
    write_checkpoint(source, written, tmp_path, run=run_of(source, tmp_path), imported=True)
    owners = {name.split(".")[2] for name in tensors(tmp_path) if ".experts." in name}
    assert owners == {"0", "1", "4"}
