"""A run as people compare it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import yaml

from megatron_tied.topology import TieConfig, TieTopology
from tests.monitor.watched_run import describe


def test_hyperparameters():
    values = describe().hparams()
    expected = {
        **{"model.preset": "none", "model.num_layers": 8, "model.num_moe_experts": 16, "model.moe_router_topk": 4},
        **{"tie.group_size": 2, "tie.pattern": "consecutive", "tie.num_tied_experts": 16, "tie.lr_divisor": "sqrt"},
        "tie.share": "all",
        **{"parallel.expert_model_parallel_size": 2, "parallel.tensor_model_parallel_size": 1},
        **{"deepspeed.zero_stage": 2, "train.precision": "bf16", "train.global_batch_size": 32},
        **{"train.seq_length": 1024, "train.seed": 7, "optimizer.lr": 3e-4, "optimizer.warmup_steps": 20},
        **{"parameters.unique": 5_000_000, "parameters.untied": 8_000_000, "world_size": 2},
    }
    assert {name: values[name] for name in expected} == expected


def test_every_run_has_the_same_hyperparameters_so_that_they_compare():
    other = describe(tie={"num_tied_experts": 32}, model={"preset": "olmoe", "moe_aux_loss_coeff": [0.1, 0.2]})
    other = dataclasses.replace(
        other,
        config=dict(other.config) | {"deepspeed": {}},
        topology=TieTopology.build(TieConfig(banks=(0, 1, 1, 1, 2, 2, 2, 2), num_tied_experts=32), 8),
    )
    values = other.hparams()
    assert values.keys() == describe().hparams().keys()
    assert (values["tie.pattern"], values["tie.group_size"], values["tie.num_tied_experts"]) == ("banks", 4, 32)
    assert (values["deepspeed.zero_stage"], values["model.moe_aux_loss_coeff"]) == (1, "[0.1, 0.2]")
    assert all(isinstance(value, (bool, str, int, float)) for value in values.values())


def test_config_is_yaml():
    fence, _, rest = describe().config_markdown().partition("\n")
    body, _, end = rest.rpartition("```")
    assert (fence, end) == ("```yaml", "\n")
    assert yaml.safe_load(body) == describe().config


def test_topology():
    topology = TieTopology.build(TieConfig(group_size=4, skip_first=1, skip_last=1, num_tied_experts=32), 6)
    text = dataclasses.replace(describe(), topology=topology).topology_markdown()
    assert text.splitlines() == [
        "6 layers: 0 [1 2 3 4] 5; experts of tied banks: 32",
        "",
        "| bank | layers | tied | experts | learning rate divided by |",
        "| --- | --- | --- | --- | --- |",
        "| 0 | 0 | no | 16 | 1 |",
        "| 1 | 1 2 3 4 | yes | 32 | 2 |",
        "| 2 | 5 | no | 16 | 1 |",
    ]


def test_parameters():
    lines = describe().parameters_markdown().splitlines()
    assert lines[0] == "Tying saves 37.5% of the parameters."
    assert lines[4:] == ["| unique | 5,000,000 |", "| untied | 8,000,000 |", "| banks | 5 |", "| processes | 2 |"]


def test_no_torch():
    code = "import sys, megatron_tied.monitor.description; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
