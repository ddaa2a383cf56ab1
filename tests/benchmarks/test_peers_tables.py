"""Tables of the comparison: ratios in turns or not, the least in bold, documents between marks."""

from __future__ import annotations

import pytest


def cell(method, peak, seconds, of_full=None, device="cpu", **more):
    made = {
        "status": "ok",
        "case": "tiny",
        "method": method,
        "kind": "step",
        "peak": peak * 2**20,
        "process_rss": 2**29,
        "state_bytes": 2**20,
        "host_bytes": 0,
        "saved_activations": 2**19,
        "flops": 1e9,
        "per_step": 64,
        "loss_first": 2.0,
        "loss_last": 1.0,
        "facts": {},
        "settings": {"device": device, "seed": 0},
        "measured": {"commit": "abc"},
    }
    for clock, value in (("seconds", 2 * seconds), ("cpu_seconds", seconds)):
        made |= {clock: value, f"{clock}_quartiles": [value, value]}
    if of_full is not None:
        ratios = {"seconds": 2 * of_full, "cpu_seconds": of_full}
        made |= {"of_full": ratios, "full_meanwhile": {"seconds": 9.0, "cpu_seconds": 8.0}}
        made |= {"of_full_quartiles": {clock: [ratio, ratio] for clock, ratio in ratios.items()}}
    return {f"tiny__{method}__step": made | more}


FACTS = {
    "hardware": "a CPU",
    "threads": 1,
    "versions": {"torch": "2"},
    "command": "python benchmarks/peers.py",
}
METHODS = ["full", "lora", "badam", "torchao_offload", "minimal"]


@pytest.fixture
def results():
    return (
        cell("full", 100, 1.0, of_full=1.02)
        | cell("lora", 50, 9.0, of_full=0.70)
        | cell("badam", 40, 0.8)
        | {"tiny__torchao_offload__step": {"status": "unavailable", "error": "CUDA | only", "kind": "step"}}
        | cell("minimal", 20, 1.5, of_full=1.1)
    )


def columns(text, label):
    titles, row = (
        next(line for line in text.splitlines() if line.startswith(f"| {start}"))
        for start in ("method", label)
    )
    names = [part.strip() for part in titles.split("|")[1:-1]]
    values = [part.strip() for part in row.split("|")[1:-1]]
    assert len(names) == len(values)
    return list(zip(names, values, strict=True))


def test_ratios_are_those_of_the_turns_and_otherwise_marked(results):
    from peers_methods.tables import heading, table

    text = table(["tiny"], METHODS, results)
    assert ("CPU s of full (rounds)", "0.700 (0.700 to 0.700)") in columns(text, "LoRA")
    assert ("wall clock of full (rounds)", "1.400 (1.400 to 1.400)") in columns(text, "LoRA")
    assert ("full meanwhile, CPU s", "8.0000") in columns(text, "LoRA")
    assert ("CPU s of full (rounds)", "0.800 †") in columns(text, "BAdam")
    assert ("of full", "0.200") in columns(text, "ours, `minimal`")
    assert columns(text, "torchao")[1][1] == "unavailable: CUDA / only"
    assert "differs by up to 104.0% (wall clock), 2.0% (CPU time)" in text
    assert "† not in turns" in heading(FACTS, results)
    assert "abc; bf16 arithmetic, seed 0" in heading(FACTS, results)
    del results["tiny__badam__step"]
    assert "†" not in heading(FACTS, results)


def test_a_gpu_has_columns_of_its_own():
    from peers_methods.tables import table

    results = cell("full", 100, 1.0, 1.0, "cuda", cuda_peak_reserved=7 * 2**20)
    results |= {"tiny__full__fit": {"status": "ok", "largest": {"24 GB": 5, "32 GB": 9}, "kind": "fit"}}
    found = columns(table(["tiny"], ["full"], results), "full")
    assert ("reserved, MiB", "7.0") in found
    assert ("largest batch 24 / 32 GB", "5 / 9") in found
    assert not any("CPU" in name or "wall" in name for name, _ in found)


def test_estimates_stand_beside_measurements_and_say_so(results):
    from peers_methods.tables import table

    estimated = {"tiny__minimal": {"largest": {"24 GB": 70, "32 GB": 0}, "peaks": {"4": 1}}}
    estimated["tiny__lora"] = {"error": "no | fake step"}
    estimated["tiny__full"] = {
        "largest": {"24 GB": "any", "32 GB": "any"},
        "micro_batch": 8,
        "peaks": {"4": 2},
    }
    text = table(["tiny"], METHODS, results, estimated)
    title = "largest batch 24 / 32 GB, simulated"
    assert (title, "70 / none") in columns(text, "ours, `minimal`")
    assert (title, "not simulated: no / fake step") in columns(text, "LoRA")
    assert (title, "any, micro-batch 8") in columns(text, "full")
    assert (title, "") in columns(text, "BAdam")


def test_published_shapes_say_that_they_are_simulated():
    from peers_methods.tables import estimated_table

    estimated = {
        "bert-base__full": {"largest": {"24 GB": 140, "32 GB": 192}, "peaks": {"128": 2**34, "32": 2**30}},
        "bert-base__lora": {"error": "no | fake step"},
        "tiny__full": {"largest": {"24 GB": 1, "32 GB": 1}, "peaks": {"4": 2**20}},
    }
    text = estimated_table(["full", "lora"], estimated)
    assert "simulated for a GPU, not measured" in text
    assert "| 16.00 | 1.000 | 140 | 192 |" in text
    assert "not simulated: no / fake step" in text
    assert "BERT 2 x h64" not in text


def test_the_summary_shows_who_is_ahead(results):
    from peers_methods.publish import summary

    text = summary(["tiny"], METHODS, results)
    lines = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines()[2:]}
    assert lines["ours, `minimal`"] == "**0.20** / 1.10"
    assert lines["LoRA r 8 (PEFT), bf16 base"] == "0.50 / **0.70**"
    assert lines["full: fused AdamW, SDPA, bf16 autocast"] == "1.00 / 1.02"
    assert not any("torchao" in label for label in lines)


def test_documents_are_written_between_marks_only(tmp_path, results):
    from peers_methods.publish import between_marks, publish

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- peers-summary: begin -->\nold\n<!-- peers-summary: end -->\nafter\n")
    publish(page, ["tiny"], METHODS, results, {}, FACTS)
    once = page.read_text()
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert "**0.20**" in once
    publish(page, ["tiny"], METHODS, results, {}, FACTS)
    assert page.read_text() == once
    with pytest.raises(ValueError, match="once each"):
        between_marks("<!-- a: end --> <!-- a: begin -->", "a", "x")
    (tmp_path / "bare.md").write_text("nothing here")
    with pytest.raises(ValueError, match="none of the marks"):
        publish(tmp_path / "bare.md", ["tiny"], METHODS, results, {}, FACTS)
