"""Runs a Megatron-LM script, unchanged, with the `--moe-tie-*` flags.

    torchrun ... -m megatron_tied.megatron_lm pretrain_gpt.py <its arguments> --moe-tie-group-size 4

The functions that `hooks.HOOKS` names are wrapped in memory; a tree that carries the source patch has them already.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from types import ModuleType

from megatron_tied.bad_input import tell_once
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.megatron_lm import hooks

_USAGE = "usage: torchrun ... -m megatron_tied.megatron_lm SCRIPT.py [its arguments] --moe-tie-group-size N"


def main(argv: list[str]) -> int:
    """Run the script `argv[0]` with the arguments that follow; 2 for bad input, which is told on stderr."""
    # torch.distributed.launch says it to the module that it starts, which here is not yet the script.
    to_script = list(takewhile(lambda argument: argument.startswith(("--local-rank", "--local_rank")), argv))
    argv = [*argv[len(to_script) :], *to_script]
    if not argv or not argv[0].endswith(".py"):
        print(_USAGE, file=sys.stderr)
        return 2
    script = Path(argv[0])
    if not script.is_file():
        print(f"{script}: no such file\n{_USAGE}", file=sys.stderr)
        return 2
    # As Python does for a script: its tree's `megatron` comes before an installed one.
    sys.path.insert(0, str(script.resolve().parent))
    from megatron_tied.platform.training import prepare_training

    try:
        prepare_training()
        install(script)
        run(script, argv)
    except ConfigError as error:
        return tell_once(error)
    return 0


def run(script: Path, argv: list[str]) -> None:
    """Run the script as the main module."""
    main_module = ModuleType("__main__")
    main_module.__file__ = str(script)
    # The processes that write a checkpoint import the main module again, unless it is a package's: they need nothing
    # of the script, and on a host without CUDA could not import it.
    main_module.__spec__ = __spec__
    sys.modules["__main__"] = main_module
    sys.argv = list(argv)
    exec(compile(script.read_bytes(), str(script), "exec"), vars(main_module))


def install(script: Path) -> None:
    """Wrap every function that a hook names, wherever Megatron-LM will look it up for `script`.

    Raises `ConfigError` if `megatron.training` is not there: the script is not Megatron-LM's.
    """
    if find_spec("megatron.training") is None:
        valid = "must be a script of a Megatron-LM tree: there is no megatron/training beside it"
        raise ConfigError(Problem("script", str(script), valid))
    for hook in hooks.HOOKS:
        try:
            module = importlib.import_module(hook.module)
        except ModuleNotFoundError as error:
            # `gpt_builders` belongs to the scripts that build a GPT model, and versions differ.
            if error.name is None or not hook.module.startswith(error.name):
                raise
            continue
        function = getattr(module, hook.name, None)
        if function is None or hooks.is_hooked(function):
            continue
        # Other modules of the package have imported a function by its name; a name that is imported itself is
        # wrapped for the one module that the hook is about.
        wrapped = getattr(hooks, hook.wrapper)(function)
        for name, holder in list(sys.modules.items()):
            is_concerned = holder is module or (hook.above is None and name.startswith("megatron."))
            if is_concerned and vars(holder).get(hook.name) is function:
                setattr(holder, hook.name, wrapped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
