"""The tables of the documents are those of the CSVs, and what is recorded holds what was promised."""

from __future__ import annotations

import pytest


def test_the_documents_have_the_tables_of_the_csvs():
    import tables

    assert tables.differing(write=False) == []


def test_estimates_are_within_5_percent_of_measurement():
    from common import Study
    from estimate_vs_measured import MODELS, STRATEGIES

    rows = Study("estimate_vs_measured", ()).rows()
    labels = {label for name, (label, _) in MODELS.items() if name != "tiny"}
    assert {(row["model"], row["strategy"]) for row in rows} == {(m, s) for m in labels for s in STRATEGIES}
    assert max(abs(row["difference_percent"]) for row in rows) <= 5


def test_a_table_that_differs_is_told_and_written(tmp_path, monkeypatch):
    import tables

    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("before\n\n<!-- a: begin -->\n\n| 1 |\n\n<!-- a: end -->\n\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "all_tables", lambda: {"a": "| 2 |", "b": "| 3 |"})
    wrong = ["README.md: a", "no document has the marks of b"]
    assert tables.differing(write=False) == wrong
    assert tables.differing(write=True) == wrong
    assert page.read_text() == "before\n\n<!-- a: begin -->\n\n| 2 |\n\n<!-- a: end -->\n\nafter\n"
    page.write_text("<!-- a: begin --> no end")
    with pytest.raises(ValueError, match="once each"):
        tables.differing(write=False)


@pytest.mark.parametrize("preset", ["balanced", "minimal", "ultra"])
def test_bytes_kept_per_token_and_block_are_those_of_the_table(preset):
    from bytes import SHAPES, per_block
    from common import Study

    (row,) = Study("bytes", ()).rows(model="BERT-base", preset=preset, seed=0)
    assert row["bytes_per_token_block_h"] <= {"balanced": 6.2, "minimal": 1.1, "ultra": 0.6}[preset]
    found = per_block(SHAPES["BERT-base"], preset, rate=0.95, seed=0)
    assert found == pytest.approx(row["bytes_per_token_block_h"], rel=0.01)


def test_a_checkpoint_with_its_input_as_it_is_keeps_two_bytes_per_number_and_the_mask_once(monkeypatch):
    import bytes as program

    config = program.ActivationsConfig(operations={"block": "recompute"})
    monkeypatch.setattr(program, "ActivationsConfig", lambda preset: config)
    shape = program.SHAPES["BERT-base"]
    found = program.per_block(shape, "exact", rate=0.95, seed=0)
    mask = shape.batch * shape.tokens**2 / (shape.blocks * shape.batch * shape.tokens * shape.hidden)
    assert found == pytest.approx(2 + mask, abs=1e-6)
