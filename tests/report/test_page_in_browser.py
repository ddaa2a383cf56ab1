"""The page in a real browser: no error, no request, nothing wider than the window, values by keyboard."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from html_reader import read_html
from PIL import Image
from synthetic_run import write_run

from slimfit_ds.report.run_page import write_run_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here: `apt-get install -y chromium` to look at the page"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
)


def browse(page: Path, tmp_path: Path, *flags: str) -> tuple[str, str]:
    """What Chromium prints and what it complains of."""
    command = [
        BROWSER,
        *FLAGS.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run(
        [*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture
def page(tmp_path):
    write_run(tmp_path / "slim", steps=150, layers=37)
    write_run(tmp_path / "full", steps=150, layers=37, freezes=False, seed=1)
    write_run_page(tmp_path / "slim", tmp_path / "page.html", tmp_path / "full")
    return tmp_path / "page.html"


@pytest.mark.slow
def test_pictures_in_both_schemes(page, tmp_path):
    ground = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        out = tmp_path / f"{scheme}.png"
        flags = (
            f"--blink-settings=preferredColorScheme={number}",
            "--window-size=1280,3000",
            f"--screenshot={out}",
        )
        _, complaints = browse(page, tmp_path, *flags)
        assert complaints == ""
        picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
        ground[scheme] = picture[5, 5].sum() / 3
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100, "an empty page"
    assert ground["dark"] < 60
    assert ground["light"] > 230


@pytest.mark.slow
def test_narrow_windows_and_keyboard(page, tmp_path):
    """The page's own policy forbids foreign scripts, so a copy without it carries the probe."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    probe = """<script>
    var plot = document.querySelector(".plot");
    function press(key) { plot.dispatchEvent(new KeyboardEvent("keydown", { key: key, bubbles: true })); }
    press("Home"); document.body.dataset.first = plot.querySelector(".read").textContent;
    press("End"); document.body.dataset.last = plot.querySelector(".read").textContent;
    press("Escape"); document.body.dataset.none = plot.querySelector(".read").textContent;
    document.body.dataset.width = document.documentElement.scrollWidth + "/" + window.innerWidth;
    </script></body>"""
    inner = tmp_path / "inner.html"
    inner.write_text(text.replace("</body>", probe), encoding="utf-8")
    # Chromium's own window is at least 500 pixels wide; a frame is as narrow as one likes.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<body style="margin:0"><iframe src="{inner.as_uri()}" style="border:0;width:360px;height:5000px">
        </iframe><script>onload = function () {{
        document.body.dataset.inside = JSON.stringify(frames[0].document.body.dataset); }}</script></body>"""
    )
    printed, _ = browse(frame, tmp_path, "--allow-file-access-from-files", "--dump-dom")
    said = (
        read_html(re.sub(r"<!doctype[^>]*>", "", printed, flags=re.I))
        .all("body")[0]
        .attributes["data-inside"]
    )
    import json

    seen = json.loads(said)
    assert seen["width"] == "360/360"
    assert re.fullmatch(r"step 1: this run [\d.]+, baseline [\d.]+", seen["first"])
    assert re.fullmatch(r"step 150: this run [\d.]+, baseline [\d.]+", seen["last"])
    assert seen["none"] == ""
