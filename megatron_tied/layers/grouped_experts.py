"""The routed experts of one layer as two grouped matrix products (`torch.nn.functional.grouped_mm`)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.layers.accumulation import SharedGradient, grouped_linear
from megatron_tied.layers.marks import mark
from megatron_tied.layers.swiglu import weighted_swiglu

_UNSUPPORTED = (
    "add_bias_linear",
    "fp8",
    "fp4",
    "moe_latent_size",
    "moe_apply_probs_on_input",
    "activation_func_clamp_value",
)


def unsupported_options(config: TransformerConfig) -> list[Problem]:
    """The options of `config` that `GroupedExperts` does not implement."""
    valid = "is not supported by model.expert_backend: grouped; use sequential or te"
    return [Problem(f"model.{name}", value, valid) for name in _UNSUPPORTED if (value := getattr(config, name, None))]


class GroupedExperts(MegatronModule):
    """Local experts of one MoE layer; takes the place of Megatron-Core's `TEGroupedMLP` or `SequentialMLP`.

    Parameters: `fc1_weight` [local experts, 2 ffn, hidden], gate rows first ([local experts, ffn, hidden] without
    a gated activation), and `fc2_weight` [local experts, hidden, ffn], both of `config.params_dtype`. They come
    uninitialised: `layers.initialization` fills them by global expert index. Raises `ConfigError` for options
    that only Megatron-Core's own experts implement.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ):
        super().__init__(config=config)
        if problems := unsupported_options(config):
            raise ConfigError(problems)
        self.num_local_experts = num_local_experts
        self._pg_collection = pg_collection
        ffn, hidden = config.moe_ffn_hidden_size, config.hidden_size
        fc1_rows = 2 * ffn if config.gated_linear_unit else ffn
        self.fc1_weight = self._weight(num_local_experts, fc1_rows, hidden)
        self.fc2_weight = self._weight(num_local_experts, hidden, ffn)
        self._recomputes_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        self.fc1_gradient = SharedGradient()
        self.fc2_gradient = SharedGradient()

    def _weight(self, *shape: int) -> torch.nn.Parameter:
        config = self.config
        # As Megatron-Core's own layers do: None leaves it to torch's default device, which may be meta.
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.nn.Parameter(torch.empty(*shape, dtype=config.params_dtype, device=device))
        # Megatron's mark for "reduce over expert-DP, not over DP"; DeepSpeed reads the same attribute.
        mark(weight, allreduce=config.expert_model_parallel_size == 1)
        return weight

    def shared_gradients(self) -> dict[torch.nn.Parameter, SharedGradient]:
        """What collects each weight's gradient over the use sites of its bank."""
        return {self.fc1_weight: self.fc1_gradient, self.fc2_weight: self.fc2_gradient}

    def share_gradients_of(self, owner: GroupedExperts) -> None:
        """Add this layer's gradients to those of `owner`, whose weights it uses."""
        self.fc1_gradient, self.fc2_gradient = owner.fc1_gradient, owner.fc2_gradient

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The local experts as parts of `experts.linear_fc{1,2}.weight` [..., experts, out, in].

        The tensors of Megatron-Core's own experts, whose checkpoints these load; those look for an extra state of
        every expert, too, which these do not have. Raises `ConfigError` if the checkpoint is to have a tensor for
        every expert (`singleton_local_shards`).
        """
        if (metadata or {}).get("singleton_local_shards"):
            valid = "is not supported by GroupedExperts; use model.expert_backend: sequential or te"
            raise ConfigError(Problem("singleton_local_shards", True, valid))
        axis = len(sharded_offsets)
        offset = (axis, self._pg_collection.ep.rank(), self._pg_collection.ep.size())
        return {
            f"{prefix}{kind}_weight": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.linear_{kind}.weight",
                weight,
                *sharded_offsets,
                offset,
                replica_id=(0, 0, self._pg_collection.expt_dp.rank()),
                prepend_axis_num=axis,
            )
            for kind, weight in (("fc1", self.fc1_weight), ("fc2", self.fc2_weight))
        }

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """tokens [n, hidden] sorted by local expert, tokens_per_expert [local experts] int, probs [n] float32.

        Returns ([n, hidden], None), each token's expert output scaled by its routing probability; None stands
        for the bias, as in Megatron-Core's experts.
        """
        offsets = tokens_per_expert.to(tokens.device).cumsum(0).to(torch.int32)
        hidden = grouped_linear(tokens, self.fc1_weight, offsets, self.fc1_gradient)
        if self._recomputes_activation:
            recompute = CheckpointWithoutOutput()
            activated = recompute.checkpoint(self._activation, hidden, probs)
            output = grouped_linear(activated, self.fc2_weight, offsets, self.fc2_gradient)
            recompute.discard_output_and_register_recompute(output)
        else:
            activated = self._activation(hidden, probs)
            output = grouped_linear(activated, self.fc2_weight, offsets, self.fc2_gradient)
        return output, None

    def _activation(self, hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        activation = self.config.activation_func
        is_fused = not hidden.is_cuda or self.config.bias_activation_fusion
        if self.config.gated_linear_unit and activation is torch.nn.functional.silu and is_fused:
            return weighted_swiglu(hidden, probs)
        if self.config.gated_linear_unit:
            gate, up = hidden.chunk(2, dim=-1)
            activated = activation(gate) * up
        else:
            activated = activation(hidden)
        weighted: torch.Tensor = activated * probs.unsqueeze(-1)
        return weighted.to(hidden.dtype)
