"""TensorBoard's custom scalars: which metrics stand together in one chart.

TensorBoard draws in a chart every tag whose beginning matches one of the chart's regular expressions
(tensorboard/plugins/custom_scalar/custom_scalars_plugin.py), so each of them says where the tag ends.
"""

from __future__ import annotations

from collections.abc import Mapping

# Dashboard, chart, regular expressions on tags.
Layout = Mapping[str, Mapping[str, tuple[str, ...]]]


def _exactly(*tags: str) -> tuple[str, ...]:
    return tuple(f"^{tag}$" for tag in tags)


def _numbered(*figures: str) -> tuple[str, ...]:
    """One curve for each layer or bank."""
    return tuple(rf"^{figure}/\d+$" for figure in figures)


# At most twelve charts each: TensorBoard shows the rest on a second page, which nobody turns to.
DASHBOARDS: Layout = {
    "Training": {
        "Loss: training and validation": _exactly("train/lm_loss", "validation/validation_loss"),
        "Loss with router losses": _exactly("train/loss", "train/lm_loss"),
        "Perplexity": _exactly("train/perplexity"),
        "Gradient norm": _exactly("train/grad_norm"),
        "Learning rates": ("^lr/.+$", *_exactly("train/lr")),
        "Balance loss (1: even)": _exactly("routing/balance_loss", "moe/aux_loss"),
        "Largest router logit": _exactly("routing/max_logit"),
        "Loss scale (fp16)": _exactly("train/loss_scale"),
    },
    "Routing health": {
        "MaxVio (0: even): mean, worst layer": _exactly("routing/max_vio", "routing/max_vio_worst"),
        "MaxVio by layer": _numbered("layer_max_vio"),
        "MaxVio by bank": _numbered("bank_max_vio"),
        "Dead experts by bank (share)": (*_numbered("bank_dead_fraction"), *_exactly("routing/dead_fraction")),
        "Dead experts by layer (share)": _numbered("layer_dead_fraction"),
        "Router entropy: of a token, of the mean": _exactly("routing/token_entropy", "routing/mean_entropy"),
        "Entropy of a token by layer": _numbered("layer_token_entropy"),
        "Entropy of the mean by layer (1: even)": _numbered("layer_mean_entropy"),
        "Load p95 by layer (1: even)": _numbered("layer_load_p95"),
        "Router z-loss": _exactly("routing/z_loss", "moe/z_loss"),
        "Dropped assignments (share)": (*_exactly("routing/dropped"), *_numbered("bank_dropped")),
        "Busiest expert parallel rank (1: even)": _exactly("routing/ep_busiest", "routing/ep_busiest_worst"),
    },
    "Tied groups": {
        "Same top-k experts by bank, and chance": _numbered("agreement_overlap", "agreement_overlap_chance"),
        "Same top-1 expert by bank, and chance": _numbered("agreement_top1", "agreement_top1_chance"),
        "Distinct experts by bank, and chance": _numbered("agreement_distinct", "agreement_distinct_chance"),
    },
    "Banks": {
        "Weight norm": _numbered("bank_weight_norm"),
        "Gradient norm": _numbered("bank_gradient_norm"),
        "Update norm": _numbered("bank_update_norm"),
        "Update over weight": _numbered("bank_update_ratio"),
        "Gradient cosine between use sites": _numbered("bank_gradient_cosine"),
        "Gradient cosine, worst pair": _numbered("bank_gradient_cosine_min"),
        "Gradient cancellation": _numbered("bank_gradient_cancellation"),
        "Load p95 (1: even)": _numbered("bank_load_p95"),
        "Entropy of a token": _numbered("bank_token_entropy"),
        "Entropy of the mean (1: even)": _numbered("bank_mean_entropy"),
    },
    "System": {
        "Tokens per second: measured, planned": _exactly(
            "progress/tokens_per_second", "progress/planned_tokens_per_second"
        ),
        "Seconds of a step, by part": ("^time/.+$", *_exactly("progress/step_seconds")),
        "Memory in GB: measured, planned": _exactly("system/(planned_)?memory_gb", "system/memory_fullest_gb"),
        "Allocator in GB (CUDA)": _exactly("system/memory_(allocated|reserved)_gb"),
        "Weights and optimizer states in GB": _exactly("system/(planned_)?states_gb"),
        "All-to-all GB of a step": _exactly("all_to_all/gb"),
        "All-to-all seconds of a step": _exactly("all_to_all/seconds"),
        "Seconds left": _exactly("progress/eta_seconds"),
    },
}
