"""Which precisions DeepSpeed trains in on this host."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from megatron_tied.errors import Problem


def precision_problem(precision: str, field: str, value: object) -> Problem | None:
    """What stands against training in fp32, bf16 or fp16 here, which `field` with its `value` asks for.

    Of a CPU DeepSpeed wants instructions for fp16.
    """
    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if precision not in supported or supported[precision]():
        return None
    others = ["fp32", *(other for other, is_supported in supported.items() if is_supported())]
    host = f"DeepSpeed does not train in {precision} on this host's {accelerator.device_name()}"
    return Problem(field, value, f"{host}; use {' or '.join(reversed(others))}")
