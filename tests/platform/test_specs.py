"""Specs in the shapes of all supported versions."""

from __future__ import annotations

from functools import partial

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_tied.platform.specs import experts_of, spec_like, submodules_of


class Module:
    """Something a spec can name."""


def test_a_module_spec_is_answered_by_one():
    spec = spec_like(ModuleSpec(module=Module, submodules="old"), Module, "parts", banks=1, layer_index=2)
    assert isinstance(spec, ModuleSpec)
    assert (spec.module, submodules_of(spec), spec.params) == (Module, "parts", {"banks": 1, "layer_index": 2})


def test_a_partial_is_answered_by_one():
    # The form of megatron-core 0.18 and later.
    spec = spec_like(partial(Module, submodules="old"), Module, "parts", banks=1)
    assert isinstance(spec, partial)
    assert (spec.func, submodules_of(spec), spec.keywords["banks"]) == (Module, "parts", 1)


def test_experts_are_asked_for_in_both_ways():
    class Legacy:
        def grouped_mlp_modules(self, grouped, legacy):
            assert not legacy
            return Module, "grouped" if grouped else "sequential"

    class Later:
        def grouped_mlp_modules(self, moe_use_grouped_gemm):
            return partial(Module, submodules=moe_use_grouped_gemm)

    assert submodules_of(experts_of(Legacy(), grouped=True)) == "grouped"
    assert submodules_of(experts_of(Later(), grouped=False)) is False
