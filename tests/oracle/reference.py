"""A tied MoE trained by one process in plain PyTorch: the oracle of the distributed runs.

The model is the Hugging Face OLMoE, Qwen3-MoE or DeepSeek-V2 class; the layers of one bank hold the very same expert
`Parameter` objects, so autograd itself sums the gradient over the use sites. The optimizer is
`torch.optim.AdamW`. Weights and gradients go by their Hugging Face names, experts fused
([E, 2I, H] gate rows first, [E, H, I]) and listed once, under the owner: the first layer of the bank.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from .aux_losses import load_balancing_loss, router_z_loss, routing_margin

Weights = dict[str, Tensor]

ARCHITECTURES = ("olmoe", "qwen3_moe", "deepseek_v2")
# DeepSeek-V2 as its config.json tells it: latent attention, YaRN past half of a tiny sequence, a shared expert.
LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
YARN: dict[str, Any] = {
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
}
ROUTED_SCALING = 1.5


@dataclass(frozen=True)
class ReferenceSpec:
    """Shape, tying and loss coefficients of a reference model; every layer is an MoE layer.

    `banks` names the bank of each layer, `share` what else those of one bank have in common; of DeepSeek-V2's attention
    `LATENT_ATTENTION` and `YARN` say the rest. `qkv_clip` applies to OLMoE alone, whose QK-norm spans the whole
    projection and so needs `head_dim * num_heads == hidden_size`. Raises ValueError on an impossible spec.
    """

    arch: Literal["olmoe", "qwen3_moe", "deepseek_v2"]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    expert_ffn: int
    num_experts: int
    top_k: int
    vocab_size: int
    banks: tuple[int, ...]
    qkv_clip: float | None = None
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    aux_coeff: float = 0.01
    z_coeff: float = 0.001
    share: Literal["experts", "experts_attention", "all"] = "experts"

    def __post_init__(self) -> None:
        """Refuse what the Hugging Face classes would silently build differently."""
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch {self.arch!r}: must be one of {ARCHITECTURES}")
        if len(self.banks) != self.num_layers:
            raise ValueError(f"banks {self.banks}: needs one entry for each of {self.num_layers} layers")
        if not 1 <= self.top_k < self.num_experts:
            raise ValueError(f"top_k {self.top_k}: must be from 1 to {self.num_experts - 1}")
        if self.arch == "olmoe" and self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(f"head_dim {self.head_dim}: OLMoE needs hidden_size / num_heads")
        if self.arch != "olmoe" and self.qkv_clip is not None:
            raise ValueError(f"qkv_clip {self.qkv_clip}: {self.arch} has none")

    @property
    def owners(self) -> dict[int, int]:
        """Map each bank to its first layer."""
        return {bank: self.banks.index(bank) for bank in self.banks}

    def untied(self) -> "ReferenceSpec":
        """Return the same model with a bank of its own for every layer."""
        return replace(self, banks=tuple(range(self.num_layers)))


def tiny(arch: str, banks: Sequence[int] = (0, 1, 1, 2, 2, 3), **changes: Any) -> ReferenceSpec:
    """Return a spec small enough for many processes on two cores, one layer per entry of `banks`.

    Qwen3-MoE gets grouped-query attention with a head_dim that is not hidden_size / num_heads; OLMoE gets a
    clip low enough to act on queries, keys and values at the reference's own initialisation.
    """
    own: dict[str, Any] = {
        "olmoe": {"num_kv_heads": 4, "head_dim": 16, "qkv_clip": 2.0},
        "qwen3_moe": {"num_kv_heads": 2, "head_dim": 32, "norm_eps": 1e-6},
        "deepseek_v2": {"num_kv_heads": 4, "head_dim": 16, "norm_eps": 1e-6},
    }[arch]
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "num_heads": 4,
        "expert_ffn": 32,
        "num_experts": 8,
        "top_k": 2,
        "vocab_size": 96,
    }
    return ReferenceSpec(arch=arch, num_layers=len(banks), banks=tuple(banks), **{**shape, **own, **changes})


def build_reference(spec: ReferenceSpec, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the Hugging Face model with aliased experts and seeded weights, the same values in any dtype.

    Matrices are normal(0, 0.1), which spreads the router's logits by about 1; norm gains are
    1 + normal(0, 0.1), so that a gain left out or put in the wrong place changes the loss.
    """
    model = _hugging_face_model(spec).to(dtype)
    for layer, bank in zip(model.model.layers, spec.banks, strict=True):
        owner = model.model.layers[spec.owners[bank]]
        layer.mlp.experts.gate_up_proj = owner.mlp.experts.gate_up_proj
        layer.mlp.experts.down_proj = owner.mlp.experts.down_proj
        if spec.share != "experts":
            _alias(layer.self_attn, owner.self_attn)
        if spec.share == "all":
            _alias(layer.mlp.gate, owner.mlp.gate)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if parameter.ndim == 1 else noise)
    return model.train()


def _alias(module: nn.Module, owner: nn.Module) -> None:
    for path, parameter in list(owner.named_parameters()):
        inside, _, name = path.rpartition(".")
        setattr(module.get_submodule(inside), name, parameter)


def _hugging_face_model(spec: ReferenceSpec) -> PreTrainedModel:
    common: dict[str, Any] = {
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "num_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_base},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        # OLMoE's default padding token would leave row 1 of the embedding without a gradient.
        "pad_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    if spec.arch == "olmoe":
        return OlmoeForCausalLM(
            OlmoeConfig(intermediate_size=spec.expert_ffn, clip_qkv=spec.qkv_clip, norm_topk_prob=False, **common)
        )
    if spec.arch == "deepseek_v2":
        config = DeepseekV2Config(
            **{**common, "rope_parameters": {"rope_type": "yarn", "rope_theta": spec.rope_base, **YARN}},
            **LATENT_ATTENTION,
            moe_intermediate_size=spec.expert_ffn,
            n_shared_experts=1,
            first_k_dense_replace=0,
            routed_scaling_factor=ROUTED_SCALING,
        )
        return DeepseekV2ForCausalLM(config)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(moe_intermediate_size=spec.expert_ffn, head_dim=spec.head_dim, norm_topk_prob=True, **common)
    )


def weights(model: PreTrainedModel) -> Weights:
    """Return a copy of every parameter, a bank's experts once, under its owner."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients(model: PreTrainedModel) -> Weights:
    """Return a copy of every parameter's gradient, named and shaped as in `weights`; zeros where unused."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def load_weights(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    """Copy `values`, named and shaped as in `weights`, into the model; raise ValueError if a name differs."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != values.keys():
        raise ValueError(f"weights do not match the model: {sorted(parameters.keys() ^ values.keys())}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


class _Float64Arithmetic(TorchFunctionMode):
    """Turn the float32 that the model's norms, softmaxes and rotary embedding ask for into float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


def _arithmetic(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return _Float64Arithmetic() if dtype == torch.float64 else nullcontext()


@contextmanager
def captured_router_logits(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect each layer's router logits [tokens, E], in layer order, of the forward passes run inside.

    They are computed anew from the router's input and weight, and are differentiable in both.
    """
    captured: list[Tensor] = []

    def keep(gate: nn.Module, inputs: tuple[Tensor]) -> None:
        captured.append(F.linear(inputs[0].flatten(0, -2), gate.weight))

    hooks = [layer.mlp.gate.register_forward_pre_hook(keep) for layer in model.model.layers]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Losses:
    """Losses of one micro-batch as scalar tensors.

    `lm` is the mean cross entropy per token; `aux` and `z` are means over layers without their coefficients;
    `total` is what is differentiated: lm plus, summed over layers, the coefficients times aux and z.
    """

    total: Tensor
    lm: Tensor
    aux: Tensor
    z: Tensor
    margin: float


def micro_batch_losses(model: PreTrainedModel, spec: ReferenceSpec, tokens: Tensor) -> Losses:
    """Run one micro-batch of `tokens`, int64 [batch, seq + 1]: each position predicts the next."""
    with _arithmetic(model.dtype), captured_router_logits(model) as router_logits:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        lm = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        aux = torch.stack([load_balancing_loss(layer, spec.top_k) for layer in router_logits])
        z = torch.stack([router_z_loss(layer) for layer in router_logits])
    return Losses(
        total=lm + spec.aux_coeff * aux.sum() + spec.z_coeff * z.sum(),
        lm=lm,
        aux=aux.mean(),
        z=z.mean(),
        margin=min(routing_margin(layer, spec.top_k) for layer in router_logits),
    )


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: the `Losses` averaged over micro-batches, and the gradient norm before clipping.

    `routing_margin` is the closest that any token of the step came to another choice of experts.
    """

    loss: float
    lm_loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    routing_margin: float


@dataclass(frozen=True)
class ReferenceTrace:
    """A training run: one record a step, unclipped gradients of the first and last step, final weights."""

    steps: list[StepRecord]
    first_gradients: Weights
    last_gradients: Weights
    final_weights: Weights


def accumulate(model: PreTrainedModel, spec: ReferenceSpec, batch: Tensor, micro_batches: int) -> list[Losses]:
    """Set the gradients to the mean over `micro_batches` contiguous slices of `batch` [batch, seq + 1].

    This is what world size x accumulation micro-batches amount to. Raises ValueError if slices are unequal.
    """
    if len(batch) % micro_batches:
        raise ValueError(f"micro_batches {micro_batches}: must divide the global batch of {len(batch)}")
    model.zero_grad()
    results = []
    for tokens in batch.chunk(micro_batches):
        losses = micro_batch_losses(model, spec, tokens)
        (losses.total / micro_batches).backward()
        results.append(losses)
    return results


def train_reference(
    spec: ReferenceSpec,
    start: int | Mapping[str, Tensor],
    batches: Tensor,
    *,
    steps: int | None = None,
    micro_batches: int = 1,
    lr: float | Sequence[float] = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_grad: float = 1.0,
    lr_scale_of_bank: Mapping[int, float] | None = None,
    no_decay_1d: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ReferenceTrace:
    """Train from a seed or from given weights with AdamW and return what happened.

    `batches` is int64 [steps, global_batch, seq + 1]; `steps` takes the first few. `lr` is one rate, or one
    for each step. The experts of bank b, and the matrices of an attention that its layers share, learn at
    `lr * lr_scale_of_bank.get(b, 1)`. `clip_grad` bounds the norm over all parameters (`math.inf`: no clipping).
    `no_decay_1d` exempts norm gains from weight decay. `dtype=torch.float64` makes all arithmetic double, to tell
    rounding from error.
    """
    batches = batches[:steps]
    rates = [lr] * len(batches) if isinstance(lr, int | float) else list(lr)
    if isinstance(start, int):
        model = build_reference(spec, start, dtype)
    else:
        model = build_reference(spec, 0, dtype)
        load_weights(model, start)
    groups = _parameter_groups(model, spec, lr_scale_of_bank or {}, weight_decay, no_decay_1d)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)
    records: list[StepRecord] = []
    first_gradients: Weights = {}
    for batch, rate in zip(batches, rates, strict=True):
        losses = accumulate(model, spec, batch, micro_batches)
        last_gradients = gradients(model)
        first_gradients = first_gradients or last_gradients
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        records.append(_record(losses, grad_norm))
    return ReferenceTrace(records, first_gradients, last_gradients, weights(model))


def _parameter_groups(
    model: PreTrainedModel,
    spec: ReferenceSpec,
    lr_scale_of_bank: Mapping[int, float],
    weight_decay: float,
    no_decay_1d: bool,
) -> list[dict[str, Any]]:
    bank_of_expert = {
        id(parameter): bank
        for bank, owner in spec.owners.items()
        for parameter in model.model.layers[owner].mlp.experts.parameters()
    }
    if spec.share != "experts":
        bank_of_expert |= {
            id(parameter): bank
            for bank, owner in spec.owners.items()
            for parameter in model.model.layers[owner].self_attn.parameters()
            if parameter.ndim > 1
        }
    return [
        {
            "params": [parameter],
            "lr_scale": lr_scale_of_bank.get(bank_of_expert.get(id(parameter), -1), 1.0),
            "weight_decay": 0.0 if no_decay_1d and parameter.ndim == 1 else weight_decay,
        }
        for parameter in model.parameters()
    ]


def _record(losses: Sequence[Losses], grad_norm: Tensor) -> StepRecord:
    def mean(name: str) -> float:
        return math.fsum(getattr(loss, name).item() for loss in losses) / len(losses)

    return StepRecord(
        loss=mean("total"),
        lm_loss=mean("lm"),
        aux_loss=mean("aux"),
        z_loss=mean("z"),
        grad_norm=grad_norm.item(),
        routing_margin=min(loss.margin for loss in losses),
    )


def random_batches(spec: ReferenceSpec, steps: int, global_batch: int, seq: int, seed: int) -> Tensor:
    """Return learnable tokens, int64 [steps, global_batch, seq + 1].

    Half of the tokens follow a fixed permutation of their predecessor, the rest are drawn by Zipf's law.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (steps * global_batch, seq + 1)
    zipf = 1 / torch.arange(1, spec.vocab_size + 1)
    tokens = torch.multinomial(zipf, math.prod(shape), replacement=True, generator=generator).view(shape)
    follows = torch.rand(shape, generator=generator) < 0.5
    successor = torch.randperm(spec.vocab_size, generator=generator)
    for position in range(1, seq + 1):
        expected = successor[tokens[:, position - 1]]
        tokens[:, position] = torch.where(follows[:, position], expected, tokens[:, position])
    return tokens.view(steps, global_batch, seq + 1)
