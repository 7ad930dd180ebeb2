"""What a run says about itself: which alert, at which step, in which words, and when nothing is said."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from megatron_tied.monitor.alerts import Alerts, AlertSettings, WatchedRun
from megatron_tied.topology import TieConfig, TieTopology

# Banks: 0 (layer 0), 1 (layer 1), 2 (layers 2 3 4 5), 3 (layer 6), 4 (layer 7).
TOPOLOGY = TieTopology.build(TieConfig(group_size=4, num_tied_experts=16), 8)
PEAK = 1e-3
OFF = dict.fromkeys(("dead_fraction", "max_vio", "agreement", "grad_norm_spike", "update_ratio"))
Logged = dict[str, float | None]


def alerts(topology: TieTopology = TOPOLOGY, top_k: int = 2, **settings: object) -> Alerts:
    run = WatchedRun(topology, num_experts=8, top_k=top_k, dead_window=500, peak_lr=PEAK)
    return Alerts(AlertSettings(**settings), run)


def told(watcher: Alerts, metrics: list[Logged]) -> dict[int, list[str]]:
    """What is said at which step, counted from 1."""
    lines = {step: watcher.check(step, logged) for step, logged in enumerate(metrics, 1)}
    return {step: found for step, found in lines.items() if found}


def series(name: str, *values: float | None, **others: float) -> list[Logged]:
    return [{name: value, **others} for value in values]


# ---- each alert: the step, the words, once ------------------------------------------------------------------


def test_dead_experts_of_a_tie_group():
    lines = told(alerts(), series("bank_dead_fraction/02", 0.0, 3 / 16, 4 / 16))
    assert lines == {
        2: [
            "ALERT step 2: bank 2 (layers 2 3 4 5): 3 of 16 experts (18.75 %, bound 0 %) had no token in any layer for "
            "500 steps, in the batches looked at. Look at load/banks and bank_load_min/02 in TensorBoard. A higher "
            "model.moe_aux_loss_coeff usually helps. To change the bound: "
            "monitor.alerts.dead_fraction (null: no alert)."
        ]
    }


def test_dead_experts_of_an_untied_layer():
    (line,) = alerts().check(1200, {"bank_dead_fraction/03": 1 / 8})
    assert line.startswith(
        "ALERT step 1200: bank 3 (layer 6): 1 of 8 experts (12.5 %, bound 0 %) had no token for 500 "
    )


def test_a_layer_of_a_tie_group_may_have_dead_experts():
    assert told(alerts(), series("layer_dead_fraction/02", 0.75, 0.75)) == {}


def test_the_allowed_share_of_dead_experts_is_allowed_in_32_bits_too():
    tenths = TieTopology.build(TieConfig(), 2)
    run = WatchedRun(tenths, num_experts=10, top_k=2, dead_window=500, peak_lr=PEAK)
    watcher = Alerts(AlertSettings(dead_fraction=0.1), run)
    assert watcher.check(1, {"bank_dead_fraction/00": 0.10000000149011612}) == []
    assert len(watcher.check(2, {"bank_dead_fraction/00": 0.2})) == 1


def test_max_vio_of_a_tied_layer_has_the_bound_of_its_own_number_of_experts():
    # 16 experts, top 2: at most 16 / 2 - 1 = 7, and 5 is less than 90 % of it.
    lines = told(alerts(patience=2), series("layer_max_vio/03", 5.1, 5.1, 5.0, 5.1, 5.2, 5.3, 7.0))
    assert lines == {
        6: [
            "ALERT step 6: layer 3 (bank 2): the busiest expert gets 6.3 times its even share of tokens: MaxVio 5.3 of "
            "at most 7 is above 5, for 2 steps now. Look at layer_max_vio/03 and layer_dead_fraction/03 in "
            "TensorBoard. A higher model.moe_aux_loss_coeff usually helps. To change the bound: "
            "monitor.alerts.max_vio (null: no alert)."
        ]
    }
    # 8 experts, top 2: 90 % of 8 / 2 - 1 = 3.
    assert list(told(alerts(patience=1), series("layer_max_vio/07", 2.7, 2.7, 2.71, 2.71))) == [4]


def test_max_vio_with_a_bound_of_its_own():
    lines = told(alerts(max_vio=0.25, patience=0), series("layer_max_vio/00", 0.25, 0.26))
    assert list(lines) == [2]
    assert "MaxVio 0.26 of at most 3 is above 0.25. Look" in lines[2][0]


@pytest.mark.parametrize("every", [1, 10, 40])
def test_patience_is_a_hundred_steps_however_often_is_observed(every):
    watcher = alerts()
    found = [step for step in range(every, 400, every) if watcher.check(step, {"layer_max_vio/00": 3.0})]
    assert found == [next(step for step in range(every, 400, every) if step - every >= 100)]


def test_layers_that_agree_too_much():
    lines = told(alerts(patience=1), series("agreement_overlap/02", 0.91, 0.9, 0.92, 0.93, 0.99))
    assert lines == {
        4: [
            "ALERT step 4: bank 2 (layers 2 3 4 5): its layers choose the same experts for the same token, the group "
            "works as one layer in a loop: overlap 0.93 is above 0.9, for 1 steps now. Look at "
            "agreement_overlap/02 in TensorBoard; if agreement_overlap_chance/02 is as high, few experts get all "
            "tokens: see load/banks. A smaller tie.group_size or a larger tie.num_tied_experts usually helps. To "
            "change the bound: monitor.alerts.agreement (null: no alert)."
        ]
    }


def test_an_untied_layer_agrees_with_nobody():
    assert told(alerts(patience=0), series("agreement_overlap/00", 1.0, 1.0)) == {}


def test_routers_without_a_choice_agree_and_are_even_by_necessity():
    routing = {"agreement_overlap/02": 1.0, "layer_max_vio/02": 1e-7, "layer_max_vio/00": 1e-7}
    all_experts = TieTopology.build(TieConfig(group_size=4), 8)
    assert told(alerts(all_experts, top_k=8, patience=0), [routing]) == {}
    # The tie group has 16 experts, and so a choice; layer 0 has 8.
    (line,) = alerts(top_k=8, patience=0).check(1, routing)
    assert "overlap 1 is above 0.9" in line


def test_a_spike_of_the_gradient_norm():
    norms = [10.0] + [2.0] * 19
    lines = told(alerts(), series("grad_norm", *norms, 16.0, 16.1, 99.0))
    assert lines == {
        22: [
            "ALERT step 22: gradients: grad_norm 16.1 is 8.05 times the median 2 of the last 21 logged values, bound 8 "
            "times; later spikes are not told. Look at train/grad_norm and train/lm_loss in TensorBoard. If the loss "
            "stays high: go on from an earlier checkpoint with a lower optimizer.lr or optimizer.clip_grad. To change "
            "the bound: monitor.alerts.grad_norm_spike (null: no alert)."
        ]
    }


@pytest.mark.parametrize(("before", "expected"), [(19, set()), (20, {21})])
def test_twenty_gradient_norms_are_needed(before, expected):
    assert set(told(alerts(), series("grad_norm", *[1.0] * before, 9.0))) == expected


def test_only_the_last_fifty_gradient_norms_count():
    lines = told(alerts(), series("grad_norm", *[100.0] * 50, *[1.0] * 25, 9.0, 9.0))
    # At step 76 half of the fifty are still 100; the 9.0 of step 76 takes the place of another of them.
    assert lines == {}
    (line,) = told(alerts(), series("grad_norm", *[100.0] * 50, *[1.0] * 26, 9.0))[77]
    assert "9 times the median 1 of the last 50 logged values" in line


def test_a_spike_has_the_bound_that_was_asked_for():
    lines = told(alerts(grad_norm_spike=2.0), series("grad_norm", *[1.0] * 20, 2.0, 2.1))
    assert list(lines) == [22]
    assert "bound 2 times" in lines[22][0]


def test_no_spike_after_norms_of_zero():
    assert told(alerts(), series("grad_norm", *[0.0] * 30, 1.0)) == {}


def test_an_update_that_is_too_large():
    lines = told(alerts(), series("bank_update_ratio/02", 0.2, 0.1, 0.2, 0.3, 0.4, lr=PEAK))
    assert lines == {
        4: [
            "ALERT step 4: bank 2 (layers 2 3 4 5): its update is 0.3 times its weights (norms), above 0.1; 2 measured "
            "steps in a row were out of bounds. Look at bank_update_ratio/02 and bank_gradient_norm/02 in TensorBoard. "
            "A lower optimizer.lr or more optimizer.warmup_steps usually helps. To change the bound: "
            "monitor.alerts.update_ratio (null: no alert)."
        ]
    }


def test_an_update_that_is_too_small():
    tied = told(alerts(), series("bank_update_ratio/02", 1e-6, 9e-7, 9e-7, lr=PEAK))
    assert "its update is 9e-07 times its weights (norms), below 1e-06;" in tied[3][0]
    assert "A higher optimizer.lr or a smaller tie.lr_divisor usually helps." in tied[3][0]
    untied = told(alerts(), series("bank_update_ratio/00", 9e-7, 9e-7, lr=PEAK))
    assert "bank 0 (layer 0)" in untied[2][0]
    assert "A higher optimizer.lr usually helps." in untied[2][0]


# ---- when nothing is said -----------------------------------------------------------------------------------


def test_updates_are_small_during_warm_up_and_at_the_end_of_the_decay():
    small = series("bank_update_ratio/02", *[1e-8] * 5, lr=0.099 * PEAK)
    assert told(alerts(), small) == {}
    large = series("bank_update_ratio/02", *[0.5] * 5, lr=0.099 * PEAK)
    assert told(alerts(), large) == {}
    assert list(told(alerts(), [*small, *series("bank_update_ratio/02", 1e-8, 1e-8, lr=0.1 * PEAK)])) == [7]


def test_the_highest_learning_rate_may_be_higher_than_the_configured():
    after = series("bank_update_ratio/02", *[1e-8] * 5, lr=PEAK)
    assert told(alerts(), [{"lr": 11 * PEAK}, *after]) == {}
    assert list(told(alerts(), [{"lr": 9 * PEAK}, *after])) == [3]


def test_the_learning_rate_may_be_logged_apart_from_the_updates():
    updates = series("bank_update_ratio/02", 1e-8, 1e-8)
    assert told(alerts(), updates * 5) == {}
    assert list(told(alerts(), [{"lr": PEAK}, *updates])) == [3]
    assert told(alerts(), [{"lr": PEAK}, {"lr": 1e-5 * PEAK}, *updates]) == {}


def test_steps_without_a_measurement_neither_count_nor_start_the_count_again():
    dots: list[Logged] = [{"grad_norm": 1.0}, {}, {"layer_max_vio/00": math.nan}, {"layer_max_vio/00": None}]
    high = series("layer_max_vio/00", 2.9, 2.9, 2.9)
    steps = [high[0], *dots, high[1], *dots, high[2]]
    assert list(told(alerts(patience=10), steps)) == [len(steps)]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_no_alert(value):
    names = ["grad_norm", "bank_dead_fraction/02", "layer_max_vio/03", "agreement_overlap/02", "bank_update_ratio/02"]
    ordinary: Logged = {"grad_norm": 1.0, "lr": PEAK}
    steps = [ordinary] * 25 + [dict.fromkeys([*names, "lr"], value)] * 25
    watcher = alerts(patience=0)
    assert told(watcher, steps) == {}
    # What was skipped is not in the median either.
    assert len(watcher.check(51, {"grad_norm": 8.1})) == 1


LOUD: Logged = {
    "lr": PEAK,
    "grad_norm": 1e3,
    "bank_dead_fraction/02": 0.5,
    "layer_max_vio/03": 7.0,
    "agreement_overlap/02": 1.0,
    "bank_update_ratio/02": 1.0,
}
KEYS = {
    "dead_fraction": "bank_dead_fraction/02",
    "max_vio": "layer_max_vio/03",
    "agreement": "agreement_overlap/02",
    "grad_norm_spike": "grad_norm",
    "update_ratio": "bank_update_ratio/02",
}


def test_all_alerts_at_one_step():
    calm = [{"grad_norm": 1.0, "lr": PEAK}] * 20
    lines = told(alerts(patience=1), [*calm, LOUD, LOUD, LOUD])
    assert {step: len(found) for step, found in lines.items()} == {21: 2, 22: 3}


@pytest.mark.parametrize("silent", OFF)
def test_null_silences_an_alert_and_no_other(silent):
    calm = [{"grad_norm": 1.0, "lr": PEAK}] * 20
    lines = told(alerts(patience=0, **{silent: None}), [*calm, LOUD, LOUD])
    keys = {key for found in lines.values() for line in found for key in OFF if f"monitor.alerts.{key} " in line}
    assert keys == OFF.keys() - {silent}
    assert sum(map(len, lines.values())) == 4


@pytest.mark.parametrize("key", OFF)
def test_an_alert_alone_needs_no_other_metric(key):
    calm = [{"grad_norm": 1.0, "lr": PEAK}] * 20
    only = {KEYS[key]: LOUD[KEYS[key]]}
    lines = told(alerts(patience=0), [*calm, only, only])
    assert sum(map(len, lines.values())) == 1


def healthy_run(seed: int, steps: int) -> list[Logged]:
    """Warm-up, cosine decay, a gradient norm that jumps; routing, seen every 10 steps, that starts uneven."""
    noise = random.Random(seed)
    run = []
    for step in range(1, steps + 1):
        lr = PEAK * min(step / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        norm = (0.5 + 5 * math.exp(-step / 40)) * noise.lognormvariate(0, 0.2)
        metrics: Logged = {"lr": lr, "grad_norm": norm * (noise.uniform(2, 3) if noise.random() < 0.03 else 1)}
        if step % 10 == 0:
            start = math.exp(-step / 40)
            for layer in TOPOLOGY.moe_layers:
                metrics[f"layer_max_vio/{layer:02d}"] = 2.5 * start + 0.4 * noise.lognormvariate(0, 0.3)
            for bank in TOPOLOGY.banks:
                # More often than in a real run, where they are expensive: so much the harder.
                metrics[f"bank_update_ratio/{bank.index:02d}"] = 2 * lr * noise.lognormvariate(0, 0.3)
                if step >= 100:
                    metrics[f"bank_dead_fraction/{bank.index:02d}"] = 0.0
            metrics["agreement_overlap/02"] = min(1.0, 0.3 + 0.8 * start * noise.uniform(0.9, 1.1))
        run.append(metrics)
    return run


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_left_in_peace(seed):
    run = healthy_run(seed, 500)
    assert run[9]["layer_max_vio/00"] > 1.5
    assert told(alerts(), run) == {}
    # The same run is loud enough for bounds that are too tight.
    tight = alerts(max_vio=0.1, agreement=0.2, patience=0, grad_norm_spike=2.0, update_ratio=(1e-2, 0.1))
    assert len({line.split(":")[1] for found in told(tight, run).values() for line in found}) > 10


WATCHED = [
    "grad_norm",
    *(f"layer_max_vio/{layer:02d}" for layer in TOPOLOGY.moe_layers),
    *(
        f"{figure}/{bank.index:02d}"
        for bank in TOPOLOGY.banks
        for figure in ("bank_dead_fraction", "bank_update_ratio")
    ),
    "agreement_overlap/02",
]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([*WATCHED, "lr", "lm_loss"]),
            st.none() | st.just(math.nan) | st.floats(0, 1e6),
        ),
        max_size=60,
    ),
    st.integers(0, 3),
)
def test_a_subject_is_told_at_most_once(steps, patience):
    watcher = alerts(patience=patience)
    lines = [line for found in told(watcher, [{"grad_norm": 1.0, "lr": PEAK}] * 20 + steps).values() for line in found]
    # What an alert is about, and the key that silences it.
    subjects = [(line.split(":")[1], line[line.index("monitor.alerts.") :]) for line in lines]
    assert len(subjects) == len(set(subjects)) <= len(WATCHED)
    assert all("\n" not in line for line in lines)


# ---- settings -----------------------------------------------------------------------------------------------


def read(**section: object) -> AlertSettings:
    return TypeAdapter(AlertSettings).validate_json(json.dumps(section), strict=True)


def test_settings_from_a_file():
    assert read() == AlertSettings()
    assert read(**OFF) == AlertSettings(**OFF)
    given = {"dead_fraction": 0.5, "max_vio": "auto", "agreement": 1, "grad_norm_spike": 3, "patience": 1}
    assert read(**given, update_ratio=[0, 1]) == AlertSettings(**given, update_ratio=(0.0, 1.0))
    assert read(max_vio=2) == AlertSettings(max_vio=2.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dead_fraction": 1.1},
        {"dead_fraction": -0.1},
        {"dead_fraction": True},
        {"max_vio": "off"},
        {"max_vio": "3"},
        {"max_vio": -1},
        {"agreement": 1.1},
        {"patience": -1},
        {"patience": 1.5},
        {"grad_norm_spike": 1},
        {"grad_norm_spike": math.inf},
        {"update_ratio": [0.1, 0.1]},
        {"update_ratio": [0.1]},
        {"update_ratio": [-1.0, 0.1]},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        read(**wrong)


def test_alerts_need_no_torch():
    program = "import sys, megatron_tied.monitor.alerts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
