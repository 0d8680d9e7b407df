"""The README says what was measured and nothing else."""

from __future__ import annotations

from update_readme import README, updated


def test_the_table_of_figures_is_that_of_the_result_files() -> None:
    text = README.read_text("utf-8")
    assert updated(text) == text, "run python benchmarks/update_readme.py"
