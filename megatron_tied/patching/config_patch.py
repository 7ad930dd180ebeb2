"""One file of a user's: what it is, what tying adds to it, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.patching.arguments import Arguments
from megatron_tied.patching.bridge import lines_for_recipe
from megatron_tied.patching.conflicts import HYBRID, conflicts
from megatron_tied.patching.deepspeed_json import is_ds_config, read_deepspeed
from megatron_tied.patching.edits import apply_edits
from megatron_tied.patching.formats import Format, format_of
from megatron_tied.patching.json_text import scan_json
from megatron_tied.patching.launcher import LINE_TO_ADD, Launch
from megatron_tied.patching.megatron_arguments import derive, missing, moe_pattern, unknown_layers, why_missing
from megatron_tied.patching.request import TIE_FLAGS, TieRequest
from megatron_tied.patching.savings import Savings, savings
from megatron_tied.patching.shell import ANCHOR, ShellFile, read_shell
from megatron_tied.patching.shell_words import scan_arguments, scan_script
from megatron_tied.patching.yaml_files import is_run_config, read_yaml
from megatron_tied.topology import TieConfig, TieTopology, moe_layers

_MARK = "\ufeff"  # with which some editors begin a file
YAML_CFG = "--yaml-cfg"
_NO_EXPERTS = "must say how many experts there are ({0}): a dense model has none to tie"


@dataclass(frozen=True)
class ConfigPatch:
    """The text of a file before and after, and what people are to know.

    saved: None if the model is not known. notes: what was done or is left to do; warnings: what conflicts.
    is_tied: whether the file asked for the same tie groups before.
    """

    before: str
    after: str
    saved: Savings | None
    notes: Sequence[str]
    warnings: Sequence[Problem]
    is_tied: bool = False

    @property
    def changes(self) -> bool:
        """Whether there is anything to write."""
        return self.before != self.after


def patch_text(path: Path, text: str, request: TieRequest, launcher: bool = True) -> ConfigPatch:
    """What tying adds to the file `path` with the content `text`.

    Raises ConfigError for a file that cannot be read as what it seems to be, has no experts, is tied otherwise
    already, or whose layers the tie groups do not fit.
    """
    if text.startswith(_MARK):
        patch = patch_text(path, text.removeprefix(_MARK), request, launcher)
        return replace(patch, before=text, after=_MARK + patch.after)
    match format_of(path, text):
        case Format.JSON:
            return _deepspeed(text, request)
        case Format.YAML:
            return _yaml(path, text, request, launcher)
        case Format.ARGUMENTS:
            return _shell(path, text, read_shell(scan_arguments(text)), request, launcher)
        case _:
            return _shell(path, text, read_shell(scan_script(text)), request, launcher)


def _shell(path: Path, text: str, file: ShellFile, request: TieRequest, launcher: bool) -> ConfigPatch:
    if file.launches and launcher:
        _check_started(file.launches)
    if not file.anchors:
        return _launched_with_yaml(path, text, file, launcher)
    found = _tie_flags(file.arguments)
    edits = file.edits(request.missing_from(found), launcher)
    tie = request.tie_of(found)
    saved, notes = _savings(file.arguments, tie)
    notes += _launcher_notes(file, launcher)
    return ConfigPatch(text, apply_edits(text, edits), saved, notes, _warnings(file.arguments, tie), bool(found))


def _launched_with_yaml(path: Path, text: str, file: ShellFile, launcher: bool) -> ConfigPatch:
    """A script whose model is in the file that it gives to `--yaml-cfg` needs the launcher only."""
    if YAML_CFG not in file.arguments:
        raise ConfigError(Problem("FILE", str(path), _NO_EXPERTS.format(ANCHOR)))
    after = apply_edits(text, file.edits({}, launcher))
    named = file.arguments.text(YAML_CFG) or "the file"
    notes = [f"the tie groups belong into {named}, which {YAML_CFG} names: patch it, too"]
    tied = any(launch.is_tied for launch in file.launches)
    return ConfigPatch(text, after, None, [*notes, *_launcher_notes(file, launcher)], [], tied)


def _check_started(launches: Sequence[Launch]) -> None:
    """Raise ConfigError if nothing that a script starts can know our flags, or something that gets them cannot."""
    name = launches[0].name
    by_deepspeed = [launch.name for launch in launches if launch.by_deepspeed and not launch.converts]
    if all(launch.converts for launch in launches):
        valid = "converts a checkpoint and trains nothing: must be a script that Megatron-LM's flags train with"
        raise ConfigError(Problem("FILE", name, valid))
    if by_deepspeed:
        valid = (
            "is started by deepspeed, and Megatron-DeepSpeed does not know the flags of tied experts: train with "
            "deepspeed --module megatron_tied.pretrain --config FILE"
        )
        raise ConfigError(Problem("FILE", by_deepspeed[0], valid))


def _launcher_notes(file: ShellFile, launcher: bool) -> list[str]:
    if not launcher:
        return []
    unsafe = [launch.name for launch in file.launches if launch.script is None and not launch.converts]
    if unsafe:
        names = ", ".join(dict.fromkeys(unsafe))
        return [f"{names} starts as before; if it trains, it needs: {LINE_TO_ADD}"]
    if not file.launches:
        return [f"this file starts no Python script; the one that does needs: {LINE_TO_ADD}"]
    return []


def _yaml(path: Path, text: str, request: TieRequest, launcher: bool) -> ConfigPatch:
    if is_run_config(text):
        valid = "is a run config of this package, which ties by its own section: write `tie: {group_size: 4}` into it"
        raise ConfigError(Problem("FILE", str(path), valid))
    file = read_yaml(text)
    if file is None:
        raise ConfigError(Problem("FILE", str(path), _NO_EXPERTS.format(f"{ANCHOR} or num_moe_experts")))
    found = _tie_flags(file.arguments)
    tie = request.tie if file.kind == "bridge" else request.tie_of(found)  # what reads a recipe skips such keys
    saved, notes = _savings(file.arguments, tie)
    warnings = _warnings(file.arguments, tie)
    if file.kind == "bridge":
        notes += lines_for_recipe(request.tie, file.arguments.number("--num-layers"))
        return ConfigPatch(text, text, saved, notes, warnings)
    wanted = request.missing_from(found)
    keys = wanted if file.kind == "flags" or not wanted else request.keys()
    after = apply_edits(text, file.edits(keys))
    notes += [f"the script that reads this file needs: {LINE_TO_ADD}"] if launcher else []
    return ConfigPatch(text, after, saved, notes, warnings, bool(found))


def _deepspeed(text: str, request: TieRequest) -> ConfigPatch:
    config, _ = scan_json(text)
    if not is_ds_config(config):
        raise ConfigError(Problem("FILE", next(iter(config), None), "must be a ds_config: no key of one is here"))
    file = read_deepspeed(text)
    keys = " ".join(f"tie.{name}={value}" for name, value in zip(request.stated, request.keys().values(), strict=True))
    notes = [*file.reasons, f"a ds_config has no place for the tie groups: say them in the run config, {keys}"]
    return ConfigPatch(text, file.changed, None, notes, file.warnings)


def _warnings(arguments: Arguments, tie: TieConfig) -> list[Problem]:
    """What conflicts with tied experts. Raises ConfigError if the tie groups do not fit the layers."""
    layers = arguments.number("--num-layers")
    topology = None
    if layers and not unknown_layers(arguments):
        topology = TieTopology.build(tie, layers, moe_layers(moe_pattern(arguments, layers), layers))
    return list(conflicts(arguments, tie, topology))


def _savings(arguments: Arguments, tie: TieConfig) -> tuple[Savings | None, list[str]]:
    """What tying saves, or a note on why that is not said."""
    if hybrid := next((name for name in HYBRID if name in arguments), None):
        return None, [f"what tying saves is not counted: {hybrid} makes another model"]
    if lacking := missing(arguments):
        told = "; ".join(why_missing(arguments, name) for name in lacking)
        return None, [f"what tying saves is not known: {told}"]
    try:
        return savings(derive(arguments), tie, arguments), []
    except ConfigError as error:
        return None, [f"what tying saves is not counted: {error}"]


def _tie_flags(arguments: Arguments) -> dict[str, str | None]:
    found = {name: arguments.values(name) for name in TIE_FLAGS if name in arguments}
    return {name: ",".join(values) if values else None for name, values in found.items()}
