"""When an expert counts as dead: in a layer, in a bank, and over a restart."""

from __future__ import annotations

import json

import torch

from megatron_tied.monitor.dead_experts import LastUse


def used(last: LastUse, step: int, layer: int, *counts: int) -> None:
    last.note(step, {layer: torch.tensor(counts, dtype=torch.float64)})


def test_dead_after_the_window_and_alive_with_one_token():
    last = LastUse(every=10)
    used(last, 10, 0, 5, 0, 3, 0)
    assert last.dead_fraction(10, 20, [0]) == 0
    used(last, 20, 0, 1, 0, 0, 0)
    assert last.dead_fraction(28, 20, [0]) == 0
    # Not known to have been used before the first observation, nor not to have been.
    assert last.dead_fraction(29, 20, [0]) == 0.5
    used(last, 30, 0, 1, 1, 0, 0)
    assert last.dead_fraction(30, 20, [0]) == 0.5  # the third since step 10, the fourth for ever
    assert last.dead_fraction(50, 20, [0]) == 1.0


def test_dead_in_one_layer_may_live_in_another():
    last = LastUse(every=100)
    for step in (100, 200):
        last.note(step, {2: torch.tensor([9.0, 0.0, 0.0]), 3: torch.tensor([0.0, 9.0, 0.0])})
    assert last.dead_fraction(200, 100, [2]) == last.dead_fraction(200, 100, [3]) == 2 / 3
    assert last.dead_fraction(200, 100, [2, 3]) == 1 / 3


def test_a_run_that_goes_on_counts_on():
    last, later = LastUse(every=20), LastUse(every=20)
    used(last, 40, 1, 1, 0)
    later.restore(json.loads(json.dumps(last.to_dict())))
    used(later, 60, 1, 0, 1)
    assert later.dead_fraction(89, 50, [1]) == 0
    assert later.dead_fraction(90, 50, [1]) == 0.5


def test_steps_that_nobody_looked_at_are_no_evidence():
    last = LastUse(every=10)
    used(last, 10, 0, 1, 0)
    used(last, 500, 0, 1, 0)
    assert last.dead_fraction(500, 100, [0]) == 0
    for step in range(510, 610, 10):
        used(last, step, 0, 1, 0)
    assert last.dead_fraction(600, 100, [0]) == 0.5


def test_a_layer_with_another_number_of_experts_begins_anew():
    last = LastUse(every=1)
    last.restore({"observed": 7, "steps": {"0": [7, 7]}})
    used(last, 8, 0, 0, 1, 0)
    assert last.to_dict() == {"observed": 8, "steps": {"0": [7, 8, 7]}}
