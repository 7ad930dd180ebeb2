"""Scale on paper: what the planner says of three models, untied and tied, on 8 to 16,384 GPUs.

Writes study.csv and its plots beside this file and prints the findings as Markdown tables.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from megatron_tied.models.config import ModelConfig
from megatron_tied.planner.hardware import GB, Hardware, load_hardware
from megatron_tied.planner.layout import Layout, Recompute
from megatron_tied.planner.plan import Plan, Subject
from megatron_tied.planner.search import search
from megatron_tied.planner.timing import assumptions
from megatron_tied.topology import TieConfig

HERE = Path(__file__).parent
SHAPES = {"olmoe": "OLMoE-7B", "qwen3_235b_a22b": "Qwen3-235B-A22B", "deepseek_v3": "DeepSeek-V3"}
GROUP_SIZES = (1, 2, 4)
WORLD_SIZES = tuple(2**power for power in range(3, 15))
SEQ_LENGTH, SEQUENCES = 4096, 2048
# Of each shape on any number of GPUs, so that nothing but tying and the number of GPUs moves.
FIXED = {"expert_parallel": 8, "zero_stage": 1, "micro_batch_size": 1, "recompute": Recompute(method="uniform")}
MEMORY = ("weights", "gradients", "optimizer", "activations", "buffers", "update", "reserve")
SECONDS = ("compute", "all-to-all", "gradients", "weights", "optimizer")
COLOURS = {1: "#1b1b1b", 2: "#d95f02", 4: "#1f78b4"}

Row = Mapping[str, Any]


def main() -> None:
    """Plan everything, write the table, draw the plots, print the findings."""
    hardware = load_hardware("h100")
    rows = list(study(hardware))
    with (HERE / "study.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot_memory(rows, hardware)
    plot_traffic(rows)
    plot_speed(rows)
    plot_fewest(rows)
    print(findings(rows))
    print("\n".join(f"- {line}" for line in assumptions(hardware, Layout(WORLD_SIZES[0], SEQ_LENGTH, **FIXED))))


def study(hardware: Hardware) -> Iterator[Row]:
    """A row for the fixed and one for the fastest layout of each shape, group size and number of GPUs."""
    for preset in SHAPES:
        subject = Subject(ModelConfig.resolve({"preset": preset}), hardware)
        for group_size in GROUP_SIZES:
            tie = TieConfig(group_size=group_size)
            for gpus in WORLD_SIZES:
                layout = Layout(gpus, SEQ_LENGTH, global_batch_size=max(SEQUENCES, gpus), **FIXED)
                found = search(subject, tie, layout, (group_size,)).fitting
                key = {"shape": preset, "g": group_size, "gpus": gpus}
                yield key | {"layout": "fixed"} | figures(subject.plan(tie, layout))
                nothing = dict.fromkeys(figures(subject.plan(tie, layout)), "") | {"fits": "no"}
                yield key | {"layout": "fastest"} | (figures(found[0]) if found else nothing)


def figures(plan: Plan) -> dict[str, Any]:
    """The columns of one plan: 10^9 bytes on the fullest rank, or sent by one rank in a step; seconds of a step."""
    layout, memory, seconds = plan.layout, plan.memory, plan.time.seconds
    sent = {
        "all-to-all": sum(flow.wire for flow in plan.traffic if flow.collective == "all-to-all"),
        "gradients": plan.wire("gradients"),
        "weights": plan.wire("weights"),
        "between nodes": plan.between_nodes(),
    }
    return {
        "fits": "yes" if plan.fits else "no",
        "sequences": layout.global_batch_size,
        "ep": layout.expert_parallel,
        "zero": layout.zero_stage,
        "micro_batch": layout.micro_batch_size,
        "recompute": str(layout.recompute),
        **{f"memory {name} GB": round(memory.parts[name] / GB, 3) for name in MEMORY},
        "memory total GB": round(memory.total / GB, 3),
        **{f"sent {name} GB": round(size / GB, 3) for name, size in sent.items()},
        **{f"{name} s": round(seconds.get(name, 0.0), 4) for name in SECONDS},
        "step s": round(plan.time.total, 4),
        "tokens/s": round(plan.tokens_per_second),
        "tokens/s per GPU": round(plan.tokens_per_second / layout.world_size, 1),
        "MFU": round(plan.utilisation, 4),
    }


def select(rows: Sequence[Row], preset: str, group_size: int, layout: str) -> list[Row]:
    """The rows of one line of a plot, by number of GPUs."""
    return [row for row in rows if (row["shape"], row["g"], row["layout"]) == (preset, group_size, layout)]


def fewest(rows: Sequence[Row]) -> int | None:
    """The fewest GPUs on which some layout fits."""
    return min((row["gpus"] for row in rows if row["fits"] == "yes"), default=None)


def crossing(rows: Sequence[Row], gradients: str, all_to_all: str) -> int | None:
    """The fewest GPUs from which on gradients are more than the all-to-all, in these columns."""
    below = [row["gpus"] for row in rows if row[gradients] <= row[all_to_all]]
    return min((row["gpus"] for row in rows if row["gpus"] > max(below, default=0)), default=None)


def findings(rows: Sequence[Row]) -> str:
    """A Markdown table of what one would look up in the plots."""
    heads = ("shape", "g", "fewest GPUs", "memory, GB", "gradients, GB", "factor", "bytes cross", "seconds cross")
    lines = [heads, ("---",) * len(heads)]
    for preset, name in SHAPES.items():
        for group_size in GROUP_SIZES:
            fixed = select(rows, preset, group_size, "fixed")
            at = next(index for index, row in enumerate(fixed) if row["gpus"] == 1024)
            sent, untied = (line[at]["sent gradients GB"] for line in (fixed, select(rows, preset, 1, "fixed")))
            lines.append(
                (
                    name,
                    str(group_size),
                    _number(fewest(select(rows, preset, group_size, "fastest"))),
                    f"{fixed[at]['memory total GB']:.1f}",
                    f"{sent:.1f}",
                    f"{untied / sent:.2f}",
                    _number(crossing(fixed, "sent gradients GB", "sent all-to-all GB")),
                    _number(crossing(fixed, "gradients s", "all-to-all s")),
                )
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"


def plot_memory(rows: Sequence[Row], hardware: Hardware) -> None:
    """The fullest rank in the fixed layout, against what a GPU has."""

    def draw(axes: Axes, preset: str) -> None:
        _lines(axes, rows, preset, "fixed", "memory total GB")
        axes.axhline(hardware.memory_gb, color="#c0392b", linestyle="--", linewidth=2)
        axes.text(8, hardware.memory_gb * 0.92, f"{hardware.memory_gb:g} GB", color="#c0392b", va="top")
        axes.set_yscale("log")
        axes.set_ylim(8, 2000)
        axes.set_yticks((10, 20, 40, 80, 160, 320, 640, 1280), ("10", "20", "40", "80", "160", "320", "640", "1,280"))
        axes.minorticks_off()

    _figure("memory.png", "Memory of the fullest rank (ZeRO 1, EP 8)", "memory, GB", draw, share=True)


def plot_traffic(rows: Sequence[Row]) -> None:
    """What a rank sends in the fixed layout: all-to-all against gradients, and where they cross."""

    def draw(axes: Axes, preset: str) -> None:
        untied = select(rows, preset, 1, "fixed")
        label = "all-to-all, any g" if preset == "olmoe" else None
        across = [row["sent all-to-all GB"] for row in untied]
        axes.plot(WORLD_SIZES, across, color="#2ca02c", linestyle="--", linewidth=3, label=label, zorder=5)
        _lines(axes, rows, preset, "fixed", "sent gradients GB", "gradients, ")
        for group_size in GROUP_SIZES:
            of_group = select(rows, preset, group_size, "fixed")
            if (gpus := crossing(of_group, "sent gradients GB", "sent all-to-all GB")) is not None:
                sent = next(row["sent gradients GB"] for row in of_group if row["gpus"] == gpus)
                axes.plot(gpus, sent, "o", color=COLOURS[group_size], markersize=12)
        axes.set_yscale("log")

    title = "Sent per rank and step (ZeRO 1, EP 8); dots: gradients are more from here on"
    _figure("traffic.png", title, "sent, GB", draw, share=True)


def plot_speed(rows: Sequence[Row]) -> None:
    """Tokens per second and GPU of the fastest layout that fits."""

    def draw(axes: Axes, preset: str) -> None:
        _lines(axes, rows, preset, "fastest", "tokens/s per GPU")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")

    _figure("speed.png", "Speed of the fastest layout that fits", "tokens/s per GPU", draw, share=False)


def plot_fewest(rows: Sequence[Row]) -> None:
    """The fewest GPUs on which any layout fits."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, group_size in enumerate(GROUP_SIZES):
        counts = [fewest(select(rows, preset, group_size, "fastest")) or 0 for preset in SHAPES]
        places = [place + 0.27 * (index - 1) for place in range(len(SHAPES))]
        bars = axes.bar(places, counts, 0.25, color=COLOURS[group_size], label=f"g = {group_size}")
        axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=15)
    axes.set_yscale("log", base=2)
    axes.set_ylim(4, 512)
    axes.set_yticks((8, 32, 128), ("8", "32", "128"))
    axes.set_xticks(range(len(SHAPES)), list(SHAPES.values()))
    axes.set_ylabel("GPUs of 80 GB")
    axes.set_title("Fewest GPUs on which training fits (8 is the fewest tried)")
    axes.legend(loc="upper left")
    figure.savefig(HERE / "fewest.png", dpi=100)
    plt.close(figure)


def _lines(axes: Axes, rows: Sequence[Row], preset: str, layout: str, column: str, label: str = "") -> None:
    """One line per group size; wider below, so that lines on top of each other show."""
    for width, group_size in zip((7, 5, 3), GROUP_SIZES, strict=True):
        known = [row for row in select(rows, preset, group_size, layout) if row[column] != ""]
        values = [row[column] for row in known]
        style = {"color": COLOURS[group_size], "linewidth": width, "label": f"{label}g = {group_size}"}
        axes.plot([row["gpus"] for row in known], values, **style)


def _figure(name: str, title: str, unit: str, draw: Callable[[Axes, str], None], share: bool) -> None:
    """A panel per shape, with GPUs below and one legend."""
    figure, panels = plt.subplots(1, len(SHAPES), figsize=(13, 5), sharey=share, layout="constrained")
    for axes, (preset, shape) in zip(panels, SHAPES.items(), strict=True):
        axes.set_xscale("log", base=2)
        draw(axes, preset)
        axes.set_title(shape)
        axes.set_xlabel("GPUs")
        axes.set_xticks((8, 64, 512, 4096), ("8", "64", "512", "4,096"))
        axes.set_xlim(7, 19000)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(unit)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title)
    figure.savefig(HERE / name, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    plt.rcParams.update({"font.size": 16})
    main()
