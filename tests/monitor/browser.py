"""A real TensorBoard and a real browser to look at it with."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.training.runs import free_port

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_HAS_SELENIUM = importlib.util.find_spec("selenium") is not None

needs_browser = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER and _HAS_SELENIUM), reason="needs chromium, chromedriver and selenium"
)


@contextmanager
def serve_tensorboard(directory: Path, start_within: float = 60) -> Iterator[str]:
    """The address of a TensorBoard that shows `directory`, on this host only; it ends with the context."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory), "--host", "127.0.0.1"]
    output = directory.parent / f"tensorboard-{port}.log"
    with output.open("wb") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_it_answers(address, process, output, start_within)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def open_browser(width: int = 1400, height: int = 1000) -> Iterator[Chrome]:
    """A headless Chromium with a window of `width` x `height` pixels."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = _CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(flag)
    browser = Chrome(options=options, service=ChromeService(_DRIVER))
    try:
        browser.set_window_size(width, height)
        yield browser
    finally:
        browser.quit()


def _wait_until_it_answers(address: str, process: subprocess.Popen, output: Path, limit: float) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        assert process.poll() is None, output.read_text()
        try:
            urllib.request.urlopen(f"{address}/data/environment", timeout=5).close()
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"TensorBoard did not answer within {limit:.0f} s: {output.read_text()}")
