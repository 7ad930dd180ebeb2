"""What the `optimizer` section says, and the recipes that it can name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_tied.errors import Problem
from megatron_tied.training.fields import Beta, CountFromZero, NonNegative, Positive, Section

# "Tying the Loop" (arXiv:2606.16825): Muon, with AdamW at a tenth of its rate for what is no hidden matrix.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tying_the_loop": {
        "name": "muon",
        "lr": 2e-2,
        "weight_decay": 0.1,
        "momentum": 0.95,
        "adamw_weight_decay": 0.01,
        "betas": [0.9, 0.95],
        "schedule": "cosine",
        "warmup_steps": 100,
        "clip_grad": 1.0,
    }
}
_FLOOR = 0.1  # of lr: what min_lr is in all of them, where rates fall

Frozen = tuple[Literal["norms"], ...]


def with_preset(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """An `optimizer` section as a file has it, with the keys of the preset that it names, if it is one."""
    name = section.get("preset")
    if not isinstance(name, str) or name not in PRESETS:
        return section
    merged = {**PRESETS[name], **section}
    if isinstance(rate := merged["lr"], (int, float)) and merged["schedule"] != "constant":
        merged.setdefault("min_lr", _FLOOR * rate)
    return merged


_MUON_ONLY = ("momentum", "adamw_lr", "adamw_weight_decay", "iterate_in")


class OptimizerConfig(Section):
    """How weights follow gradients."""

    preset: Literal["tying_the_loop"] | None = None
    """A recipe, of which any key can be replaced beside it: that of "Tying the Loop" (arXiv:2606.16825)."""
    name: Literal["adamw", "muon"] = "adamw"
    """muon: for matrices between hidden states (each expert's are its own; query, key and value, too), and adamw for
    embeddings, output layer, routers and vectors."""
    lr: Positive = 3e-4
    """The peak; that of a tied bank is divided by `tie.lr_divisor`."""
    min_lr: NonNegative = 0.0
    """Where the schedule ends."""
    weight_decay: NonNegative = 0.1
    """Of matrices; with adamw, vectors have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's."""
    eps: Positive = 1e-8
    """AdamW's."""
    momentum: Beta = 0.95
    """Muon's."""
    adamw_lr: Positive | None = None
    """With muon, the peak of what AdamW updates; null: a tenth of `lr`."""
    adamw_weight_decay: NonNegative = 0.01
    """With muon, of what AdamW updates, vectors, too."""
    iterate_in: Literal["bf16", "fp32"] = "bf16"
    """In what Muon's iterations are computed: fp32 gives the same on any ranks, where bf16 makes a third digit of a
    last bit."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After a linear warm-up: a cosine or a line from lr to min_lr; lr to the end; or lr, and in the last decay_steps a
    line to min_lr (warm-up, stable, decay). All rates keep their ratios."""
    decay_steps: CountFromZero = 0
    """Of `schedule: wsd`."""
    warmup_steps: CountFromZero = 0
    """Steps in which rates rise from 0 on a line."""
    clip_grad: NonNegative = 1.0
    """Largest norm of the gradient of all parameters together; 0: no clipping."""
    freeze: Frozen | None = None
    """What keeps the weights it begins with, and has no optimizer states; null: norms with a teacher, else nothing."""

    def rate_of_adamw(self) -> float:
        """The peak of what Muon leaves to AdamW."""
        return self.lr / 10 if self.adamw_lr is None else self.adamw_lr

    def problems(self, steps: int) -> Iterator[Problem]:
        """What does not fit together, in a run of `steps` steps."""
        if self.warmup_steps > steps:
            yield Problem("optimizer.warmup_steps", self.warmup_steps, f"must be at most train.steps = {steps}")
        if self.min_lr > self.lr:
            yield Problem("optimizer.min_lr", self.min_lr, f"must be at most optimizer.lr = {self.lr}")
        elif self.min_lr and self.schedule == "constant":
            valid = "must be 0 with optimizer.schedule: constant, which stays at optimizer.lr"
            yield Problem("optimizer.min_lr", self.min_lr, valid)
        after = steps - self.warmup_steps
        if self.schedule == "wsd" and after == 0:
            valid = f"must be below train.steps = {steps} with optimizer.schedule: wsd, which decays in the end"
            yield Problem("optimizer.warmup_steps", self.warmup_steps, valid)
        elif self.schedule == "wsd" and after > 0 and not 0 < self.decay_steps <= after:
            valid = f"must be 1 to {after}, the steps after the warm-up, with optimizer.schedule: wsd"
            yield Problem("optimizer.decay_steps", self.decay_steps, valid)
        if self.schedule != "wsd" and self.decay_steps:
            yield Problem("optimizer.decay_steps", self.decay_steps, "must be 0: it is for optimizer.schedule: wsd")
        if self.preset is not None and self.name != PRESETS[self.preset]["name"]:
            valid = f"must be {PRESETS[self.preset]['name']} with optimizer.preset: {self.preset}"
            yield Problem("optimizer.name", self.name, valid)
            return
        defaults = type(self).model_fields
        for name in _MUON_ONLY if self.name == "adamw" else ():
            if (value := getattr(self, name)) != defaults[name].default:
                yield Problem(f"optimizer.{name}", value, "must be left out: it is for optimizer.name: muon")
