"""What allocators hold, fitted on peaks and on what ran: constants that made them are found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_fit_runs import run_of

from planner.validation import fit_memory
from planner.validation.configure import configure
from planner.validation.fit import Fact
from planner.validation.fit_accuracy import memory_parts
from planner.validation.predict import predict, prepare, settled
from planner.validation.running import row_of

RESERVE = next(r for r in fit_memory.RESERVES if "deepspeed" in r.tables)
TRUE = (0.3, 4 * 10**9)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Runs of three models and two micro-batches, whose peaks made-up constants have made."""
    found = []
    for layers, micro in ((8, 1), (8, 8), (12, 2), (12, 16), (16, 1), (16, 8)):
        run = run_of(
            tmp_path_factory.mktemp("runs"), framework="Megatron-DeepSpeed", model__layers=layers,
            id=f"{layers}-{micro}", config__micro_batch=micro, config__precision="fp16",
            config__global_batch_sequences=128, model__hidden=2048, model__heads=16,
            model__kv_heads=16, model__ffn_hidden=8192, model__seq_len=2048,
        )  # fmt: skip
        prepared = prepare(configure(run))
        made = predict(prepared)
        fact = Fact(prepared=settled(prepared), measured_s=1.0, row=row_of(prepared.case, made))
        peak = float(fit_memory._peaks(fit_memory.ranks_of(fact), [TRUE])[0])
        found.append(replace(fact, row=replace(fact.row, measured_bytes=peak)))
    return found


def test_a_peak_is_linear_in_what_allocators_lose(facts):
    """The parts add up to what an estimate under those constants says."""
    for fact in facts:
        case = fact.prepared.case
        engine = replace(case.engine, fragmentation=TRUE[0], cached_bytes=TRUE[1])
        exact = predict(replace(fact.prepared, case=replace(case, engine=engine))).peak_bytes
        assert fact.row.measured_bytes == pytest.approx(exact, rel=1e-6)


def test_the_constants_that_made_peaks_are_found_without_each_model(facts):
    found = fit_memory.fit_reserve(RESERVE, facts)
    assert (found.fragmentation, found.cached_bytes) == TRUE
    assert found.scores.n == len(facts) and found.scores.mape < 0.01
    parts = memory_parts(facts, [found])
    assert parts["memory"]["all"]["n"] == len(facts)
    assert parts["verdicts"]["ran"] == {"n": len(facts), "beyond": 0, "wrong": ()}


def test_a_verdict_that_is_wrong_counts_as_one(facts):
    row = facts[0].row
    size = row.measured_bytes
    peaks = np.array([0.9, 1.0, 1.1]) * size
    fits = replace(row, capacity_bytes=2 * size)
    tight = replace(row, capacity_bytes=size)
    gone = replace(row, capacity_bytes=2 * size, oom=True, measured_bytes=None)

    def errors(row):
        return fit_memory._errors(replace(facts[0], row=row), peaks)

    assert errors(fits) == pytest.approx([0.1, 0, 0.1])
    assert errors(tight) == pytest.approx([0.1, 0, fit_memory.WRONG])
    assert errors(gone) == pytest.approx([fit_memory.WRONG] * 3)
    assert errors(replace(fits, measured_bytes=size * 2)) == pytest.approx([0.15] * 3)
