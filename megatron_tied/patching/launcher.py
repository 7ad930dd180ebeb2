"""Where a script runs Megatron-LM's Python: our launcher goes before the file that it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_tied.patching.shell_variables import Variables
from megatron_tied.patching.shell_words import Group, Word

LAUNCHER = "-m megatron_tied.megatron_lm"
LINE_TO_ADD = f"torchrun [its options] {LAUNCHER} SCRIPT.py [its arguments] (torchrun, or python, as now)"

_MODULE = LAUNCHER.split()[1]
_TRAINS = re.compile(r"(pretrain|posttrain|train|finetune|sft)\w*\.py")
_CONVERTS = re.compile(r"convert|hf2|2hf|mcore2|2mcore|hf_to|to_hf")
_PYTHON = re.compile(r"(.*/)?python[\d.]*")
_LEGACY = "torch.distributed.launch"
_DISTRIBUTED = ("torch.distributed.run", _LEGACY)
_ENVIRONMENT = frozenset({"--use-env", "--use_env"})
# Launchers that start a script otherwise, or options that make torchrun start no Python.
_OTHERS = frozenset({"deepspeed", "accelerate", "msrun", "--no-python", "--no_python", "-c", "pytest"})


@dataclass(frozen=True)
class Launch:
    """One start of a Python file. script: its word, or None where our launcher cannot be placed safely.

    launcher: what goes before it. by_deepspeed: whether DeepSpeed's launcher starts it.
    """

    name: str
    script: Word | None
    launcher: str = LAUNCHER
    is_tied: bool = False
    by_deepspeed: bool = False

    @property
    def converts(self) -> bool:
        """Whether the file converts checkpoints, and trains nothing."""
        return _CONVERTS.search(self.name.rpartition("/")[2]) is not None


def launch_in(group: Group, variables: Variables) -> Launch | None:
    """The start of a Python file by the words of `group`, if there is one."""
    for position, word in enumerate(group.words):
        path = _python_file(word, variables)
        if path is None:
            continue
        before = _expanded(group.words[:position], variables)
        starts = next((index for index, text in enumerate(before) if _is_launcher(text)), None)
        others = _OTHERS & {text.rpartition("/")[2] for text in before}
        name = path.rpartition("/")[2]
        by_variable = before[:1] and before[0].startswith("$") and _TRAINS.fullmatch(name)
        if starts is None and not others and not by_variable:
            return None
        if _MODULE in before:
            return Launch(name, word, is_tied=True)
        # Without it this one puts --local-rank between a module and its arguments, where our launcher has its script.
        options = f"--use_env {LAUNCHER}" if _LEGACY in before and not _ENVIRONMENT & set(before) else LAUNCHER
        safe = starts is not None and not others and _is_plain(before[starts:]) and _TRAINS.fullmatch(name)
        return Launch(name, word if safe else None, options, by_deepspeed="deepspeed" in others)
    return None


def _python_file(word: Word, variables: Variables) -> str | None:
    if word.holds_words or word.plain.startswith("-"):
        return None
    if word.plain.endswith(".py"):
        return word.plain
    if re.fullmatch(r"\$\w+|\$\{\w+\}", word.plain):
        value = variables.resolved(word.text)
        return value if value is not None and value.endswith(".py") and " " not in value else None
    return None


def _expanded(words: list[Word], variables: Variables) -> list[str]:
    return [part for word in words for part in (variables.resolved(word.text) or word.plain).split()]


def _is_launcher(text: str) -> bool:
    return text.rpartition("/")[2] == "torchrun" or _PYTHON.fullmatch(text) is not None


def _is_plain(words: list[str]) -> bool:
    """Whether the words between a launcher and its script start that script, and no other module or command."""
    modules = [words[index + 1] for index, text in enumerate(words[:-1]) if text in ("-m", "--module")]
    modules += ["none"] if words[-1] in ("-m", "--module") else []
    return all(module in _DISTRIBUTED for module in modules)
