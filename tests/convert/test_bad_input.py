"""What cannot be converted is told in words, ends with code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tied.cli.main import main
from megatron_tied.convert import convert as conversion
from megatron_tied.convert import output
from megatron_tied.inference.loading import find_model
from tests.convert.hf_models import convert, save

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("originals")
    for name in ("olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3"):
        save(name, directory / name)
    return directory


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a conversion that must fail; returns what it said."""

    def run(source: str, target: str, directory: Path, *options: str) -> str:
        where = tmp_path / "out"
        before = sorted(tmp_path.iterdir())
        code = main(["convert", "--from", source, "--to", target, "--input", str(directory), *options,
                     *(() if "--output" in options else ("--output", str(where)))])  # fmt: skip
        assert code == 2
        assert sorted(tmp_path.iterdir()) == before
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("olmoe", "model_type", "llama", "must be one of olmoe, qwen3_moe, deepseek_v2, deepseek_v3"),
        ("olmoe", "attention_bias", True, "biases of the attention are not supported"),
        ("olmoe", "hidden_act", "gelu", "must be 'silu'"),
        ("olmoe", "head_dim", 8, "must be hidden_size / num_attention_heads"),
        ("olmoe", "quantization_config", {"quant_method": "fp8"}, "weights must not be quantised"),
        ("olmoe", "rope_parameters", {"rope_type": "linear", "factor": 2.0}, 'must be "default"'),
        ("olmoe", "rope_parameters", {"rope_type": "default", "rope_theta": 0.5}, "must be a whole number"),
        ("olmoe", "num_experts", None, "must be a valid integer"),
        ("olmoe", "num_experts", 7.5, "config.json: num_experts = 7.5: must be a valid integer"),
        ("qwen3_moe", "use_sliding_window", True, "windowed attention is not supported"),
        ("qwen3_moe", "mlp_only_layers", [0, 1, 2, 3, 4, 5], "must leave an MoE layer"),
        ("deepseek_v2", "norm_topk_prob", True, "the Hugging Face class never renormalises"),
        ("deepseek_v2", "rms_norm_eps", 1e-5, "must be 1e-06"),
        ("deepseek_v2", "moe_layer_freq", 2, "MoE layers follow the dense ones"),
        ("deepseek_v2", "num_key_value_heads", 2, "must be num_attention_heads"),
        ("deepseek_v3", "norm_topk_prob", False, "so Megatron-Core weights sigmoid scores"),
        ("deepseek_v3", "topk_group", 1, "topk_group is 2"),
        ("deepseek_v3", "rope_interleave", False, "pairs neighbouring rotary dimensions"),
        ("deepseek_v3", "n_shared_experts", None, "must be at least 1"),
        ("deepseek_v3", "n_group", 3, "must divide n_routed_experts, 8, into groups of at least 2"),
        ("deepseek_v3", "n_group", 8, "into groups of at least 2"),
        ("deepseek_v3", "topk_group", 5, "must be at most n_group, 4"),
        ("deepseek_v3", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "must be given with yarn"),
        ("deepseek_v3", "rope_parameters", {"rope_type": "llama3", "factor": 2.0}, 'must be "default" or "yarn"'),
    ],
)
def test_values_of_config_json(
    name: str, key: str, value: object, message: str, originals: Path, tmp_path: Path, told: Callable[..., str]
) -> None:
    directory = tmp_path / "changed"
    shutil.copytree(originals / name, directory)
    config = json.loads((directory / "config.json").read_text())
    config.pop("num_local_experts", None)
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    error = told("hf", "megatron-tied", directory)
    assert message in error
    assert key in error or key == "num_experts"


def test_group_limited_routing_of_v2_needs_one_score_a_group(
    originals: Path, tmp_path: Path, told: Callable[..., str]
) -> None:
    shutil.copytree(originals / "deepseek_v2", tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    config |= {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config))
    assert "config.json: topk_group = 1" in told("hf", "megatron-tied", tmp_path / "changed")


def test_unknown_keys_are_told(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(originals / "olmoe", tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config | {"attention_sinks": 4}))
    convert("hf", "megatron-tied", tmp_path / "changed", tmp_path / "out", "--no-verify")
    assert "warning: config.json: attention_sinks = 4 is not known here" in capsys.readouterr().out


def _without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(EXPERT), f"lacks {EXPERT}"),
        (_without(NORM), f"lacks {NORM}"),
        (lambda t: t.update({"model.layers.0.mlp.extra": torch.zeros(2)}), "has model.layers.0.mlp.extra, which"),
        (lambda t: t.update({NORM: torch.zeros(32)}), f"{NORM} [32] in place of [64]"),
        (lambda t: t.update({EXPERT: torch.zeros(16, 64)}), f"{EXPERT} [16, 64] in place of [32, 64]"),
        (lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)}), "has tensors of I8"),
        (lambda t: [t.pop(name) for name in list(t) if "norm" in name], " more, which its config asks for"),
    ],
)
def test_tensors_that_are_not_those_of_the_config(
    change: Change, message: str, originals: Path, tmp_path: Path, told: Callable[..., str]
) -> None:
    (tmp_path / "changed").mkdir()
    shutil.copy(originals / "olmoe" / "config.json", tmp_path / "changed")
    tensors: dict[str, Any] = {}
    for path in (originals / "olmoe").glob("*.safetensors"):
        tensors |= load_file(path)
    change(tensors)
    save_file(tensors, tmp_path / "changed" / "model.safetensors")
    assert message in told("hf", "megatron-tied", tmp_path / "changed")


def test_files_that_are_missing_or_broken(originals: Path, tmp_path: Path, told: Callable[..., str]) -> None:
    assert "must be a directory" in told("hf", "hf", tmp_path / "nowhere")
    directory = tmp_path / "changed"
    shutil.copytree(originals / "olmoe", directory)
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    first.unlink()
    assert f"lacks {first.name}, which its index names" in told("hf", "hf", directory)
    shutil.copy(second, first)
    second.write_bytes(second.read_bytes()[:-100])
    assert f"{second} cannot be read" in told("hf", "hf", directory).replace("'", "").replace("= ", "").replace(":", "")
    (directory / "model.safetensors.index.json").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "must be saved as safetensors first" in told("hf", "hf", directory)
    (directory / "config.json").unlink()
    assert "no config.json" in told("hf", "hf", directory)
    assert "is no complete checkpoint" in told("megatron-tied", "hf", directory)


def test_an_index_names_files_beside_it_only(originals: Path, tmp_path: Path, told: Callable[..., str]) -> None:
    shutil.copytree(originals / "olmoe", tmp_path / "changed")
    index = tmp_path / "changed" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/model.safetensors"}}))
    assert "must name files beside it" in told("hf", "hf", tmp_path / "changed")


def test_the_output(originals: Path, tmp_path: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("kept")
    olmoe = originals / "olmoe"
    assert "not empty" in told("hf", "megatron-tied", olmoe, "--output", str(tmp_path / "used"))
    assert "is a file" in told("hf", "megatron-tied", olmoe, "--output", str(tmp_path / "used" / "file"))
    assert "a directory that exists" in told("hf", "megatron-tied", olmoe, "--output", str(tmp_path / "a" / "b"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    error = told("hf", "megatron-tied", olmoe)
    assert "its file system has 0.00 GB free" in error
    assert "needs 0.0" in error


def test_an_empty_directory_will_do(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert("hf", "megatron-tied", originals / "olmoe", tmp_path / "out", "--no-verify")
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_missing_tokenizer(originals: Path, tmp_path: Path, told: Callable[..., str]) -> None:
    olmoe = originals / "olmoe"
    assert "--tokenizer = None: must be given" in told("hf", "hf", olmoe)
    assert "is not there" in told("hf", "hf", olmoe, "--tokenizer", str(tmp_path / "no"))
    assert "must hold a tokenizer" in told("hf", "hf", olmoe, "--tokenizer", str(olmoe))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tie-skip-first", "1"), "must come with --tie-group-size or --tie-banks"),
        (("--tie-group-size", "5"), "tie.group_size = 5"),
        (("--tie-group-size", "0"), "tie.group_size = 0"),
        (("--tie-banks", "0,1"), "tie.banks = [0, 1]"),
        (("--tie-group-size", "2", "--tie-method", "matched"), "--calibration = None: must be given"),
    ],
)
def test_ties_that_do_not_fit(
    options: tuple[str, ...], message: str, originals: Path, told: Callable[..., str]
) -> None:
    assert message in told("hf", "megatron-tied", originals / "olmoe", *options)


def test_what_computes_something_else_is_not_published(
    originals: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(source: Any, *arguments: Any, **options: Any) -> None:
        entry = "decoder.layers.3.self_attention.linear_qkv.weight"
        read = source.read
        source.read = lambda name: read(name).flip(0) if name == entry else read(name)
        write(source, *arguments, **options)

    write = conversion.write_checkpoint
    monkeypatch.setattr(conversion, "write_checkpoint", damaged)
    assert "of the largest logit: more than 0.0001; nothing was written" in told(
        "hf", "megatron-tied", originals / "olmoe"
    )


def test_a_failure_in_the_middle_leaves_nothing(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_tied.convert.shards.save_file", full)
    code = main(["convert", "--from", "hf", "--to", "megatron-tied", "--input", str(originals / "olmoe"),
                 "--output", str(tmp_path / "out")])  # fmt: skip
    assert code == 1
    assert "No space left on device; nothing was written" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_too_large_for_the_check_is_told(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_tied.convert.memory._available_memory", lambda: 1_000_000)
    convert("hf", "megatron-tied", originals / "olmoe", tmp_path / "out")
    assert "the result will not be checked: it needs some 0.0 GB of memory" in capsys.readouterr().out


def test_without_transformers_the_way_out_is_told(
    originals: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_tied.convert.self_check.find_spec", lambda name: None)
    assert "or give --no-verify" in told("hf", "megatron-tied", originals / "olmoe")


def test_help_is_quick() -> None:
    code = (
        "import sys\n"
        "from megatron_tied.cli.main import main\n"
        "try: main(['convert', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not sys.modules.keys() & {'torch', 'transformers', 'numpy', 'safetensors'}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--tie-group-size G" in done.stdout


def test_a_damaged_checkpoint_is_not_read(originals: Path, told: Callable[..., str], tmp_path: Path) -> None:
    checkpoint = convert("hf", "megatron-tied", originals / "olmoe", tmp_path / "checkpoint", "--no-verify")
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    for target in ("hf", "megatron-tied"):
        assert f"is not sound: {file}: is damaged" in told("megatron-tied", target, checkpoint, "--tokenizer", "none")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_converted_says_in_which_precision_it_is(originals: Path, tmp_path: Path, dtype: str) -> None:
    first = convert("hf", "megatron-tied", originals / "olmoe", tmp_path / "a", "--no-verify", "--dtype", dtype)
    other = "bf16" if dtype == "fp32" else "fp32"
    again = convert("megatron-tied", "megatron-tied", first, tmp_path / "b", "--no-verify", "--dtype", other)
    assert [find_model(checkpoint).precision for checkpoint in (first, again)] == [dtype, other]
