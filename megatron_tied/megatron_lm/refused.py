"""Arguments of Megatron-LM that cannot be with tied experts."""

from __future__ import annotations

_ONE_WEIGHT_A_MODULE = "shards each module's own weights; use --use-distributed-optimizer"
_OTHER_MODEL = "builds another kind of model than the GPT that is tied here"
# By argument: why, and what to do. Validation refuses them, and `megatron-tied patch` warns of them.
REFUSED = {
    "hybrid_layer_pattern": _OTHER_MODEL,
    "hybrid_override_pattern": _OTHER_MODEL,
    "is_hybrid_model": _OTHER_MODEL,
    "use_torch_fsdp2": _ONE_WEIGHT_A_MODULE,
    "use_megatron_fsdp": _ONE_WEIGHT_A_MODULE,
    "init_model_with_meta_device": "makes new weights after the layers are tied; take it out",
    "moe_use_upcycling": "makes experts of a dense model layer by layer; upcycle untied, then tie the checkpoint",
    "use_mup": "sets learning rates by the width of a weight, against those of banks; take it out",
    "perform_rl_step": "builds models of its own for inference, which share no experts; take it out",
    "export_kd_teacher_load": "builds a teacher of its own, whose layers are not tied; take it out",
    "delay_wgrad_compute": "keeps one weight gradient a module, and a bank has several; take it out",
    "overlap_moe_expert_parallel_comm": "runs layers in parts of its own, without the tied layer's; take it out",
}
