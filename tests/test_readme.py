"""The README and the page on the paper say what was measured and nothing else."""

from __future__ import annotations

from update_readme import README, REPRODUCTION, reproduced, updated


def test_the_table_of_figures_is_that_of_the_result_files() -> None:
    text = README.read_text("utf-8")
    assert updated(text) == text, "run python benchmarks/update_readme.py"


def test_the_paper_s_counterparts_are_those_of_the_result_files() -> None:
    text = REPRODUCTION.read_text("utf-8")
    assert reproduced(text) == text, "run python benchmarks/update_readme.py"
