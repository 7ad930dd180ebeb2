"""The dashboards hold every metric that is looked at, each once, and nothing that there is not."""

from __future__ import annotations

import re

import pytest

from megatron_tied.monitor.dashboards import DASHBOARDS
from megatron_tied.monitor.sinks import tensorboard_tag
from tests.monitor.watched_run import metric_names

TAGS = sorted(map(tensorboard_tag, metric_names()))
CHARTS = [(name, chart) for name, charts in DASHBOARDS.items() for chart in charts]

# Told as numbers of one moment, or in finer detail than a dashboard has room for: the Scalars tab has them.
_ELSEWHERE = re.compile(
    r"progress/tokens|model/.*|bank_balance_loss/.*|layer_balance_loss/.*|(layer|bank)_(max_logit|z_loss)/.*|"
    r"(layer|bank)_load_(min|max|std|p50|p75)/.*|layer_(dropped|ep_busiest)/.*"
)


def drawn(dashboard: str, chart: str) -> list[str]:
    """As TensorBoard does it: `match`, which is anchored at the beginning only."""
    return [tag for tag in TAGS if any(re.match(pattern, tag) for pattern in DASHBOARDS[dashboard][chart])]


def test_order():
    assert list(DASHBOARDS) == ["Training", "Routing health", "Tied groups", "Banks", "System"]


def test_every_metric_has_a_chart():
    found = {tag for place in CHARTS for tag in drawn(*place)}
    assert [tag for tag in TAGS if tag not in found and not _ELSEWHERE.fullmatch(tag)] == []
    assert [tag for tag in found if _ELSEWHERE.fullmatch(tag)] == []


@pytest.mark.parametrize(("dashboard", "chart"), CHARTS)
def test_every_pattern_finds_something_and_reads_to_the_end_of_the_tag(dashboard, chart):
    for pattern in DASHBOARDS[dashboard][chart]:
        matched = [tag for tag in TAGS if re.match(pattern, tag)]
        assert matched
        assert not any(re.match(pattern, f"x{tag}") for tag in matched)
        if not pattern.endswith(".+$"):
            assert not any(re.match(pattern, f"{tag}x") for tag in matched)


@pytest.mark.parametrize(
    ("dashboard", "chart", "tags"),
    [
        ("Routing health", "MaxVio by layer", [f"layer_max_vio/{layer:02d}" for layer in range(8)]),
        ("Routing health", "MaxVio by bank", [f"bank_max_vio/{bank:02d}" for bank in range(5)]),
        ("Banks", "Gradient cosine between use sites", [f"bank_gradient_cosine/{bank:02d}" for bank in (1, 2, 3)]),
        (
            "Tied groups",
            "Same top-1 expert by bank, and chance",
            [f"agreement_top1{end}/{bank:02d}" for end in ("", "_chance") for bank in (1, 2, 3)],
        ),
        ("Training", "Loss: training and validation", ["train/lm_loss", "validation/validation_loss"]),
        (
            "System",
            "Memory in GB: measured, planned",
            ["system/memory_fullest_gb", "system/memory_gb", "system/planned_memory_gb"],
        ),
    ],
)
def test_what_a_chart_draws(dashboard, chart, tags):
    assert drawn(dashboard, chart) == sorted(tags)


def test_a_hundredth_layer_is_drawn_too():
    (pattern,) = DASHBOARDS["Routing health"]["MaxVio by layer"]
    assert re.match(pattern, "layer_max_vio/100")


def test_a_dashboard_fits_a_page_and_titles_tell_charts_apart():
    assert all(len(charts) <= 12 for charts in DASHBOARDS.values())
    assert all(len(chart) <= 44 for _, chart in CHARTS)
