"""The shapes in which Megatron-Core's specs name a module: a `ModuleSpec`, or in later versions a partial."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, TypeAlias

from megatron.core.transformer.spec_utils import ModuleSpec

Spec: TypeAlias = ModuleSpec | Callable[..., Any]


def spec_like(example: Spec, module: type, submodules: object, **params: Any) -> Spec:
    """A spec of `module` in the shape of `example`, which this Megatron-Core builds in the same place."""
    if isinstance(example, partial):
        return partial(module, submodules=submodules, **params)
    return ModuleSpec(module=module, submodules=submodules, params=params)


def submodules_of(spec: ModuleSpec | partial[Any]) -> Any:
    """The submodules that a spec names."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def experts_of(provider: Any, *, grouped: bool) -> Spec:
    """The spec of a backend provider's routed experts: 0.16 asks about a legacy module and returns its parts."""
    provide = provider.grouped_mlp_modules
    if len(signature(provide).parameters) == 1:
        spec: Spec = provide(grouped)
        return spec
    module, submodules = provide(grouped, False)
    return ModuleSpec(module=module, submodules=submodules)
