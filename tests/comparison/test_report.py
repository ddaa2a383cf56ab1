"""What a comparison writes: complete, and honest about failures."""

import json

import pytest
from PIL import Image
from rich.console import Console

from slimfit_ds.comparison.report import comparison_table, write_comparison
from slimfit_ds.comparison.result import Outcome
from slimfit_ds.report.memory_plot import plot_stacked_bars, plot_timeline
from slimfit_ds.report.units import human_bytes, human_seconds

SURROUNDINGS = {"world_size": 2, "seed": 0, "hardware": {"cpu": "test"}, "versions": {}}
OUTCOMES = [
    Outcome(
        "full",
        "full fine-tuning",
        metrics={"accuracy": 0.9712},
        loss=0.1,
        steps=5,
        seconds_per_step=0.25,
        bytes_per_step=2048.0,
        parameters=1000,
        peak=4 * 2**20,
        at_peak={"parameters": 2**20, "working": 3 * 2**20},
        states=16000,
        saved_dynamic=1024,
        saved_static=3072,
        gpus={"24GB": 1},
        surroundings=SURROUNDINGS,
    ),
    Outcome("lora", "LoRA <b>", status="out of memory", error="OutOfMemoryError: too much & more"),
    Outcome(
        "slimfit",
        "SlimFit",
        metrics={"accuracy": 0.9650},
        loss=0.2,
        steps=5,
        seconds_per_step=0.20,
        bytes_per_step=512.0,
        parameters=1000,
        peak=2**20,
        at_peak={"parameters": 2**20},
        states=4000,
        saved_static=2048,
        gpus={"24GB": None},
        surroundings=SURROUNDINGS,
    ),
]


def rendered() -> str:
    console = Console(width=240, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(OUTCOMES, "digits"))
    return console.export_text()


def test_table_has_every_number_and_the_failure():
    text = rendered()
    for word in (
        "0.9712",
        "4 MiB",
        "4 KiB",
        "16.00 B",
        "250 ms",
        "out of memory",
        "more than 1024",
        "0.9650",
    ):
        assert word in text, word
    assert "SlimFit against full fine-tuning: saved activations 0.50x, model states 0.25x, peak 0.25x" in text
    assert "2 ranks, seed 0, 5 steps, test" in text


def test_files(tmp_path):
    paths = write_comparison(OUTCOMES, tmp_path / "out", "digits", {"recipe": "a.yaml"})
    content = json.loads(paths["json"].read_text())
    assert content["recipe"] == "a.yaml"
    assert [row["status"] for row in content["strategies"]] == ["ok", "out of memory", "ok"]
    assert content["strategies"][0]["states_per_parameter"] == 16.0
    lines = paths["md"].read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert [row[:2] for row in rows[2:]] == [
        ["full fine-tuning", "0.9712"],
        ["LoRA <b>", "out of memory"],
        ["SlimFit", "0.9650"],
    ]
    assert "- LoRA <b>: out of memory: OutOfMemoryError: too much & more" in lines
    with Image.open(paths["png"]) as picture:
        assert picture.width > 800


def test_pictures_of_extremes(tmp_path):
    rows = [("a", {"parameters": 10}), ("b", {"parameters": 12}), ("huge", {"working": 10**9}), ("none", {})]
    assert plot_stacked_bars(rows, tmp_path / "bars.png", "t").is_file()
    assert plot_stacked_bars([("none", {})], tmp_path / "one.png", "t").is_file()
    line = [
        ("forward", "a.0.b", {"parameters": 5}),
        ("backward", "a.1", {"parameters": 5, "working": 3}),
        ("step", "", {}),
    ]
    assert plot_timeline(line, tmp_path / "line.png").is_file()
    with pytest.raises(ValueError, match="empty"):
        plot_timeline([], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**30, "1 GiB"),
        (3 * 2**40, "3 TiB"),
    ],
)
def test_units(size, text):
    assert human_bytes(size) == text


def test_seconds():
    assert human_seconds(0.0123) == "12.3 ms"
    assert human_seconds(2.5) == "2.5 s"
