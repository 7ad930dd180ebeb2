"""Golden results over files of every shape, and what must hold for all of them."""

from __future__ import annotations

import difflib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.patching import deepspeed_json, shell, yaml_files
from megatron_tied.patching.config_patch import ConfigPatch, patch_text
from megatron_tied.patching.edits import Edit
from megatron_tied.patching.request import TieRequest
from tests.patching.config_cases import CASES, OPTIONS, SCRIPTS, golden, source

# Prints each argument with which it is started, into the file that CALLS names.
RECORDER = '#!/bin/bash\nprintf "%s\\n" "--- ${0##*/}" "$@" >> "$CALLS"\n'


def patched(name: str, text: str | None = None, **changed: object) -> ConfigPatch:
    request = TieRequest.of({**OPTIONS[name], **changed})
    return patch_text(CASES / name, source(name) if text is None else text, request)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_result_is_as_it_should_be(name: str) -> None:
    assert patched(name).after == golden(name)


@pytest.mark.parametrize("name", OPTIONS)
def test_line_endings_stay_as_they_are(name: str) -> None:
    assert patched(name, source(name).replace("\n", "\r\n")).after == golden(name).replace("\n", "\r\n")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_last_line_without_an_end_stays_so(name: str) -> None:
    assert patched(name, source(name).rstrip("\n")).after == golden(name).rstrip("\n")


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_is_changed_twice(name: str) -> None:
    again = patched(name, golden(name))
    assert again.after == golden(name)
    assert again.is_tied == (name not in ("recipe.yaml", "ds_config.json"))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("recipe.yaml", "ds_config.json")])
def test_another_tie_than_that_of_the_file_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--moe-tie-skip-last = .*: is what this file ties by already, but 1 is asked"
    ):
        patched(name, golden(name), skip_last=1)


@pytest.mark.parametrize("name", OPTIONS)
def test_lines_are_only_added_but_for_those_that_are_extended(name: str) -> None:
    before, after = source(name).splitlines(), golden(name).splitlines()
    changed = [line[2:] for line in difflib.ndiff(before, after) if line.startswith("- ")]
    rest = " ".join(line[2:] for line in difflib.ndiff(before, after) if line.startswith("+ "))
    if name != "ds_config.json":
        assert all(word in rest for line in changed for word in line.replace('"', " ").split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs_what_it_ran_with_our_arguments_more(name: str, tmp_path: Path) -> None:
    before = started_by(source(name), tmp_path / "before")
    after = started_by(golden(name), tmp_path / "after")
    ours = TieRequest.of(OPTIONS[name]).flags()
    equal = name == "command.sh"
    flags = (
        [f"{flag}={value}" for flag, value in ours.items()]
        if equal
        else [part for pair in ours.items() for part in pair]
    )
    anchor = before.index("--num-experts=8") + 1 if equal else before.index("--num-experts") + 2
    expected = [*before[:anchor], *flags, *before[anchor:]]
    if name != "launched.sh":
        script = next(index for index, word in enumerate(expected) if word.endswith(".py"))
        expected[script:script] = [*(["--use_env"] if name == "command.sh" else []), "-m", "megatron_tied.megatron_lm"]
    assert after == expected


def started_by(text: str, directory: Path) -> list[str]:
    """The words with which a script starts Python, in bash."""
    programs = directory / "programs"
    programs.mkdir(parents=True)
    stubs = dict.fromkeys(("torchrun", "python", "python3"), RECORDER)
    stubs |= {"sbatch": "#!/bin/bash\nexec bash -s\n", "srun": '#!/bin/bash\nexec "$@"\n'}
    for program, content in stubs.items():
        (programs / program).write_text(content)
        (programs / program).chmod(0o755)
    (directory / "common.sh").write_text("")
    calls = directory / "calls"
    environment = {
        "PATH": f"{programs}:{os.defpath}:/usr/bin:/bin",
        "CALLS": str(calls),
        "ROOT": str(directory),
        "RUNNER": "python",
        "MEGATRON": ".",
    }
    subprocess.run(
        ["bash", "-c", text, "script", "small"], cwd=directory, env=environment, check=True, capture_output=True
    )
    return calls.read_text().replace(str(directory), "DIRECTORY").splitlines()


def test_every_branch_with_experts_is_tied() -> None:
    text = (
        "if [ $1 = a ]; then\n  moe='--num-experts 8 --moe-router-topk 2'\nelse\n  moe='--num-experts 16'\nfi\n"
        "python pretrain_gpt.py --num-layers 8 $moe\n"
    )
    after = patched("array.sh", text).after
    assert "'--num-experts 8 --moe-tie-group-size 4 --moe-router-topk 2'" in after
    assert "'--num-experts 16 --moe-tie-group-size 4'" in after


def test_a_command_whose_last_line_has_no_continuation_is_continued() -> None:
    text = "python pretrain_gpt.py \\\n    --num-layers 8 \\\n    --num-experts 8\necho done\n"
    expected = text.replace("py \\", "py \\").replace("experts 8\n", "experts 8 \\\n    --moe-tie-group-size 4\n")
    assert patched("array.sh", text).after == expected.replace("python ", "python -m megatron_tied.megatron_lm ")


def test_flags_stay_on_a_line_that_they_share() -> None:
    text = 'X=(\n    --num-experts 8 "--bf16"\n)\npython pretrain_gpt.py ${X[@]}\n'
    assert '    --num-experts 8 --moe-tie-group-size 4 "--bf16"\n' in patched("array.sh", text).after


def test_a_here_document_is_a_script() -> None:
    text = "cat > run.sh <<'EOF'\npython pretrain_gpt.py --num-layers 8 \\\n  --num-experts 8 \\\n  --bf16\nEOF\n"
    after = patched("array.sh", text).after
    assert "python -m megatron_tied.megatron_lm pretrain_gpt.py" in after
    assert "  --num-experts 8 \\\n  --moe-tie-group-size 4 \\\n  --bf16\nEOF\n" in after


@pytest.mark.parametrize(
    "line",
    [
        "deepspeed --num_gpus 4 pretrain_gpt.py --num-experts 8",
        "python tools/convert.py --num-experts 8",
        "torchrun hf2mcore_moe.py --num-experts 8",
    ],
)
def test_what_cannot_know_the_flags_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=r"FILE = '\w+\.py': (is started by deepspeed|converts a checkpoint)"):
        patched("array.sh", line)


@pytest.mark.parametrize(
    "line",
    [
        "torchrun --no-python pretrain_gpt.py --num-experts 8",
        "python -m cProfile pretrain_gpt.py --num-experts 8",
        "python -c 'import x' pretrain_gpt.py --num-experts 8",
        "msrun pretrain_gpt.py --num-experts 8",
        "accelerate launch pretrain_gpt.py --num-experts 8",
        "$RUNNER pretrain_gpt.py --num-experts 8",
        "torchrun inference.py --num-experts 8",
    ],
)
def test_a_start_that_is_not_safe_to_change_is_left_and_told(line: str) -> None:
    patch = patched("array.sh", line)
    assert patch.after == f"{line} --moe-tie-group-size 4"
    assert any(".py starts as before; if it trains, it needs: torchrun" in note for note in patch.notes)


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ("torch.distributed.launch", "--use_env "),
        ("torch.distributed.launch --use_env", ""),
        ("torch.distributed.launch --use-env", ""),
        ("torch.distributed.run", ""),
    ],
)
def test_the_old_launcher_of_torch_is_to_put_nothing_before_our_script(options: str, added: str) -> None:
    after = patched("array.sh", f"L='{options}'\npython -m $L pretrain_gpt.py --num-experts 8\n").after
    assert f"python -m $L {added}-m megatron_tied.megatron_lm pretrain_gpt.py" in after


def test_the_launcher_can_be_left_out() -> None:
    patch = patch_text(CASES / "array.sh", source("array.sh"), TieRequest.of({}), launcher=False)
    assert "--moe-tie-group-size 4" in patch.after
    assert "megatron_tied" not in patch.after


def test_flags_without_the_launcher_get_it() -> None:
    by_hand = golden("array.sh").replace("-m megatron_tied.megatron_lm ", "")
    assert patched("array.sh", by_hand).after == golden("array.sh")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("array.sh", "python pretrain_gpt.py --num-layers 8\n", "must say how many experts there are"),
        ("array.sh", "# --num-experts 8\n", "there is nothing in it"),
        ("array.sh", 'A="--num-experts 8\n', "line 1 = '\"': is opened here and never closed"),
        ("array.sh", "A=(--num-experts 8\n", "is opened here and never closed"),
        ("flags.yaml", "MODEL_ARGS: {--num-experts: 8\nX: 1\n", "must be YAML; nothing was changed"),
        ("flags.yaml", "a: 1\n---\nb: 2\n", "must be YAML; nothing was changed"),
        ("flags.yaml", "# nothing\n", "there is nothing in it"),
        ("megatron.yaml", "language_model:\n  num_moe_experts: null\n", "must say how many experts"),
        ("flags.yaml", "- 1\n", "must say how many experts"),
        ("ds_config.json", '{"train_batch_size": }', "line 1 = '}': must be a JSON value; nothing was changed"),
        ("ds_config.json", '{"optimizer": {}}', "must be a ds_config"),
        ("ds_config.json", "[1]", "must be a JSON object"),
    ],
)
def test_bad_files(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        patched(name, text, banks=None, group_size=4)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("array.sh", {"group_size": 9}, "tie.group_size = 9: must be at most 8"),
        ("flags.yaml", {"banks": (0, 1)}, "must have one entry per MoE layer: 12, not 2"),
        ("megatron.yaml", {"banks": None, "skip_first": 8}, "tie.skip_first = 8"),
    ],
)
def test_a_tie_that_does_not_fit_the_layers(name: str, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        patched(name, **changed)


def test_banks_in_a_flow_mapping_are_one_value() -> None:
    text = "A: {--num-layers: 4, --num-experts: 8, --bf16: true}\n"
    after = patched("flow.yaml", text, banks=(0, 1, 1, 2)).after
    assert '--num-experts: 8, --moe-tie-group-size: 2, --moe-tie-banks: "0,1,1,2", --bf16: true}' in after


@pytest.mark.parametrize(
    "end", ["2>&1 | tee log.txt", "> log.txt", "&> log.txt", '"$@"', "${MORE[@]} &", "; exit 0", "# 8"]
)
def test_what_follows_the_number_of_experts_stays_behind_our_flags(end: str) -> None:
    after = patched("array.sh", f"python pretrain_gpt.py --num-experts 8 {end}\n").after
    assert after.endswith(f" pretrain_gpt.py --num-experts 8 --moe-tie-group-size 4 {end}\n")


def test_a_script_with_a_yaml_file_needs_the_launcher_only() -> None:
    patch = patched("array.sh", "torchrun pretrain_gpt.py --yaml-cfg model.yaml\n")
    assert patch.after == "torchrun -m megatron_tied.megatron_lm pretrain_gpt.py --yaml-cfg model.yaml\n"
    assert patch.notes == ["the tie groups belong into model.yaml, which --yaml-cfg names: patch it, too"]
    again = patched("array.sh", patch.after)
    assert (again.changes, again.is_tied) == (False, True)


def test_recompute_under_zero_is_warned_about() -> None:
    text = '{"zero_optimization": {"stage": 2}, "activation_checkpointing": {}}'
    (problem,) = patched("ds_config.json", text).warnings
    assert "with ZeRO 2 reentrant recompute loses gradients" in problem.valid
    for harmless in (text.replace("2", "0"), text.replace('"stage": 2', ""), '{"zero_optimization": {"stage": 2}}'):
        assert patched("ds_config.json", harmless).warnings == []


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("model: {num_moe_experts: 8}\n", "cfg.model.num_layers"),
        ("A:\n  model.config.num_moe_experts: 8\n  model.config.num_layers: 12\n", "12"),
    ],
)
def test_what_a_recipe_says_of_its_layers(text: str, layers: str) -> None:
    patch = patched("recipe.yaml", text)
    assert not patch.changes
    moe = f"moe_layers(cfg.model.moe_layer_freq, {layers})"
    assert f"    topology = TieTopology.build(TieConfig(group_size=2), {layers}, {moe})" in patch.notes


def test_what_a_recipe_is_given_ties_the_layers_that_are_reported() -> None:
    text = "model: {num_moe_experts: 8, num_layers: 9, moe_layer_freq: [0, 0, 0, 1, 1, 1, 1, 1, 1], hidden_size: 8}"
    patch = patch_text(Path("recipe.yaml"), text, TieRequest.of({"group_size": 2, "skip_first": 1, "skip_last": 1}))
    model = SimpleNamespace(moe_layer_freq=[0, 0, 0, 1, 1, 1, 1, 1, 1], register_pre_wrap_hook=lambda hook: None)
    given: dict[str, Any] = {"cfg": SimpleNamespace(model=model)}
    exec("\n".join(line.strip() for line in patch.notes if line.startswith("    ")), given)
    assert given["topology"].describe() == "9 layers: 3 [4 5] [6 7] 8; dense: 0 1 2"


@pytest.mark.parametrize(
    ("name", "text", "suffix"),
    [
        ("run", "#!/bin/bash\npython pretrain_gpt.py --num-experts 8\n", "experts 8 --moe-tie-group-size 4\n"),
        ("arguments", "# ours\n--num-experts 8\n", "--num-experts 8\n--moe-tie-group-size 4\n"),
        ("config", "A:\n  --num-experts: 8\n", "--num-experts: 8\n  --moe-tie-group-size: 4\n"),
        (
            "ds",
            '{"prescale_gradients": true, "train_batch_size": 8}',
            '{"prescale_gradients": false, "train_batch_size": 8}',
        ),
    ],
)
def test_a_name_without_an_end_is_known_by_its_content(name: str, text: str, suffix: str) -> None:
    assert patch_text(Path(name), text, TieRequest.of({})).after.endswith(suffix)


@pytest.mark.parametrize("name", ["train.py", "README.md", "pyproject.toml"])
def test_files_of_other_kinds_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must be a launch script, a file of arguments, YAML, or a ds_config"):
        patch_text(Path(name), "--num-experts 8\n", TieRequest.of({}))


@pytest.mark.parametrize("name", ["ds_config.json", "flags.yaml", "lines.args"])
def test_a_byte_order_mark_stays(name: str) -> None:
    assert patched(name, f"\ufeff{source(name)}").after == f"\ufeff{golden(name)}"


@pytest.mark.parametrize(
    "text",
    [
        "usage() {\n  cat <<EOF\n  --num-experts N  how many\nEOF\n}\n",
        "cat <<-'EOF' >&2\n\t--num-experts 8\n\tEOF\n",
        "echo --num-experts 8\n",
        'if [ "$1" = --num-experts ]; then shift; fi\n',
        "case $1 in --num-experts) X=$2 ;; esac\n",
        "getopt --num-experts\n",
    ],
)
def test_what_is_shown_or_compared_is_no_argument(text: str) -> None:
    after = patched("array.sh", f"{text}python pretrain_gpt.py --num-experts 8\n").after
    assert (
        after == f"{text}python -m megatron_tied.megatron_lm pretrain_gpt.py --num-experts 8 --moe-tie-group-size 4\n"
    )


@pytest.mark.parametrize("redirected", ["cat > run.args <<EOF", "cat <<EOF | sbatch", "cat <<EOF >>run.args"])
def test_a_document_that_is_written_is_patched(redirected: str) -> None:
    after = patched("array.sh", f"{redirected}\n--num-experts 8\nEOF\n").after
    assert after == f"{redirected}\n--num-experts 8\n--moe-tie-group-size 4\nEOF\n"


def spoilt(function: Callable[..., Edit]) -> Callable[..., Edit]:
    """An edit that takes a character away, too."""

    def spoil(*args: object) -> Edit:
        edit = function(*args)
        return edit._replace(start=edit.start - 1)

    return spoil


def test_a_script_whose_other_words_would_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "_flags_edit", spoilt(shell._flags_edit))
    with pytest.raises(ConfigError, match="line 6 = '--num-experts': stands where nothing can be added safely"):
        patched("closing.sh")
    with pytest.raises(ConfigError, match="line 1 = '--num-experts': stands where nothing can be added safely"):
        patched("array.sh", "python pretrain_gpt.py --num-experts 16 --bf16")


def test_yaml_whose_other_keys_would_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_files, "insertion", spoilt(yaml_files.insertion))
    for name, line, key in (("megatron.yaml", 9, "num_moe_experts"), ("flow.yaml", 2, "--num-experts")):
        with pytest.raises(ConfigError, match=f"line {line} = '{key}': stands where nothing can be added safely"):
            patched(name, source(name).replace("      # used", "").replace("experts: 8", "experts: 18"))


def test_json_whose_other_members_would_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(text: str, path: tuple[str, ...]) -> tuple[Edit, str]:
        place = text.index('"prescale')
        return Edit(text.index("32"), place + len('"prescale_gradients": true'), '33, "prescale_gradients": false'), ""

    monkeypatch.setattr(deepspeed_json, "_change", change)
    with pytest.raises(ConfigError, match="train_batch_size = '32': stands where nothing can be changed safely"):
        patched("ds_config.json", '{"train_batch_size": 32, "prescale_gradients": true}')


@pytest.mark.parametrize(
    ("pattern", "topology"),
    [
        ("'([0]*4 + [1]*8)'", "12 layers: 4 5 [6 7 8 9] 10 11; dense: 0 1 2 3"),
        ("[0]*4+[1]*8", "12 layers: 4 5 [6 7 8 9] 10 11; dense: 0 1 2 3"),
        ("${PATTERN:-1}", "12 layers: 0 1 [2 3 4 5] [6 7 8 9] 10 11"),
        ("$PATTERN", None),
    ],
)
@pytest.mark.parametrize("line", ["({0})", '" {0} "'])
def test_moe_layers_of_a_script(pattern: str, topology: str | None, line: str) -> None:
    flags = (
        f"--num-layers 12 --hidden-size 64 --num-attention-heads 4 --moe-layer-freq {pattern} --num-experts 8 --bf16"
    )
    patch = patched("array.sh", f"X={line.format(flags)}\npython pretrain_gpt.py $X\n")
    assert (patch.saved.topology.describe() if patch.saved else None) == topology
    assert any("--moe-layer-freq depends on what this file does not say" in note for note in patch.notes) == (
        not topology
    )


TIED_SCRIPT = (
    "torchrun -m megatron_tied.megatron_lm pretrain_gpt.py --num-layers {layers} --hidden-size 64 "
    "--num-attention-heads 4 --num-experts 8 --moe-tie-group-size 4 --moe-tie-skip-first 0 --moe-tie-skip-last {last}\n"
)


def test_a_tied_file_is_judged_by_what_it_says() -> None:
    patch = patch_text(Path("run.sh"), TIED_SCRIPT.format(layers=4, last=0), TieRequest.of({}))
    assert (patch.changes, patch.is_tied) == (False, True)
    assert patch.saved.topology.describe() == "4 layers: [0 1 2 3]"
    unknown = patch_text(Path("run.sh"), TIED_SCRIPT.format(layers=8, last="$LAST"), TieRequest.of({}))
    assert unknown.saved.topology.describe() == "8 layers: 0 1 [2 3 4 5] 6 7"  # what would be asked for
    with pytest.raises(ConfigError, match="--moe-tie-skip-last = -1: must be an integer >= 0"):
        patch_text(Path("run.sh"), TIED_SCRIPT.format(layers=4, last=-1), TieRequest.of({}))
    with pytest.raises(ConfigError, match="--moe-tie-skip-last = 'few': cannot be read: invalid int value"):
        patch_text(Path("run.sh"), TIED_SCRIPT.format(layers=4, last="few"), TieRequest.of({}))


def test_a_script_that_also_starts_megatron_deepspeed_is_refused() -> None:
    text = "torchrun pretrain_gpt.py --num-experts 8\ndeepspeed pretrain_other.py --num-experts 8\n"
    convert = text.replace("pretrain_other.py", "tools/convert_ckpt.py")
    assert patch_text(Path("run.sh"), convert, TieRequest.of({})).changes
    with pytest.raises(ConfigError, match=r"pretrain_other\.py.*is started by deepspeed, and Megatron-DeepSpeed"):
        patch_text(Path("run.sh"), text, TieRequest.of({}))


@pytest.mark.parametrize("name", ["quickstart.yaml", "paper/configs/main/deepseek-regular-g1.yaml"])
def test_a_run_config_of_ours_is_known(name: str) -> None:
    path = Path(__file__).parents[2] / "examples" / name
    with pytest.raises(ConfigError, match="is a run config of this package, which ties by its own section"):
        patch_text(path, path.read_text(), TieRequest.of({}))
