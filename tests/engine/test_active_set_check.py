"""Ranks that would train different layers stop, all of them, and say who and what."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_disagreement_stops_every_rank_and_names_ranks_and_layers(run_ranks, stage):
    script = Path(__file__).with_name("mismatch_worker.py")
    said, _ = run_ranks(script, f"--stage={stage}", timeout=120)
    # The set of step 2 is chosen, and compared, at the end of step 1: before anything of it is sent.
    assert [answer["step"] for answer in said] == [1, 1]
    assert said[0] == said[1]
    message = said[0]["message"]
    assert "ranks would train different layers" in message
    assert "rank 1 (step 2) trains ['bert." in message
    assert "Resume all ranks from one checkpoint" in message
