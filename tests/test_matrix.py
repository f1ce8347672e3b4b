"""A pairwise subset of the matrix: every two pins that meet, every model under every kind of axis.

`make matrix` runs all of it.
"""

from __future__ import annotations

import matrix
import pytest


@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize("cell", matrix.subset(), ids=lambda cell: cell.name)
def test_what_is_planned_runs_and_computes_the_same(world, cell):
    found = matrix.run(world, cell, "aot_eager")  # as `make matrix` with inductor, but sooner
    assert found.status != "FAILED", f"{found.words}\n{found.trace}"
