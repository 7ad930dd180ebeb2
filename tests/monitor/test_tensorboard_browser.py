"""TensorBoard, served and opened in a browser: what a run has written is there to be seen, in every tab."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from megatron_tied.monitor.dashboards import DASHBOARDS
from megatron_tied.monitor.sinks import Sinks
from megatron_tied.monitor.tensorboard import TensorBoardSink
from tests.monitor.browser import needs_browser, open_browser, serve_tensorboard
from tests.monitor.watched_run import describe, logged, write_steps

pytestmark = needs_browser

STEPS = 400
# The run was killed at steps 160 and 260, and went on after 150 and 200.
STARTS = ((0, 160), (150, 260), (200, STEPS))

# All elements that a selector names, also those in shadow roots, which TensorBoard is made of.
_FIND = """
function* within(node) {
  yield node;
  for (const child of [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes]) yield* within(child);
}
const found = [...within(document)].filter(node => node.nodeType === 1 && node.matches(arguments[0]));
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = tmp_path_factory.mktemp("run") / "tensorboard"
    for done, last in STARTS:
        with Sinks(TensorBoardSink(directory, describe(), done)) as sinks:
            write_steps(sinks, range(done + 1, last + 1))
    with serve_tensorboard(directory) as address:
        wait_for(lambda: fetch(address, "runs") == ["."], "the run to be read")
        yield address


class Tab:
    """A tab of TensorBoard in a browser."""

    def __init__(self, address: str, browser: Any):
        self._address, self._browser = address, browser

    def open(self, name: str) -> None:
        self._browser.get("about:blank")
        self._browser.get(f"{self._address}/#{name}")

    def values(self, selector: str, what: str) -> list[Any]:
        """A JavaScript expression on each element (`node`) that is found."""
        return self._browser.execute_script(f"{_FIND} return found.map(node => {what});", selector)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self._browser.execute_script(f"{_FIND} return found;", selector)]

    def wait_for_texts(self, selector: str, condition: Callable[[list[str]], bool]) -> list[str]:
        wait_for(lambda: condition(self.texts(selector)), f"the right {selector}", self)
        return self.texts(selector)


@pytest.fixture(scope="module")
def tab(address: str) -> Iterator[Tab]:
    # So high that all charts are in view: TensorBoard loads others only when they are scrolled to.
    with open_browser(1500, 8000) as browser:
        yield Tab(address, browser)


def fetch(address: str, route: str, **arguments: str) -> Any:
    with urllib.request.urlopen(f"{address}/data/{route}?{urlencode(arguments)}", timeout=30) as answer:
        return json.load(answer)


def wait_for(condition: Callable[[], object], what: str, tab: Tab | None = None, limit: float = 40) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"waited for {what}; the page says {tab.texts('body') if tab else 'nothing'}"
        time.sleep(0.2)


def test_the_five_dashboards_are_served_in_order(address: str):
    layout = fetch(address, "plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == list(DASHBOARDS)


@pytest.mark.parametrize(("dashboard", "chart"), [(name, chart) for name in DASHBOARDS for chart in DASHBOARDS[name]])
def test_every_chart_has_data_for_each_of_its_patterns(address: str, dashboard: str, chart: str):
    for pattern in DASHBOARDS[dashboard][chart]:
        answer = fetch(address, "plugin/custom_scalars/scalars", run=".", tag=pattern)
        assert answer["regex_valid"]
        assert answer["tag_to_events"]
        for points in answer["tag_to_events"].values():
            steps = [step for _, step, _ in points]
            assert steps == sorted(set(steps))
            assert steps[-1] == STEPS


def test_custom_scalars_tab(tab: Tab):
    tab.open("custom_scalars")
    charts = [chart for charts in DASHBOARDS.values() for chart in charts]
    cards = "tf-custom-scalar-multi-line-chart-card"
    of_charts = tab.wait_for_texts(cards, lambda texts: len(texts) == len(charts) and all(map(has_matches, texts)))
    assert [text.splitlines()[0] for text in of_charts] == charts
    dashboards = tab.texts("tf-category-paginated-view")
    assert [text.splitlines()[0] for text in dashboards] == list(DASHBOARDS)


def has_matches(text: str) -> bool:
    return re.search(r"Matches \([1-9]", text) is not None


def test_images_tab(tab: Tab):
    tab.open("images")
    sizes = "[node.naturalWidth, node.naturalHeight]"
    wait_for(lambda: sum(width > 0 for width, _ in tab.values("img", sizes)) == 3, "three images", tab)
    assert all(width > 300 and height > 200 for width, height in tab.values("img", sizes))
    tags = [text.splitlines()[0] for text in tab.texts("tf-image-loader")]
    assert tags == ["agreement/groups", "load/banks", "load/layers"]


def test_hparams_tab_shows_what_ties_and_the_last_values_of_curves(tab: Tab):
    tab.open("hparams")
    # Five settings unless asked for more, then the metrics.
    (table,) = tab.wait_for_texts("tf-hparams-table-view", lambda texts: len(texts) == 1 and "train/" in texts[0])
    shown = table.replace("\n", "")
    assert all(name in shown for name in ("tie.group_size", "tie.pattern", "parameters.unique"))
    assert all(name in shown for name in ("train/lm_loss", "validation/validation_loss", "progress/tokens_per_second"))
    assert f"{logged(STEPS)['lm_loss']:.4f}" in table


def test_text_tab(tab: Tab):
    tab.open("text")
    names = ("config", "parameters", "topology")
    cards = tab.wait_for_texts("tf-text-loader", lambda texts: len(texts) == 3 and all("step 0" in t for t in texts))
    assert [card.splitlines()[0] for card in cards] == [f"run/{name}/text_summary" for name in names]
    assert [card.count("step 0") for card in cards] == [1, 1, 1]
    config, parameters, topology = cards
    assert "num_moe_experts: 16" in config
    assert "Tying saves 37.5% of the parameters." in parameters
    assert "8 layers: 0 [1 2] [3 4] [5 6] 7" in topology
    assert {"5,000,000", "3 4", "1.414"} <= set(tab.texts("td"))
