"""The page of a report in headless Chromium, at the widths of a laptop and of a phone: measured in the page itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from base64 import b64decode
from html import unescape
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("transformers")  # the trainer's

import report_runs
from entropy_kernels.analysis import plot_style
from entropy_kernels.trainer import report
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.methods import METHODS

#: Names of the browser; ENTROPY_KERNELS_CHROMIUM names one that is not on the path.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("ENTROPY_KERNELS_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"needs a browser: {', '.join(BROWSERS[:3])} on the path, or ENTROPY_KERNELS_CHROMIUM"
)
#: Screens in CSS pixels, and the smallest text that can be read there.
SCREENS = {"laptop": (1280, 800), "phone": (390, 844)}
LEGIBLE = 9.0

# Of texts their lines' boxes, each with what it says: of text nodes by a Range, since elements are wider than words.
MEASURE = """
const boxes = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; (node = walker.nextNode()); ) {
  const parent = node.parentElement;
  if (!node.data.trim() || ["SCRIPT", "STYLE"].includes(parent.tagName)) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  for (const r of range.getClientRects())
    if (r.width && r.height) boxes.push([node.data.trim().slice(0, 50), r.left, r.top, r.right, r.bottom]);
}
const overlaps = [], outside = [], clipped = [];
for (let i = 0; i < boxes.length; i++) {
  const [text, left, top, right, bottom] = boxes[i];
  if (left < -0.5 || right > innerWidth + 0.5) outside.push(text);
  for (let j = i + 1; j < boxes.length; j++) {
    const [other, l, t, r, b] = boxes[j];
    const width = Math.min(right, r) - Math.max(left, l), height = Math.min(bottom, b) - Math.max(top, t);
    if (width > 0 && height > 0 && width * height > 1) overlaps.push([text, other]);
  }
}
for (const e of document.body.querySelectorAll("*"))
  if (getComputedStyle(e).overflowX !== "visible" && e.scrollWidth > e.clientWidth + 1) clipped.push(e.tagName);
const bottom = name => document.querySelector(name)?.getBoundingClientRect().bottom;
parent.postMessage(JSON.stringify({
  width: innerWidth, scroll: document.scrollingElement.scrollWidth, overlaps, outside, clipped, texts: boxes.length,
  verdict: bottom("h1 + p"), look: bottom("h1 + p + ul"), lines: bottom("table.lines"),
  images: [...document.images].map(i => ({
    src: i.currentSrc, shown: i.getBoundingClientRect().width, pixels: i.naturalWidth, loaded: i.complete})),
}), "*");
"""


def measured(page: str, screen: str, folder: Path) -> dict[str, Any]:
    """What a page is like on a screen. It is loaded in a frame, since the windows of a browser have a least width."""
    width, height = SCREENS[screen]
    script = f"<script>addEventListener('load', () => {{ {MEASURE} }})</script>"
    (folder / "page.html").write_text(page.replace("</body>", f"{script}</body>"))
    (folder / "frame.html").write_text(
        "<!doctype html><body><pre></pre><script>onmessage = event => {"
        "document.querySelector('pre').textContent = event.data; document.querySelector('iframe').remove()}</script>"
        f"<iframe src='page.html' style='width: {width}px; height: {height}px; border: 0'></iframe></body>"
    )
    command = [
        *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"),
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--window-size=1400,900"),
        (folder / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre>(.+?)</pre>", done.stdout, re.S)
    assert found, f"the page was not measured: {done.stderr[-2000:]}"
    values: dict[str, Any] = json.loads(unescape(found[1]))
    return values


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with a page that was measured."""
    wrong = [f"{name}: {found[name]}" for name in ("overlaps", "outside", "clipped") if found[name]]
    wrong += [f"the page scrolls sideways: {found['scroll']} px"] if found["scroll"] > found["width"] else []
    for image in found["images"]:
        inches = image["pixels"] / dots_per_inch(image["src"])
        size = plot_style.NOTE_SIZE / 72 / inches * image["shown"]
        wrong += [f"text of {size:.1f} px in a picture {image['shown']} px wide"] if size < LEGIBLE else []
    return wrong


def dots_per_inch(address: str) -> float:
    """Of a PNG in an address, from its pHYs chunk."""
    data = b64decode(address.partition(",")[2])
    at = data.index(b"pHYs") + 4
    return float(struct.unpack(">I", data[at : at + 4])[0]) * 0.0254


#: The commands' runs: what is left out, and the seeds.
SWEEPS = {"quickstart": ("random_penalized", 1), "reproduce": ("target", 3)}


@pytest.fixture(scope="module", params=list(SWEEPS))
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    out, (without, seeds) = tmp_path_factory.mktemp("report"), SWEEPS[request.param]
    report_runs.report(out, seeds, without)
    return (out / "report.html").read_text()


@pytest.mark.parametrize("screen", list(SCREENS))
def test_a_report_can_be_read(page: str, screen: str, tmp_path: Path) -> None:
    found = measured(page, screen, tmp_path)
    assert (found["width"], len(found["images"])) == (SCREENS[screen][0], 3) and found["texts"] > 200
    assert not faults(found)
    first = SCREENS[screen][1]
    assert found["verdict"] < found["look"] < found["lines"] <= first
    assert len(page) < 1.5e6


@pytest.mark.parametrize("screen", list(SCREENS))
def test_a_report_of_every_method_can_be_read(screen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many runs with long names; their pictures are those of one."""
    runs = report_runs.logs(1)
    task = "reasoning-gym:countdown?min_numbers=3&max_numbers=4&max_value=100&seed=7"
    many = dict.fromkeys(METHODS, runs["clip_cov"]) | {"grpo": runs["grpo"], "kl_cov_torch_ops": runs["kl_cov"]}
    monkeypatch.setattr(report_runs, "logs", lambda seeds: many)
    monkeypatch.setattr(report, "draw", lambda *_, narrow=False: plot_style.panels(1, (11.0, 3.0), narrow=narrow)[0])
    base = TrainerConfig(task=task, model="organisation/a-model-with-a-long-name-1.5B-instruct")
    report_runs.report(tmp_path / "out", 1, base=base, title=f"{base.model} on {base.task}: policy entropy")
    assert not faults(measured((tmp_path / "out" / "report.html").read_text(), screen, tmp_path))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<p>one</p><p style='margin-top: -30px'>another</p>", "overlaps"),
        ("<table><tr>" + "<td>0.123 ± 0.045</td>" * 20 + "</tr></table>", "scrolls sideways"),
        ("<div style='overflow-x: auto'><pre>" + "wide " * 200 + "</pre></div>", "clipped"),
        ("<p style='margin-left: -20px'>begins outside</p>", "outside"),
    ],
)
def test_faults_are_seen(body: str, fault: str, tmp_path: Path) -> None:
    found = faults(measured(f"<!doctype html><html><body>{body}</body></html>", "phone", tmp_path))
    assert any(fault in text for text in found), found


def test_a_picture_for_laptops_is_too_small_for_a_phone(page: str, tmp_path: Path) -> None:
    found = faults(measured(re.sub(r"<source [^>]*>", "", page), "phone", tmp_path))
    assert any("text of" in text for text in found), found
