"""The page of a run: complete, self-contained, true to the history, and safe with any file."""

import base64
import io
import json
import math
import re
import statistics

import numpy as np
import pytest
from html_reader import read_html
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_run import layer_names, write_run

from slimfit_ds.report.run_data import read_run
from slimfit_ds.report.run_page import render_run, write_run_page

TIMES = "\N{MULTIPLICATION SIGN}"


def page_of(folder, baseline=None):
    return render_run(read_run(folder), read_run(baseline) if baseline else None)


def tiles(root):
    boxes = root.all("dl", "tiles")[0].all("div")
    return {box.all("dt")[0].text: [dd.text for dd in box.all("dd")] for box in boxes}


def rows(table):
    return [[cell.text for cell in row.children if not isinstance(cell, str)] for row in table.all("tr")]


def seconds_of(text):
    value, unit = text.split()
    return float(value) / {"ms": 1000, "s": 1}[unit]


def test_numbers_are_those_of_the_history(tmp_path):
    lines = write_run(tmp_path / "run", steps=120, layers=20)
    shown = tiles(read_html(page_of(tmp_path / "run")))
    evaluations = [
        (line["evaluation"]["accuracy"], line["step"] + 1) for line in lines if "evaluation" in line
    ]
    best, when = max(evaluations)
    assert shown["best accuracy"] == [f"{best:.4g}", f"after {when} steps; last {evaluations[-1][0]:.4g}"]
    tail = statistics.fmean(line["loss"] for line in lines[-12:])
    assert shown["training loss"][0] == f"{tail:.4g}"
    assert shown["peak memory of a rank"] == ["1 GiB", "allocated on the GPU"]
    assert shown["frozen layers"][0] == "90.0%"
    parameters = statistics.fmean(line["frozen_parameters"] for line in lines)
    assert shown["frozen layers"][1] == f"{parameters:.1%} of the parameters"
    typical = statistics.median(line["seconds"] for line in lines[2:])
    assert seconds_of(shown["time per step"][0]) == pytest.approx(typical, rel=5e-3)
    rate = statistics.median(line["tokens"] / line["seconds"] for line in lines)
    assert float(shown["tokens per second"][0].removesuffix("k")) == pytest.approx(rate / 1000, rel=5e-3)


def test_layers_are_counted_and_drawn(tmp_path):
    lines = write_run(tmp_path / "run", steps=90, layers=12)
    root = read_html(page_of(tmp_path / "run"))
    table = rows(next(t for t in root.all("table") if "steps trained" in t.text))[1:]
    names = layer_names(12)
    assert [row[0] for row in table] == names
    for name, row in zip(names, table, strict=True):
        times = sum(name in line["active_layers"] for line in lines)
        assert int(row[2]) == times
        assert row[3] == f"{times / 90:.1%}"
    source = next(img.attributes["src"] for img in root.all("img"))
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGBA")
    drawn = np.asarray(picture)[..., 3] > 0
    expected = [[name in line["active_layers"] for line in lines] for name in names]
    assert drawn.tolist() == expected


def test_time_and_memory_by_kind(tmp_path):
    lines = write_run(tmp_path / "run", steps=60)
    root = read_html(page_of(tmp_path / "run"))
    bars = {figure.all("b")[0].text: figure for figure in root.all("figure", "bars")}
    split = {row[0]: row[1].rpartition(" (")[0] for row in rows(bars["Median step"].all("table")[0])}
    for phase, label in (("forward", "forward"), ("backward", "backward"), ("step", "optimizer step")):
        expected = statistics.median(line["times"][phase] for line in lines[2:])
        assert seconds_of(split[label]) == pytest.approx(expected, rel=5e-3)
    whole = statistics.median(line["seconds"] for line in lines[2:])
    known = sum(statistics.median(line["times"][phase] for line in lines[2:]) for phase in lines[0]["times"])
    assert seconds_of(split["other"]) == pytest.approx(whole - known, rel=5e-3)
    held = rows(bars["Held between steps, on the device"].all("table")[0])
    assert held == [
        ["weights", "256 MiB (79.8%)"],
        ["gradients", "1 MiB (0.3%)"],
        ["optimizer states", "64 MiB (19.9%)"],
    ]
    host = bars["Held between steps, in host memory"]
    assert rows(host.all("table")[0]) == [["optimizer states on the host", "512 MiB (100.0%)"]]


def test_baseline_stands_beside(tmp_path):
    mine = write_run(tmp_path / "slim", steps=80)
    other = write_run(tmp_path / "full", steps=80, seed=1, freezes=False, pace=2.0)
    root = read_html(page_of(tmp_path / "slim", tmp_path / "full"))
    table = {row[0]: row[1:] for row in rows(root.all("table")[0])[1:]}
    assert table["peak memory of a rank"] == ["1 GiB", "2 GiB", f"0.50{TIMES} better"]
    ratio = statistics.median(line["seconds"] for line in mine[2:]) / statistics.median(
        line["seconds"] for line in other[2:]
    )
    assert table["time per step"][2] == f"{ratio:.2f}{TIMES} better"
    a, b = (max(line["evaluation"]["accuracy"] for line in x if "evaluation" in line) for x in (mine, other))
    verdict = "" if abs(a / b - 1) <= 0.005 else " better" if a > b else " worse"
    assert table["best accuracy"][2] == f"{a / b:.2f}{TIMES}{verdict}"
    loss = [plot for plot in root.all("div", "plot") if "Training loss" in plot.attributes["aria-label"]]
    assert len(loss) == 2
    series = json.loads(loss[0].attributes["data-points"])["series"]
    assert [line["name"] for line in series] == ["this run", "baseline"]


def test_curve_stands_where_the_values_are(tmp_path):
    lines = write_run(tmp_path / "run", steps=40)
    root = read_html(page_of(tmp_path / "run"))
    rate = next(f for f in root.all("figure", "chart") if f.all("b")[0].text == "Learning rate")
    path = next(p for p in rate.all("path") if "line" in p.attributes["class"].split()).attributes["d"]
    points = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]
    assert len(points) == 40
    ticks = [(float(s.attributes["style"][4:-1]) * 10, float(s.text)) for s in rate.all("span", "y")]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    for line, (x, y) in zip(lines, points, strict=True):
        assert x == pytest.approx(line["step"] / 39 * 1000, abs=0.1)
        assert v0 + (y - y0) / (y1 - y0) * (v1 - v0) == pytest.approx(line["lr"], abs=2e-6)


def test_nothing_comes_from_outside(tmp_path):
    write_run(tmp_path / "run")
    text = page_of(tmp_path / "run")
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    root = read_html(text)
    for node in root.everything():
        assert node.tag not in {"link", "iframe", "object", "embed", "base"}
        for key in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            assert node.attributes.get(key, "#").startswith(("#", "data:image/png;base64,"))
        assert not [key for key in node.attributes if key.startswith("on")]
    policy = next(m for m in root.all("meta") if "Content-Security-Policy" in m.attributes.values())
    assert "default-src 'none'" in policy.attributes["content"]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "</style></script><b>",
    "\x00\x1b[31m\ud800 & \u202e",
    "javascript:alert(1)",
    "layer.999999999999999999999.\u00b2\u0661",
    "x" * 5000,
]


def test_hostile_names_are_text(tmp_path):
    folder = tmp_path / "<b>run & co"
    write_run(folder, steps=5)
    lines = [
        {
            "step": i,
            "loss": 1.0,
            "seconds": 0.1,
            "active_layers": HOSTILE,
            "statistics": dict.fromkeys(HOSTILE, 0.1),
            "times": dict.fromkeys(HOSTILE, 0.1),
            "memory": dict.fromkeys(HOSTILE, 1),
            "evaluation": dict.fromkeys(HOSTILE, 0.5),
        }
        for i in range(5)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"layers": dict.fromkeys(HOSTILE, 5), "status": "failed", "error": HOSTILE[0]}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.json").write_text(json.dumps({"versions": dict.fromkeys(HOSTILE, "<i>1</i>")}))
    (folder / "recipe.yaml").write_text("task: </pre><script>alert(2)</script>\n")
    write_run_page(folder, tmp_path / "page.html")
    root = read_html((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(root.all("script")) == 1
    assert not root.all("i", "hostile")
    assert all("onerror" not in node.attributes for node in root.everything())
    assert [img.attributes["src"][:15] for img in root.all("img")] == ["data:image/png;"]
    names = [row[0] for row in rows(next(t for t in root.all("table") if "steps trained" in t.text))[1:]]
    assert HOSTILE[0] in names
    assert "49" not in names
    assert root.all("h1")[0].text == "<b>run & co"


def test_half_a_line_nan_and_missing_fields(tmp_path):
    folder = tmp_path / "run"
    lines = write_run(folder, steps=30, finished=False, facts=False)
    kept = [json.dumps(line) for line in lines]
    kept[4] = kept[4].replace(f'"loss": {lines[4]["loss"]}', '"loss": null')
    kept[5] = json.dumps({**lines[5], "loss": math.nan})
    kept[6] = json.dumps({"step": 6})
    kept[7] = "not json"
    kept[8] = "[1, 2]"
    (folder / "history.jsonl").write_text("\n".join(kept) + '\n{"step": 30, "lo')
    run = read_run(folder)
    assert len(run.steps) == 28
    assert run.unreadable == 2
    assert np.flatnonzero(np.isnan(run.columns["loss"])).tolist() == [4, 5, 6]
    root = read_html(page_of(folder))
    notes = [p.text for p in root.all("p", "note")]
    assert notes == [
        "2 lines of history.jsonl could not be read and are left out.",
        "3 of 28 steps have no finite loss.",
    ]
    loss = next(f for f in root.all("figure", "chart") if f.all("b")[0].text == "Training loss")
    raw = next(p for p in loss.all("path") if "faint" in p.attributes["class"].split())
    assert raw.attributes["d"].count("M") == 2  # the pen is lifted once


@pytest.mark.parametrize("keep", ["history.jsonl", "recipe.yaml", "metrics.json", "run.json"])
def test_any_one_file_is_enough(tmp_path, keep):
    folder = tmp_path / "run"
    write_run(folder, steps=12)
    for place in folder.iterdir():
        if place.name != keep:
            place.unlink()
    root = read_html(page_of(folder))
    assert root.all("h1")[0].text == "run"


@settings(max_examples=40)
@given(st.data())
def test_no_file_can_break_it(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["step", "loss", "layers", "steps", "a", "memory", "best", "metric"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
    keys = ["step", "loss", "lr", "seconds", "active_layers", "statistics", "times", "memory", "evaluation",
            "frozen_parameters", "tokens", "memory_bytes"]  # fmt: skip
    line = st.dictionaries(st.sampled_from(keys), anything)
    lines = data.draw(st.lists(line, max_size=6))
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("run.json", "metrics.json", "measures.json"):
        facts = ["status", "layers", "steps", "best", "pid", "host", "memory", "versions", "hardware", "error",
                 "process_started", "seed", "peak_bytes", "metric", "tokens_per_second"]  # fmt: skip
        content = data.draw(st.dictionaries(st.sampled_from(facts), anything))
        (folder / name).write_text(json.dumps(content))
    read_html(page_of(folder))
    read_html(page_of(folder, folder))


@pytest.mark.slow
def test_a_hundred_thousand_steps_fit_into_two_megabytes(tmp_path):
    folder = tmp_path / "run"
    lines = write_run(folder, steps=100_000, layers=300, active=4, finished=False)
    output = tmp_path / "page.html"
    write_run_page(folder, output)
    assert output.stat().st_size < 2_000_000
    root = read_html(output.read_text(encoding="utf-8"))
    table = rows(next(t for t in root.all("table") if "steps trained" in t.text))[1:]
    assert len(table) == 300
    first = sum(lines[0]["active_layers"][0] in line["active_layers"] for line in lines)
    assert first in {int(row[2]) for row in table if row[0] == lines[0]["active_layers"][0]}


def test_a_page_is_replaced_whole(tmp_path, monkeypatch):
    write_run(tmp_path / "run", steps=5)
    output = tmp_path / "page.html"
    write_run_page(tmp_path / "run", output)
    before = output.read_bytes()
    monkeypatch.setattr(
        "slimfit_ds.report.run_page.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        write_run_page(tmp_path / "run", output)
    assert output.read_bytes() == before
    assert sorted(place.name for place in tmp_path.iterdir()) == ["page.html", "run"]


def test_a_tracked_step_and_the_measures_of_a_comparison(tmp_path):
    lines = write_run(tmp_path / "run", steps=10)
    lines[3]["memory_at_peak"] = {"parameters": 3 * 2**20, "working": 2**20, "optimizer_host": 2**20}
    (tmp_path / "run" / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run(tmp_path / "compared", steps=10)
    peak = {"parameters": 2**20, "saved_activations_static": 2**20}
    (tmp_path / "compared" / "measures.json").write_text(json.dumps({"memory": {"at_peak": peak}}))
    root = read_html(page_of(tmp_path / "run", tmp_path / "compared"))
    bars = {figure.all("b")[0].text: figure for figure in root.all("figure", "bars")}
    table = bars["At the peak of a tracked step, on the device"].all("table")[0]
    assert rows(table) == [
        ["", "this run", "baseline"],
        ["weights", "3 MiB (75.0%)", "1 MiB (50.0%)"],
        ["saved activations, static", "\N{EN DASH}", "1 MiB (50.0%)"],
        ["working set", "1 MiB (25.0%)", "\N{EN DASH}"],
    ]
    widths = [[float(i.attributes["style"][6:-1]) for i in stack.all("i")] for stack in
              bars["At the peak of a tracked step, on the device"].all("div", "stack")]  # fmt: skip
    assert widths == [[75.0, 25.0], [25.0, 25.0]]


def test_the_history_of_a_trainer(tmp_path):
    """`SlimFitCallback` knows the loss of few steps, and the Trainer's metrics come with its own speed."""
    folder = tmp_path / "run"
    write_run(folder, steps=1)
    for name in ("metrics.json", "run.json", "recipe.yaml"):
        (folder / name).unlink()
    lines = [
        {
            "step": step,
            "epoch": None,
            "lr": 0.1,
            "loss": 1.0 / (step + 1) if step % 4 == 3 else None,
            "active_layers": ["a.0.weight"],
            "statistics": {"a.0.weight": 0.5},
            "seconds": 0.1,
        }
        for step in range(20)
    ]
    lines[9]["evaluation"] = {
        "loss": 0.5,
        "runtime": 3.0,
        "samples_per_second": 7.0,
        "f1": 0.25,
        "epoch": 1.0,
    }
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    root = read_html(page_of(folder))
    shown = tiles(root)
    assert shown["best f1"][0] == "0.25"
    assert shown["training loss"][0] == f"{statistics.fmean([1 / 12, 1 / 16, 1 / 20]):.4g}"
    assert [p.text for p in root.all("p", "note")] == ["The loss is known of 5 of 20 steps."]
    lines[9]["evaluation"] = {"loss": 0.5, "runtime": 3.0}
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "best loss" in tiles(read_html(page_of(folder)))
