"""Weights are streamed: importing a large model takes little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_tied.convert.architectures import architecture_of
from megatron_tied.convert.tensors import entries, expert_name, expert_shape
from megatron_tied.models.config import ModelConfig
from megatron_tied.topology import TieConfig

MODEL = {
    "num_layers": 8,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_moe_experts": 64,
    "moe_ffn_hidden_size": 1024,
    "vocab_size": 32_000,
    "max_position_embeddings": 512,
    "qk_layernorm": True,
}
PEAK = (
    "import sys\n"
    "from megatron_tied.cli.main import main\n"
    "code = main(sys.argv[1:])\n"
    "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
    "sys.exit(code)\n"
)


def synthetic(directory: Path) -> int:
    """A Qwen3-MoE directory with bf16 weights, one file a layer; returns its bytes."""
    config = ModelConfig.resolve(MODEL)
    topology = config.topology(TieConfig())
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(architecture_of(config).write(config)))
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for layer in (None, *range(config.num_layers)):
        tensors = {
            name: torch.randn(shape, generator=generator).bfloat16()
            for entry in entries(config, topology)
            if entry.layer == layer
            for name, shape in zip(entry.theirs, entry.shapes, strict=True)
        }
        for kind in ("gate", "up", "down") if layer is not None else ():
            experts, *shape = expert_shape(config, topology, layer, kind)
            for expert in range(experts):
                tensors[expert_name(layer, expert, kind)] = torch.randn(shape, generator=generator).bfloat16()
        file = f"model-{layer}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * 2 for tensor in tensors.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("tie", [(), ("--tie-group-size", "4")])
def test_the_import_of_a_3_gb_model_peaks_under_1_5_gb(tie: tuple[str, ...], tmp_path: Path) -> None:
    assert synthetic(tmp_path / "model") > 3e9
    command = ["convert", "--from", "hf", "--to", "megatron-tied", "--input", str(tmp_path / "model")]
    options = ["--output", str(tmp_path / "out"), "--no-verify", *tie]
    done = subprocess.run([sys.executable, "-c", PEAK, *command, *options], check=True, capture_output=True, text=True)
    peak = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < 1.5e9
