"""ZeRO 3 gathers a bank once per forward and once per backward pass for all the layers that use it."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launch import launch

BANK = [f"decoder.layers.1.mlp.experts.{name}" for name in ("fc1_weight", "fc2_weight")]


@pytest.fixture(scope="module")
def gathers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """Gathers per step in every case: with the reuse distance that follows from the banks, and with none."""
    result = tmp_path_factory.mktemp("gathers") / "counts.json"
    launch("tests.distributed.gathers_worker", 2, str(result))
    return json.loads(result.read_text())


@pytest.mark.parametrize("group_size", [2, 4])
@pytest.mark.parametrize(("recompute", "passes"), [("none", 2), ("full", 3)])
def test_a_bank_is_gathered_for_forward_and_for_backward(
    gathers: dict[str, list[dict[str, int]]], recompute: str, passes: int, group_size: int
) -> None:
    ours, without_reuse = gathers[f"{recompute} {group_size}"]
    for name in BANK:
        # Recompute and the backward pass of a layer go together: the bank stays for both.
        assert ours[name] == 2
        # What ZeRO does if it lets a bank go after each layer: the count can tell.
        assert without_reuse[name] == passes * group_size


@pytest.mark.parametrize("group_size", [2, 4])
def test_other_parameters_are_let_go_between_the_passes(
    gathers: dict[str, list[dict[str, int]]], group_size: int
) -> None:
    ours, _ = gathers[f"none {group_size}"]
    assert ours["decoder.layers.1.mlp.router.weight"] == 2
    assert ours["decoder.layers.0.mlp.experts.fc1_weight"] == 2
