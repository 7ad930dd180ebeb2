"""When an expert counts as dead: in a layer, in a bank, and over a restart."""

from __future__ import annotations

import json

import torch

from megatron_tied.monitor.dead_experts import LastUse


def used(last: LastUse, step: int, layer: int, *counts: int) -> None:
    last.note(step, layer, torch.tensor(counts, dtype=torch.float64))


def test_dead_after_the_window_and_alive_with_one_token():
    last = LastUse()
    used(last, 10, 0, 5, 0, 3, 0)
    assert last.dead_fraction(10, 20, [0]) == 0
    used(last, 20, 0, 1, 0, 0, 0)
    assert last.dead_fraction(19, 20, [0]) == 0
    assert last.dead_fraction(20, 20, [0]) == 0.5
    used(last, 30, 0, 1, 1, 0, 0)
    assert last.dead_fraction(30, 20, [0]) == 0.5  # the third since step 10, the fourth for ever
    assert last.dead_fraction(50, 20, [0]) == 1.0


def test_dead_in_one_layer_may_live_in_another():
    last = LastUse()
    used(last, 100, 2, 9, 0, 0)
    used(last, 100, 3, 0, 9, 0)
    assert last.dead_fraction(100, 100, [2]) == last.dead_fraction(100, 100, [3]) == 2 / 3
    assert last.dead_fraction(100, 100, [2, 3]) == 1 / 3


def test_a_run_that_goes_on_counts_on():
    last, later = LastUse(), LastUse()
    used(last, 40, 1, 1, 0)
    later.restore(json.loads(json.dumps(last.to_dict())))
    used(later, 60, 1, 0, 1)
    assert later.dead_fraction(89, 50, [1]) == 0
    assert later.dead_fraction(90, 50, [1]) == 0.5


def test_a_layer_with_another_number_of_experts_begins_anew():
    last = LastUse()
    last.restore({"0": [7, 7]})
    used(last, 8, 0, 0, 1, 0)
    assert last.to_dict() == {"0": [0, 8, 0]}
