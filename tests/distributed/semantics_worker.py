"""One rank of the routing-semantics test: the same model at expert parallel size 1 and 2 must train alike."""

from __future__ import annotations

import sys
from typing import Any

from megatron_tied.platform import prepare

prepare()

import torch  # noqa: E402

import megatron_tied as mt  # noqa: E402
from megatron_tied.engine.groups import is_expert_parallel  # noqa: E402
from tests.distributed.training_run import full_weights, model_parallel, step  # noqa: E402

BASE = {
    "num_layers": 5,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "vocab_size": 64,
    "moe_aux_loss_coeff": 0.02,
    "moe_z_loss_coeff": 1e-3,
    "init_method_std": 0.1,
}
TIE = mt.TieConfig(banks=[0, 1, 1, 1, 2])


def train(changes: dict[str, Any], tie: mt.TieConfig, ep: int, ds: dict[str, Any], batches: torch.Tensor) -> dict:
    """Losses, expert biases and gathered weights of a few steps."""
    with model_parallel(ep):
        model = mt.build_gpt_model(mt.ModelConfig.resolve(BASE | changes), tie, seed=5)
        groups = mt.parameter_groups(model, lr=1e-2, weight_decay=0.1)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            **ds,
        }
        # SGD keeps a wrong gradient as wrong as it is, where Adam would normalise it away.
        engine = mt.initialize(model, config, optimizer=torch.optim.SGD(groups, lr=1e-2))[0]
        figures = [step(engine, batch, 2) for batch in batches]
        weights = _gathered(engine.module, full_weights(engine.module))
        biases = {name: value.clone() for name, value in engine.module.named_buffers() if "expert_bias" in name}
        engine.destroy()
    return {"figures": figures, "weights": weights, "biases": biases}


def _gathered(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from megatron.core import parallel_state

    group = parallel_state.get_expert_model_parallel_group()
    for name, parameter in model.named_parameters():
        if is_expert_parallel(parameter):
            parts = [torch.empty_like(weights[name]) for _ in range(group.size())]
            torch.distributed.all_gather(parts, weights[name].contiguous(), group=group)
            weights[name] = torch.cat(parts)
    return weights


def main(job_file: str, result_file: str) -> None:
    """Train every variant at EP 1 and 2; rank 0 saves both."""
    job = torch.load(job_file, weights_only=False)
    results = {
        name: [train(changes, TIE, ep, ds, job["batches"]) for ep in (1, 2)]
        for name, (changes, ds) in job["variants"].items()
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, result_file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
