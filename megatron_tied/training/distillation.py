"""Learning from a teacher: cross entropy, the teacher's token distribution, and the outputs of its MoE layers."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_tied.checkpoint.loader import Checkpoint, load_weights
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.layers.moe_layer import TiedMoELayer, tied_layers
from megatron_tied.models.gpt import build_gpt_model
from megatron_tied.platform import device
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import parse_config
from megatron_tied.training.evaluation import Batch, LossFunction, average_over_ranks

_Output = tuple[torch.Tensor, torch.Tensor | None]


def load_teacher(config: RunConfig, checkpoint: Checkpoint) -> GPTModel:
    """The model of `checkpoint` in the precision of the run, its experts spread as the student's are; a collective."""
    tie = parse_config(checkpoint.manifest.run).tie
    model = build_gpt_model(config.model, tie, seed=config.train.seed, precision=config.train.precision)
    load_weights(model, checkpoint)
    return model.requires_grad_(False).eval()


class Distillation:
    """The objective of a run with a teacher, in the place of `LossFunction`: what `DistillConfig` says.

    The difference of MoE outputs joins each layer's output in the way that auxiliary losses do, so that its gradient is
    there under every kind of recompute, scaled as theirs is; each layer is compared on the input that it has itself.
    """

    def __init__(self, config: RunConfig, teacher: GPTModel, student: torch.nn.Module):
        self._settings = config.distill
        self._teacher = teacher
        self._cross_entropy = LossFunction(device())
        self._targets: dict[int, torch.Tensor] = {}
        self._differences: list[torch.Tensor] = []
        self._parts: list[torch.Tensor] = []
        self._is_forward = False
        self._layers = 0
        for layer in tied_layers(teacher):
            self._layers += 1
            layer.register_forward_hook(self._keep)
        for layer in tied_layers(student):
            layer.register_forward_hook(self._compare)

    def __call__(self, engine: TiedMoEEngine, batch: Batch) -> torch.Tensor:
        """A scalar that `engine.backward` takes; its value, not its gradient, has the difference of MoE outputs."""
        inputs = self._cross_entropy.inputs(batch)
        places = inputs.tokens, inputs.position_ids, None
        with torch.no_grad():
            taught = self._teacher(*places).float().log_softmax(-1)
        self._is_forward = True
        found = engine(*places).float().log_softmax(-1)
        self._is_forward = False
        cross_entropy = inputs.mean(-found.gather(-1, inputs.labels[..., None])[..., 0])
        kl = inputs.mean(torch.nn.functional.kl_div(found, taught, reduction="none", log_target=True).sum(-1))
        difference = torch.stack(self._differences).mean()
        self._differences.clear()
        self._parts.append(torch.stack([cross_entropy, kl, difference]).detach())
        return cross_entropy + self._settings.kl * kl + self._settings.moe_output * difference

    def take(self) -> dict[str, float]:
        """The parts of what was returned since the last call, means over it and all ranks, unweighted. A collective."""
        means = torch.stack(self._parts).mean(0)
        self._parts.clear()
        names = ("lm_loss", "distill_kl", "distill_moe_output")
        return {name: average_over_ranks(mean) for name, mean in zip(names, means, strict=True)}

    def _keep(self, layer: TiedMoELayer, inputs: tuple[torch.Tensor, ...], output: _Output) -> None:
        # A copy: without gradients Megatron-Core adds the residual in place.
        self._targets[layer.layer_index] = output[0].clone()

    def _compare(self, layer: TiedMoELayer, inputs: tuple[torch.Tensor, ...], output: _Output) -> _Output:
        if not layer.training:
            return output
        hidden, bias = output
        target = self._targets[layer.layer_index].float()
        if torch.is_grad_enabled():
            # The graph keeps what it needs of it. Without gradients recompute is to come, and to ask for it again.
            del self._targets[layer.layer_index]
        difference = (hidden.float() - target).square().mean() / target.square().mean()
        if self._is_forward:
            # Not when recompute runs the layer again.
            self._differences.append(difference.detach())
        weighted = difference * (self._settings.moe_output / self._layers)
        return MoEAuxLossAutoScaler.apply(hidden, weighted), bias
