"""The page: its numbers, that it needs nothing else, that nothing in a run breaks out of it, what browsers see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tied.report.history import read_history
from megatron_tied.report.html_report import config_differences, flattened, html_report
from tests.monitor.browser import needs_browser, open_browser
from tests.report.html_page import Page
from tests.report.synthetic_runs import TIED, UNTIED, Synthetic, topology_of, write_config, write_lines

SECTIONS = ["summary", "loss", "speed", "routing", "tied", "banks", "config"]
_SIZES = """
    const boxes = [...document.querySelectorAll('svg, img')].map(element => element.getBoundingClientRect());
    return boxes.map(box => [box.width, box.height]);
"""
_COLOURS = """
    const of = (css, key) => getComputedStyle(document.querySelector(css))[key].match(/\\d+/g).slice(0, 3).map(Number);
    return [of('body', 'backgroundColor'), of('body', 'color'), of('#loss svg text', 'fill')];
"""


def report_of(*directories: Path) -> str:
    return html_report([read_history(directory, topology_of) for directory in directories])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    return Synthetic(UNTIED, seed=1).write(root / "untied"), Synthetic(TIED, seed=2).write(root / "tied")


@pytest.fixture(scope="module")
def compared(directories: tuple[Path, Path]) -> str:
    return report_of(*directories)


@pytest.fixture(scope="module")
def single(directories: tuple[Path, Path]) -> str:
    return report_of(directories[1])


def references(page: Page) -> Iterator[str]:
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                yield value
            yield from re.findall(r"url\(([^)]*)\)", value or "")


def test_every_section_in_order_and_in_the_table_of_contents(compared: str) -> None:
    page = Page(compared)
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == SECTIONS
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]


@pytest.mark.parametrize("which", ["single", "compared"])
def test_it_needs_nothing_but_itself(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    found = list(references(page))
    assert any(reference.startswith("data:image/png") for reference in found)
    for reference in found:
        assert reference.startswith("data:") or reference.removeprefix("#") in ids, reference
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "@import" not in text
    assert "url(" not in text[text.index("<style>") : text.index("</style>")]
    declared = [value for _, a in page.tags for name, value in a.items() if name.startswith("xmlns")]
    assert len(re.findall("https?:", text)) == len(declared)


def test_the_numbers_of_the_summary(compared: str) -> None:
    page = Page(compared)
    assert page.row("topology") == ["8 layers: 0 1 2 3 4 5 6 7", "8 layers: 0 [1 2] [3 4] [5 6] 7"]
    assert page.row("steps") == ["600 of 600, finished"] * 2
    assert page.row("parameters stored")[1] == "7,000,000 of 10,000,000 untied (70.0%)"
    assert page.row("peak memory, GB")[0] == "5.300 of 5.660 planned (94%)"
    assert page.row("peak memory, GB")[1] == f"4.100 of 4.400 planned (93%) ({4.1 / 5.3:.3f} x)"
    assert page.row("update / weight norm")[1] == "2.00e-04 (bank 4) to 1.00e-03 (bank 0)"


def test_every_chart_says_how_to_read_it(compared: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", compared, re.S)
    # Losses 3, speed and memory 4, routing 4 and a heat map of each run, agreement 3 and one of the tied run, banks 4.
    assert len(figures) == 3 + 4 + 6 + 4 + 4
    for figure in figures:
        assert figure.count("<svg") == 1
        assert re.search(r"<h3>[^<]{5,}</h3><p>[^<]{20,}[.:]?</p>", figure)
        assert re.search(r'role="img" aria-label="[^"]{5,}"', figure)


def test_text_of_charts_is_text(compared: str) -> None:
    assert ">step</text>" in compared
    assert ">cross entropy</text>" in compared


def test_charts_take_the_colours_of_the_page(compared: str) -> None:
    assert "currentColor" in compared
    assert not re.search("#0a0b0c|#0d0e0f|#f0f1f2", compared)


def test_the_config_of_one_run_and_the_differences_of_two(single: str, compared: str, directories: tuple) -> None:
    config = (directories[1] / "config.yaml").read_text()
    assert config.strip() in Page(single).texts["config"]
    page = Page(compared)
    assert page.row("tie.group_size") == ["1", "2"]
    assert page.row("tie.skip_first") == ["2", "1"]
    assert "train.run_dir" not in page.texts["config"]
    assert "model.num_layers" not in page.texts["config"]


def test_differences_of_configs() -> None:
    first, second = {"a": {"b": 1, "c": [1, 2]}, "train": {"run_dir": "x"}}, {"a": {"b": 1, "c": [1, 3]}, "d": {}}
    rows = {row.key: list(row.values) for row in config_differences([first, second])}
    assert rows == {"a.c": ["[1, 2]", "[1, 3]"], "d": ["(not there)", "{}"]}
    assert flattened({"a": {"b": {"c": 1}}, "d": {}}) == {"a.b.c": 1, "d": {}}


def test_what_is_not_logged_is_left_out_with_a_word(tmp_path: Path) -> None:
    page = Page(report_of(write_lines(tmp_path, [{"step": 1, "loss": 2.0, "lm_loss": 1.9}])))
    assert page.count("figure") == page.count("svg") == 1
    assert "Not logged, and so not drawn: Gradient norm." in page.texts["loss"]
    for section in ("speed", "routing", "tied", "banks"):
        assert "Not logged, and so not drawn: " in page.texts[section]
    assert "There is no config that can be read." in page.texts["config"]
    assert "config.yaml cannot be read: No such file" in page.texts["summary"]
    assert page.row("tokens/s (median)") == ["not logged"]


def test_runs_without_anything_in_common(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "first", [{"step": 1, "lm_loss": 2.0}])
    second = write_lines(tmp_path / "second", [{"step": 2, "lm_loss": None, "bank_weight_norm/00": 1.0}])
    assert "Difference to first" in Page(report_of(first, second)).texts["loss"]


def test_configs_that_do_not_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_config(tmp_path / name)
        write_lines(tmp_path / name, [{"step": 1, "loss": 1.0}])
    assert "No key of the configs differs" in Page(report_of(tmp_path / "a", tmp_path / "b")).texts["config"]


def test_nothing_in_a_run_becomes_markup_or_a_formula(tmp_path: Path) -> None:
    name = "<script>alert('$x^$')"
    runs = [tmp_path / name, tmp_path / "_hidden"]
    for place, directory in enumerate(runs):
        Synthetic(TIED, steps=200, seed=place).write(directory)
        config = (directory / "config.yaml").read_text()
        evil = f"</pre><script>alert({place})</script>"
        (directory / "config.yaml").write_text(f"{config}'{evil}': '{evil}'\n")
    for directories in (runs, runs[:1]):
        text = report_of(*directories)
        page = Page(text)
        assert page.count("script") == 0
        assert "<script" not in text
        assert "alert(" in page.texts["config"]
    page = Page(report_of(*runs))
    assert name in page.texts["summary"]
    assert page.rows[0][1:] == [name, "_hidden"]
    assert "this version cannot read config.yaml" in page.texts["summary"]


def test_more_runs_than_colours(tmp_path: Path) -> None:
    runs = [write_lines(tmp_path / f"run-{i}", [{"step": s, "lm_loss": float(i)} for s in (1, 2)]) for i in range(8)]
    page = Page(report_of(*runs))
    assert page.rows[0][1:] == [run.name for run in runs]


@needs_browser
@pytest.mark.parametrize("width", [1200, 480])
@pytest.mark.parametrize("which", ["single", "compared"])
def test_in_a_browser(which: str, width: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = tmp_path / "report.html"
    file.write_text(request.getfixturevalue(which), encoding="utf-8")
    with open_browser(width) as browser:
        browser.get(file.as_uri())
        assert browser.get_log("browser") == []
        for section in SECTIONS:
            assert browser.find_element("id", section).is_displayed()
            assert browser.find_element("css selector", f"#{section} h2").size["height"] > 0
        drawn = browser.execute_script(_SIZES)
        assert len(drawn) == Page(file.read_text(encoding="utf-8")).count("svg") > 10
        assert all(wide > 200 and high > 60 for wide, high in drawn)
        # Wide tables scroll in themselves; the page does not.
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@needs_browser
def test_letters_are_seen_in_the_dark_and_in_the_light(single: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(single, encoding="utf-8")
    with open_browser(1200) as browser:
        for scheme, dark in (("light", False), ("dark", True)):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            browser.get(file.as_uri())
            paper, ink, in_charts = (sum(colour) / 3 for colour in browser.execute_script(_COLOURS))
            assert (paper < 128) is dark
            assert abs(paper - ink) > 150
            assert in_charts == ink
