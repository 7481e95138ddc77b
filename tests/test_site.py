"""The documentation site is built without a warning; its pages, its search and its dark colours work in a browser."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lightning_peft.methods import every_method

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the site and serve it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def luminance(colour: str) -> float:
    """Return the relative luminance of ``rgb(r, g, b)`` (WCAG 2.2)."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_browser_reads_it(site: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme)
            failed: list[str] = []
            page.on("requestfailed", lambda request, failed=failed: failed.append(request.url))
            page.on("pageerror", lambda error, failed=failed: failed.append(str(error)))
            for path in ("", "tutorials/own_csv/", "choosing/", "api/", *(f"methods/{m}/" for m in ("lora", "vpt"))):
                page.goto(f"{site}/{path}", wait_until="networkidle")  # what is not there yet fails when it is left
                assert page.locator("article h1").inner_text()
            colour, ground = page.evaluate(
                "[getComputedStyle(document.querySelector('article p')).color,"
                " getComputedStyle(document.body).backgroundColor]"
            )
            light, dark = sorted([luminance(colour), luminance(ground)], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 7  # enhanced contrast
            assert (luminance(ground) < 0.1) == (scheme == "dark")
            assert failed == []
        page.goto(site)
        page.locator("input.md-search__input").fill("LoRA")
        page.locator(".md-search-result__link").first.wait_for(timeout=60_000)
        found = page.locator(".md-search-result__link").evaluate_all("links => links.map(link => link.pathname)")
        assert "/methods/lora/" in found
        browser.close()


def test_each_method_has_a_page(site: str) -> None:
    from urllib.request import urlopen

    for method in every_method().values():
        stem = method.__module__.rpartition(".")[2]
        with urlopen(f"{site}/methods/{stem}/") as answer:
            text = answer.read().decode()
        assert "What it does" in text
        assert "Arguments" in text
        shown = re.sub("<[^>]+>", "", text)  # defaults, not the calls that declare them
        assert not re.search(r"\b(bounded|natural|positive|rate|choice|numbers)\(", shown)
