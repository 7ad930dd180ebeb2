"""What looks wrong in a run's metrics: one line for its log, once for each bank, layer or metric. Pure Python."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from megatron_tied.monitor.sinks import Metrics, numbered, tensorboard_tag
from megatron_tied.topology import Bank, TieTopology

_NORMS_REMEMBERED = 50
_NORMS_NEEDED = 20
_UPDATES_IN_A_ROW = 2
# "auto" for MaxVio: six times its even share is much for any expert; with few experts no expert can have so much.
_MAX_VIO, _SHARE_OF_LARGEST = 5.0, 0.9
_HIGH_LR_SHARE = 0.1


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("must be [LOW, HIGH], with LOW < HIGH")
    return bounds


Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class AlertSettings:
    """What a metric may be before the log says so: the `monitor.alerts` section of a config file; None: anything."""

    # Read by pydantic when this class is a field of one of its models; means nothing otherwise.
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "allow_inf_nan": False,
        "use_attribute_docstrings": True,
    }

    dead_fraction: Fraction | None = 0.0
    """Largest share of a bank's experts that no layer sent a token to for `monitor.dead_window` steps."""
    max_vio: NonNegative | Literal["auto"] | None = "auto"
    """Largest MaxVio of a layer; auto: 5, or 90 % of the largest possible, num_experts / top_k - 1, if less."""
    agreement: Fraction | None = 0.9
    """Largest share of experts that the layers of a tie group choose in common for one token."""
    patience: Annotated[int, Field(ge=0)] = 100
    """For how many steps `max_vio` or `agreement` must have been exceeded whenever it was observed."""
    grad_norm_spike: Annotated[float, Field(gt=1)] | None = 8.0
    """Largest gradient norm, in multiples of the median of those logged before."""
    update_ratio: Annotated[tuple[NonNegative, NonNegative], AfterValidator(_ordered)] | None = (1e-6, 0.1)
    """Smallest and largest norm of a bank's update over that of its weights."""


@dataclass(frozen=True)
class WatchedRun:
    """What alerts must know about a run.

    num_experts: of an untied layer.
    dead_window: steps without a token after which an expert counts as dead.
    peak_lr: the highest learning rate of the schedule.
    """

    topology: TieTopology
    num_experts: int
    top_k: int
    dead_window: int
    peak_lr: float


Judge = Callable[[float], str | None]


class Alerts:
    """Reads the metrics of every logged step and says what looks wrong, each thing once per process."""

    def __init__(self, settings: AlertSettings, run: WatchedRun):
        self._settings = settings
        self._run = run
        self._lr = 0.0
        self._highest_lr = run.peak_lr
        self._watches = list(self._all_watches())

    def check(self, step: int, metrics: Metrics) -> list[str]:
        """New lines for the log; `metrics` may lack any key, and values that are no finite number are skipped."""
        if (lr := _finite(metrics, "lr")) is not None:
            self._lr, self._highest_lr = lr, max(lr, self._highest_lr)
        found = [(watch, watch.see(step, metrics)) for watch in self._watches]
        self._watches = [watch for watch, finding in found if finding is None]
        return [f"ALERT step {step}: {finding}" for _, finding in found if finding is not None]

    def _all_watches(self) -> Iterator[_Watch]:
        settings, topology = self._settings, self._run.topology
        if settings.grad_norm_spike is not None:
            yield _Watch("grad_norm", _GradNormSpike(settings.grad_norm_spike).judge)
        for bank in topology.banks:
            if settings.dead_fraction is not None:
                judge = partial(self._dead_experts, bank, settings.dead_fraction)
                yield _Watch(numbered("bank_dead_fraction", bank.index), judge)
            if settings.agreement is not None and bank.is_tied and self._has_choice(bank):
                metric = numbered("agreement_overlap", bank.index)
                judge = partial(self._agreement, bank, settings.agreement)
                yield _Watch(metric, judge, steps=settings.patience)
            if settings.update_ratio is not None:
                metric = numbered("bank_update_ratio", bank.index)
                judge = partial(self._update_ratio, bank, *settings.update_ratio)
                yield _Watch(metric, judge, in_a_row=_UPDATES_IN_A_ROW)
        for layer in topology.moe_layers:
            if settings.max_vio is not None and self._has_choice(topology.bank(layer)):
                judge = partial(self._max_vio, layer, settings.max_vio)
                yield _Watch(numbered("layer_max_vio", layer), judge, steps=settings.patience)

    def _experts(self, bank: Bank) -> int:
        return self._run.topology.num_experts(bank, self._run.num_experts)

    def _has_choice(self, bank: Bank) -> bool:
        # A router that takes every expert is even, and agrees with every other, whatever it has learnt.
        return self._run.top_k < self._experts(bank)

    def _dead_experts(self, bank: Bank, bound: float, fraction: float) -> str | None:
        experts = self._experts(bank)
        dead = round(fraction * experts)
        # Not the fraction itself: in 32 bits, one of ten is more than 0.1.
        if dead / experts <= bound:
            return None
        share = f"{100 * dead / experts:.4g} %, bound {100 * bound:.4g} %"
        where = " in any layer" if bank.is_tied else ""
        return (
            f"{_name(bank)}: {dead} of {experts} experts ({share}) had no token{where} for "
            f"{self._run.dead_window} steps, in the batches looked at. Look at load/banks and "
            f"{numbered('bank_load_min', bank.index)} in TensorBoard. "
            f"A higher model.moe_aux_loss_coeff usually helps. {_bound('dead_fraction')}"
        )

    def _max_vio(self, layer: int, setting: float | Literal["auto"], max_vio: float) -> str | None:
        bank = self._run.topology.bank(layer)
        most = self._experts(bank) / self._run.top_k - 1
        bound = min(_MAX_VIO, _SHARE_OF_LARGEST * most) if isinstance(setting, str) else setting
        if max_vio <= bound:
            return None
        return (
            f"layer {layer} (bank {bank.index}): the busiest expert gets {max_vio + 1:.4g} times its even share of "
            f"tokens: MaxVio {max_vio:.4g} of at most {most:.4g} is above {bound:.4g}{self._for_long()}. "
            f"Look at {numbered('layer_max_vio', layer)} and {numbered('layer_dead_fraction', layer)} in TensorBoard. "
            f"A higher model.moe_aux_loss_coeff usually helps. {_bound('max_vio')}"
        )

    def _agreement(self, bank: Bank, bound: float, overlap: float) -> str | None:
        if overlap <= bound:
            return None
        return (
            f"{_name(bank)}: its layers choose the same experts for the same token, the group works as one layer in a "
            f"loop: overlap {overlap:.4g} is above {bound:.4g}{self._for_long()}. "
            f"Look at {numbered('agreement_overlap', bank.index)} in TensorBoard; if "
            f"{numbered('agreement_overlap_chance', bank.index)} is as high, few experts get all tokens: see "
            f"load/banks. "
            f"A smaller tie.group_size or a larger tie.num_tied_experts usually helps. {_bound('agreement')}"
        )

    def _for_long(self) -> str:
        return f", for {self._settings.patience} steps now" if self._settings.patience else ""

    def _update_ratio(self, bank: Bank, low: float, high: float, ratio: float) -> str | None:
        # Warm-up and the end of the decay change little by intention.
        if low <= ratio <= high or self._lr < _HIGH_LR_SHARE * self._highest_lr:
            return None
        if ratio > high:
            what, helps = f"above {high:.4g}", "A lower optimizer.lr or more optimizer.warmup_steps"
        else:
            divisor = " or a smaller tie.lr_divisor" if bank.is_tied else ""
            what, helps = f"below {low:.4g}", f"A higher optimizer.lr{divisor}"
        return (
            f"{_name(bank)}: its update is {ratio:.4g} times its weights (norms), {what}; {_UPDATES_IN_A_ROW} measured "
            f"steps in a row were out of bounds. Look at {numbered('bank_update_ratio', bank.index)} and "
            f"{numbered('bank_gradient_norm', bank.index)} in TensorBoard. {helps} usually helps. "
            f"{_bound('update_ratio')}"
        )


class _Watch:
    """One metric, and how often in a row, or for how many steps, it must look wrong before that is said."""

    def __init__(self, metric: str, judge: Judge, *, in_a_row: int = 1, steps: int = 0):
        self._metric, self._judge = metric, judge
        self._in_a_row, self._steps = in_a_row, steps
        self._wrong_at: list[int] = []

    def see(self, step: int, metrics: Metrics) -> str | None:
        value = _finite(metrics, self._metric)
        if value is None:
            return None
        finding = self._judge(value)
        self._wrong_at = [] if finding is None else [*self._wrong_at, step]
        is_said = len(self._wrong_at) >= self._in_a_row and step - self._wrong_at[0] >= self._steps
        return finding if is_said else None


class _GradNormSpike:
    """A gradient norm against the median of those before it."""

    def __init__(self, bound: float):
        self._bound = bound
        self._norms: deque[float] = deque(maxlen=_NORMS_REMEMBERED)

    def judge(self, norm: float) -> str | None:
        known = len(self._norms)
        usual = median(self._norms) if known >= _NORMS_NEEDED else 0.0
        self._norms.append(norm)
        # A median of 0 (frozen weights, a step before any signal) makes every norm infinitely many times as large.
        if not usual or norm <= self._bound * usual:
            return None
        return (
            f"gradients: grad_norm {norm:.4g} is {norm / usual:.4g} times the median {usual:.4g} of the last {known} "
            f"logged values, bound {self._bound:.4g} times; later spikes are not told. "
            f"Look at {tensorboard_tag('grad_norm')} and {tensorboard_tag('lm_loss')} in TensorBoard. "
            f"If the loss stays high: go on from an earlier checkpoint with a lower optimizer.lr or "
            f"optimizer.clip_grad. {_bound('grad_norm_spike')}"
        )


def _finite(metrics: Metrics, name: str) -> float | None:
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _name(bank: Bank) -> str:
    return f"bank {bank.index} (layer{'s' if bank.is_tied else ''} {' '.join(map(str, bank.layers))})"


def _bound(key: str) -> str:
    return f"To change the bound: monitor.alerts.{key} (null: no alert)."
