"""Mixture-of-Experts models whose layers share experts in memory, for `trust_remote_code=True`.

Needs torch and transformers 5 alone. Each class is the stock one of its architecture; the layers of one expert bank
hold the very same parameters, which are stored, counted and moved once. In config.json `expert_banks` has the bank of
every layer (null for a dense one), and `num_tied_experts` the experts of a bank that several layers use (null: as many
as the others have). Written by megatron-tied.
"""

import copy

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


class MegatronTiedOlmoeConfig(OlmoeConfig):
    """OLMoE with expert banks."""

    model_type = "megatron_tied_olmoe"
    expert_banks: list[int | None] | None = None
    num_tied_experts: int | None = None


class MegatronTiedQwen3MoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE with expert banks."""

    model_type = "megatron_tied_qwen3_moe"
    expert_banks: list[int | None] | None = None
    num_tied_experts: int | None = None


class MegatronTiedDeepseekV2Config(DeepseekV2Config):
    """DeepSeek-V2 with expert banks."""

    model_type = "megatron_tied_deepseek_v2"
    expert_banks: list[int | None] | None = None
    num_tied_experts: int | None = None


class MegatronTiedDeepseekV3Config(DeepseekV3Config):
    """DeepSeek-V3 with expert banks."""

    model_type = "megatron_tied_deepseek_v3"
    expert_banks: list[int | None] | None = None
    num_tied_experts: int | None = None


class _TiedExperts(PreTrainedModel):
    """Ties the experts of a stock causal language model by the banks of its config."""

    config: (
        MegatronTiedOlmoeConfig
        | MegatronTiedQwen3MoeConfig
        | MegatronTiedDeepseekV2Config
        | MegatronTiedDeepseekV3Config
    )
    _number_of_experts: str

    def post_init(self) -> None:
        """Widen and tie, then as stock; called at the end of the stock constructor."""
        self._widen_tied_layers()
        # By these saving knows which names it may leave out.
        self._tied_weights_keys = {**type(self)._tied_weights_keys, **self._tied_experts()}
        super().post_init()  # type: ignore[no-untyped-call]  # transformers leaves it without types

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """{follower's name: owner's name} of experts, and of the embeddings if those are tied."""
        embeddings = type(self)._tied_weights_keys if self.config.tie_word_embeddings else {}
        return {**embeddings, **self._tied_experts()}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Found by a look into the stock class's source, which this file is not.
        return True

    def _layers_of_banks(self) -> list[list[int]]:
        if self.config.expert_banks is None:
            raise ValueError("config.json must have expert_banks: the bank of every layer, null for a dense one")
        layers: dict[int, list[int]] = {}
        for layer, bank in enumerate(self.config.expert_banks):
            if bank is not None:
                layers.setdefault(bank, []).append(layer)
        return list(layers.values())

    def _tied_experts(self) -> dict[str, str]:
        name = "model.layers.{}.mlp.experts.{}".format
        return {
            name(follower, weight): name(owner, weight)
            for owner, *followers in self._layers_of_banks()
            for follower in followers
            for weight in _EXPERT_WEIGHTS
        }

    def _widen_tied_layers(self) -> None:
        if self.config.num_tied_experts is None:
            return
        wide = copy.deepcopy(self.config)
        setattr(wide, self._number_of_experts, self.config.num_tied_experts)
        for layers in self._layers_of_banks():
            if len(layers) > 1:
                for index in layers:
                    name = f"model.layers.{index}.mlp"
                    self.set_submodule(name, type(self.get_submodule(name))(wide))


class MegatronTiedOlmoeForCausalLM(_TiedExperts, OlmoeForCausalLM):
    """OLMoE whose layers share experts."""

    config: MegatronTiedOlmoeConfig
    config_class = MegatronTiedOlmoeConfig
    _number_of_experts = "num_experts"


class MegatronTiedQwen3MoeForCausalLM(_TiedExperts, Qwen3MoeForCausalLM):
    """Qwen3-MoE whose layers share experts."""

    config: MegatronTiedQwen3MoeConfig
    config_class = MegatronTiedQwen3MoeConfig
    _number_of_experts = "num_experts"


class MegatronTiedDeepseekV2ForCausalLM(_TiedExperts, DeepseekV2ForCausalLM):
    """DeepSeek-V2 whose layers share experts."""

    config: MegatronTiedDeepseekV2Config
    config_class = MegatronTiedDeepseekV2Config
    _number_of_experts = "n_routed_experts"


class MegatronTiedDeepseekV3ForCausalLM(_TiedExperts, DeepseekV3ForCausalLM):
    """DeepSeek-V3 whose layers share experts."""

    config: MegatronTiedDeepseekV3Config
    config_class = MegatronTiedDeepseekV3Config
    _number_of_experts = "n_routed_experts"
