"""Calibration: what is fitted, what is refused, what is written; and one try on this CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cost_models.calibrate import (
    COLLECTIVES,
    MOST_ERROR,
    Machine,
    Measured,
    Probe,
    calibrated,
    fit_tables,
    predictions,
)
from cost_models.calibrate_checks import faults
from cost_models.calibrate_collectives import fit_collectives
from cost_models.calibrate_error import step_error
from cost_models.calibrate_file import Calibration, calibration, known_cluster, to_toml
from cost_models.collectives import collective_s
from cost_models.compute import load_kernels
from cost_models.constants_table import Constant, OwnConstants, load_constants
from cost_models.hardware import describe, load_hardware
from ir.errors import GateError, PlanError, UsageError
from planner import calibrating, cli, console

GEMMS = ((8192,) * 3, (4096,) * 3, (2048, 14336, 4096), (1024, 4096, 4096), (512, 8192, 8192),
         (256, 2048, 2048), (64, 8192, 8192), (16, 8192, 8192), (16, 16384, 4096))  # fmt: skip
ATTENTIONS = ((1, 32, 8192, 128), (4, 32, 2048, 128), (2, 16, 4096, 128), (4, 16, 4096, 64))
H100 = describe("h100")
TRUE = {
    "gemm.bf16.compute_efficiency": 0.71, "gemm.bf16.memory_efficiency": 0.80,
    "gemm.bf16.overhead_s": 7e-6, "memory_bound.traffic": 1.1, "attention.flash2_ratio": 0.5,
    "attention.backward_ratio": 0.6,
}  # fmt: skip
CLOCK = 0.85  # what the steady load keeps


def around(seconds: float, spread: float = 0.01) -> tuple[float, ...]:
    return tuple(seconds * (1 + spread * x) for x in (-1.0, -0.5, 0.0, 0.5, 1.0))


def shapes() -> list[Probe]:
    """Probes of an H100 without their times."""
    made = [
        Probe(op="gemm", dtype="bf16", shape=s, flop=2.0 * math.prod(s), seconds=(1.0,))
        for s in GEMMS
    ]
    for b, h, s, d in ATTENTIONS:
        flop, moved = 2.0 * b * h * s * (s + 1) / 2 * 2 * d, 8.0 * b * h * s * d
        for op, times in (("attention", 1), ("attention_backward", 2)):
            made.append(
                Probe(op=op, dtype="bf16", shape=(b, h, s, d), moved_bytes=times * moved,
                      flop=flop * (1 if times == 1 else 2.5), seconds=(1.0,))
            )  # fmt: skip
    for op, moved in (("copy", 2e9), ("add", 3e9), ("norm", 2e9), ("copy", 1e9), ("norm", 1e9)):
        made.append(Probe(op=op, dtype="bf16", shape=(1,), moved_bytes=moved, seconds=(1.0,)))
    return made


def timed(probes: list[Probe], spread: float = 0.01) -> tuple[Probe, ...]:
    """The probes, as long as a device takes that has the true constants and no derate."""
    extra = {**TRUE, "clock.derate": 1.0, "clock.reference_power_w": H100.device.power_w}
    items = tuple(Constant(name=k, value=v, source="true") for k, v in sorted(extra.items()))
    device = replace(H100.device, constants=OwnConstants(base="h100", items=items))
    seconds = predictions(load_kernels(device, attention="flash2"), probes)
    return tuple(
        replace(p, seconds=around(float(s), spread)) for p, s in zip(probes, seconds.tolist())
    )


def copies(host: float = 40e9, disk: float = 5e9) -> tuple[Probe, ...]:
    rates = {"host_to_device": 52e9, "device_to_host": 50e9, "unpinned": 9e9, "host_copy": host,
             "disk_read": disk, "disk_write": 2e9}  # fmt: skip
    return tuple(
        Probe(op=op, moved_bytes=2e8, seconds=around(2e8 / rate)) for op, rate in rates.items()
    )


@pytest.fixture(scope="module")
def run() -> Measured:
    probes = timed(shapes())
    big = probes[0]
    rates = tuple(big.flop_per_s * (CLOCK + 0.1 * math.exp(-i)) for i in range(20))
    machine = Machine(
        name="NVIDIA H100 80GB HBM3", kind="cuda", count=8, memory_bytes=85_000_000_000,
        sm_count=132, host_ram_bytes=2 << 40, disk_bytes=10**13, cache_bytes=50 << 20,
    )  # fmt: skip
    return Measured(
        machine=machine, probes=probes + copies(), steady_flop_per_s=rates, first=big, last=big
    )


@pytest.fixture(scope="module")
def made(run) -> Calibration:
    return calibration(run)


def fitted(run: Measured) -> dict[str, float]:
    tables = fit_tables(run, H100.device, "h100")
    return {f"{t.name}.{key}": value for t in tables for key, value in t.values}


def test_fits_recover_the_constants_that_the_times_were_made_with(run) -> None:
    found = fitted(run)
    for name, value in TRUE.items():
        assert found[name] == pytest.approx(value, rel=0.15), name
    assert found["clock.derate"] == pytest.approx(CLOCK, abs=0.01)
    assert found["clock.reference_power_w"] == H100.device.power_w


def test_a_calibrated_device_predicts_what_was_measured(run) -> None:
    tables = fit_tables(run, H100.device, "h100")
    bursts = [t for t in tables if t.name != "clock"]
    kernels = load_kernels(calibrated(H100.device, "h100", bursts), attention="flash2")
    probes = [p for p in run.probes if p.op in ("gemm", "attention", "copy", "norm")]
    off = np.abs(predictions(kernels, probes) / [p.median_s for p in probes] - 1)
    assert np.median(off) < 0.02 and off.max() < 0.15
    assert all(t.median_error < 0.1 for t in bursts)


def test_noisy_samples_are_left_out(run) -> None:
    wild = replace(run.probes[3], seconds=(1e-5, 1e-3, 1.0, 2.0, 3.0))
    some = replace(run, probes=(*run.probes[:3], wild, *run.probes[4:]))
    table = next(t for t in fit_tables(some, H100.device, "h100") if t.name == "gemm.bf16")
    assert (table.samples, table.left_out) == (len(GEMMS) - 1, 1)
    found = fitted(some)["gemm.bf16.compute_efficiency"]
    assert found == pytest.approx(TRUE["gemm.bf16.compute_efficiency"], rel=0.15)


def in_groups(groups: tuple[int, ...]) -> list[Probe]:
    """Collectives of known form: 10 us, a share of the square root, 300 GB/s."""
    return [
        Probe(
            op=kind, shape=(n,), moved_bytes=size,
            seconds=around(1e-5 * n / 2 + 8e-9 * math.sqrt(size)
                           + size * (2 if kind == "all_reduce" else 1) * (n - 1) / n / 300e9),
        )
        for kind in COLLECTIVES for n in groups for size in (2.0**14, 2.0**18, 2.0**22, 2.0**29)
    ]  # fmt: skip


@pytest.mark.parametrize("groups", [(2, 4, 8), (2,)])
def test_collectives_are_costed_as_they_were_measured(run, tmp_path, groups) -> None:
    probes = in_groups(groups)
    path = tmp_path / "node.toml"
    path.write_text(to_toml(calibration(replace(run, probes=run.probes + tuple(probes))), "node",
                            "2026-01-01"))  # fmt: skip
    cluster = load_hardware(str(path))
    for p in probes:
        made = float(collective_s(cluster, p.op, p.moved_bytes, p.shape[0]))
        assert made == pytest.approx(p.median_s, rel=0.1), p.name


def test_no_collectives_without_torchrun(run) -> None:
    assert fit_collectives(run, "h100", 4.5e11) == ()


def test_the_file_is_read_back_and_costs_with_its_constants(run, made, tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(made, "mine", "2026-01-01"))
    mine = load_hardware(str(path))
    assert (mine.name, mine.count, mine.node_size, mine.domain_size) == ("mine", 8, 8, 8)
    assert mine.device.memory_bytes == 85_000_000_000
    assert mine.device.host_link_bytes_per_s == pytest.approx(50e9, rel=0.01)
    assert mine.tier("nvme").read_bytes_per_s == pytest.approx(5e9, rel=0.01)
    assert mine.device.peak("bf16") == H100.device.peak("bf16") and mine.intra == H100.intra
    table = load_constants(mine.device.constants)
    assert table.measured and table.number("gemm.bf16.overhead_s") == pytest.approx(7e-6, rel=0.2)
    assert table.find("gemm.bf16.compute_efficiency").source.startswith("measured on this machine")
    assert table.number("p2p.inter_overhead_s") == load_constants("h100").number(
        "p2p.inter_overhead_s"
    )
    kernels = load_kernels(mine.device, attention="flash2")
    assert kernels.clock == pytest.approx(CLOCK, abs=0.01)
    large = next(p for p in run.probes if p.op == "gemm")
    assert float(kernels.gemm_s("bf16", *large.shape)) == pytest.approx(
        large.median_s / CLOCK, rel=0.05
    )


def test_the_file_moves_the_digests(made, tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(made, "mine", "2026-01-01"))
    digest = load_hardware(str(path)).digest
    assert digest != describe("h100").digest
    path.write_text(to_toml(made, "mine", "2026-01-02"))  # another day is not another machine
    assert load_hardware(str(path)).digest == digest
    path.write_text(path.read_text().replace("traffic = 1.", "traffic = 2."))
    assert load_hardware(str(path)).digest != digest


def test_a_known_device_is_compared_with_the_catalogue(made) -> None:
    rows = {row.name: row for row in made.moved}
    assert made.base == "h100"
    assert rows["host link"].before == H100.device.host_link_bytes_per_s
    assert rows["gemm.bf16.compute_efficiency"].before is not None
    text = calibrating.table(made)
    assert all(len(line) <= 80 for line in text.splitlines()), text
    assert "the catalogue's h100" in text and "0.50" in text


def test_an_honest_run_has_no_faults(run) -> None:
    assert faults(run, known_cluster(run)) == ()


def slower(p: Probe, times: float) -> Probe:
    return replace(p, seconds=tuple(s * times for s in p.seconds))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probes": timed(shapes(), spread=0.8) + copies()}, ["repeats differ", "probes noisy"]),
        ({"last": lambda run: slower(run.first, 1.3)}, ["slower at the end", "throttled"]),
        ({"steady_flop_per_s": tuple(4e14 - 1e13 * i for i in range(20))}, ["still fell"]),
        ({"probes": tuple(slower(p, 0.3) for p in timed(shapes()))}, ["peak of h100", "989.4"]),
        ({"probes": tuple(slower(p, 9.0) for p in timed(shapes()))}, ["a quarter of"]),
        ({"probes": copies(host=4e9, disk=5e9)}, ["disk_read", "this is a cache"]),
        ({"probes": tuple(slower(p, 0.01) for p in in_groups((8,)))}, ["line rate"]),
        ({"probes": (Probe(op="launch", seconds=(0.0,)),)}, ["a time of nothing"]),
    ],
)
def test_nonsense_is_refused_by_name(run, change, words) -> None:
    made = {key: value(run) if callable(value) else value for key, value in change.items()}
    found = faults(replace(run, **made), known_cluster(run))
    text = "\n".join(calibrating.refusal(found).lines())
    assert all(word in text for word in words), text
    assert "--force" in text


def test_a_forced_file_says_what_is_wrong_with_it(run, made, tmp_path) -> None:
    bad = replace(run, last=slower(run.first, 1.5))
    found = faults(bad, known_cluster(bad))
    text = to_toml(made, "bad", "2026-01-01", found)
    assert "# WARNING" in text and "slower at the end" in text
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert not load_constants(load_hardware(str(path)).device.constants).measured


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[constants.gemm.bf16]\ncompute_eficiency = 0.5", ["compute_efficiency?"]),
        ("[constants.gemm.bf16]\ncompute_efficiency = -1", ["0 or more"]),
        ("constants = 3", ["constants"]),
    ],
)
def test_a_bad_constant_of_a_file_is_told_by_its_key(tmp_path, text, words) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'base = "h100"\ncount = 8\n{text}\n')
    with pytest.raises(UsageError) as caught:
        load_hardware(str(path))
    found = "\n".join(caught.value.lines())
    assert all(word in found for word in words), found


def test_a_file_that_exists_is_left_alone(tmp_path) -> None:
    path = tmp_path / "host.toml"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        calibrating.calibrate(output=str(path))
    with pytest.raises(UsageError, match="no hardware file"):
        calibrating.calibrate(output=str(tmp_path / "host.json"))
    assert path.read_text() == "mine"


def test_interrupted_or_refused_nothing_is_left_behind(run, tmp_path, monkeypatch) -> None:
    from planner.runtime import probe

    def stop(*_args, **_words):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrating.calibrate(output=str(tmp_path / "host.toml"))
    monkeypatch.setattr(
        probe, "measure", lambda *_a, **_w: replace(run, last=slower(run.first, 2.0))
    )
    with pytest.raises(GateError, match="not believed"):
        calibrating.calibrate(output=str(tmp_path / "host.toml"))
    assert list(tmp_path.iterdir()) == []


def test_a_try_on_this_cpu_end_to_end(tmp_path, monkeypatch, capsys) -> None:
    """The file of a busy machine is forced: what is tested is the way, not the figures."""
    monkeypatch.chdir(tmp_path)
    command = ["calibrate", "--quick", "--force", "-o", "host.toml"]
    assert console.run(cli.app(), command) == 0
    said = capsys.readouterr()
    assert "peak bf16" in said.out and "wrote host.toml" in said.err
    cluster = load_hardware("host.toml")
    assert cluster.device.family == "cpu" and cluster.device.peak("fp32") > 1e8
    assert cluster.tier("nvme").read_bytes_per_s > 0
    assert [path.name for path in tmp_path.iterdir()] == ["host.toml"]
    llama = Path(__file__).parents[1] / "examples" / "llama.py"
    trace = ["trace", str(llama), "--arg", "size=tiny", "--hardware", "host.toml", "--seq-len",
             "128", "--global-batch", "4", "--no-cache"]  # fmt: skip
    assert console.run(cli.app(), trace) == 0
    assert "on host.toml" in capsys.readouterr().out


def test_torchrun_is_asked_for_collectives(tmp_path) -> None:
    """Two gloo ranks, through the probes alone: times of every kind, from the slowest rank."""
    script = (
        "import sys, torch\n"
        "from planner.runtime import probe_collectives as p\n"
        "from planner.runtime.probe_timer import Timer\n"
        "p.CPU_BYTES = (4096, 65536)\n"
        "t = Timer(device=torch.device('cpu'), budget_s=0.01)\n"
        "found = list(p.collectives(t, True, []))\n"
        "words = ' '.join([*sorted({f.op for f in found}), str(len(found))])\n"
        "sys.stdout.write(words + '\\n'); sys.stdout.flush()\n"  # one write: ranks share a pipe
    )
    path = tmp_path / "ranks.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all_to_all reduce_scatter 8") == 2, done.stdout


def test_steps_are_predicted_and_run_on_the_cpu(run, tmp_path, monkeypatch) -> None:
    """The way, not the figures: a decoder without and with recomputation; no peak on a CPU."""
    from planner.runtime import probe_steps

    probes = tuple(
        Probe(op="gemm", dtype=dtype, shape=s, flop=2.0 * math.prod(s),
              seconds=around(1e-5 + 2.0 * math.prod(s) / 1e11))
        for dtype in ("fp32", "bf16") for s in ((768,) * 3, (64, 512, 512), (16, 256, 256))
    )  # fmt: skip
    streams = (Probe(op="copy", dtype="fp32", moved_bytes=6e8, seconds=around(3e-2)),)
    cpu = replace(
        run, machine=replace(run.machine, name="a CPU", kind="cpu", count=1), first=probes[3],
        last=probes[3], probes=probes + streams + copies(), steady_flop_per_s=(9e10,) * 8,
    )  # fmt: skip
    path = tmp_path / "cpu.toml"
    path.write_text(to_toml(calibration(cpu), "cpu", "2026-01-01"))
    trial = probe_steps.Trial(width=64, layers=2, heads=1, batch=2, seq_len=32, recompute="none",
                              precision="bf16", vocabulary=128)  # fmt: skip
    monkeypatch.setattr(probe_steps, "trials", lambda *_: (trial, replace(trial, recompute="full")))
    left_out: list[str] = []
    none, full = probe_steps.try_steps(str(path), left_out)
    assert left_out == [] and none.step_s > 0 and none.peak_bytes is None
    assert full.predicted_s > none.predicted_s > 0
    text = calibrating.steps_table((none, full))
    assert "median error" in text and "does not count" in text
    assert all(len(line) <= 80 for line in text.splitlines())


# --- fits that describe nothing -------------------------------------------------------------------


def scattered(run: Measured, *ops: str, times: float = 6.0) -> Measured:
    """The run, every second probe of those ops so many times slower: no constants fit both."""
    found, n = [], 0
    for p in run.probes:
        n += p.op in ops
        found.append(slower(p, times) if p.op in ops and n % 2 else p)
    return replace(run, probes=tuple(found))


def test_a_fit_that_misses_its_samples_is_refused_and_the_base_stays(run, tmp_path) -> None:
    bad = scattered(run, "copy", "add", "norm")
    made = calibration(bad)
    (refused,) = made.refused
    assert refused.name == "memory_bound" and refused.median_error > MOST_ERROR
    assert refused.refused == ("traffic",) and refused.values == ()
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(made, "mine", "2026-01-01"))
    text = path.read_text()
    assert "[constants.memory_bound]" not in text and "# Refused: memory_bound" in text
    table = load_constants(load_hardware(str(path)).device.constants)
    own, base = (t.find("memory_bound.traffic") for t in (table, load_constants("h100")))
    assert own == base
    assert table.measured == (refused.base_error <= MOST_ERROR)
    said = calibrating.table(made)
    assert "refused: memory_bound (traffic)" in said and "memory_bound.traffic" not in said
    assert calibrating.document(made, ())["refused"][0]["kept"] == ["traffic"]


def test_a_refused_collective_leaves_the_others_as_measured(run, tmp_path) -> None:
    probes = run.probes + tuple(in_groups((2, 4, 8)))
    bad = scattered(replace(run, probes=probes), "all_to_all", times=20.0)
    made = calibration(bad)
    assert [t.name for t in made.refused] == ["collective.all_to_all"]
    path = tmp_path / "node.toml"
    path.write_text(to_toml(made, "node", "2026-01-01"))
    cluster = load_hardware(str(path))
    for p in in_groups((2, 4, 8)):
        if p.op != "all_to_all":
            seconds = float(collective_s(cluster, p.op, p.moved_bytes, p.shape[0]))
            assert seconds == pytest.approx(p.median_s, rel=0.1), p.name
    node = replace(describe("h100"), count=8)
    assert float(collective_s(cluster, "all_to_all", 2**28, 8)) == pytest.approx(
        float(collective_s(node, "all_to_all", 2**28, 8))
    )
    rates = {row.name: row.now for row in made.moved if row.name.endswith(" rate")}
    good = {row.name: row.now for row in calibration(replace(run, probes=probes)).moved}
    assert all(rate == pytest.approx(good[name], rel=0.01) for name, rate in rates.items())


# --- the error that is stated ---------------------------------------------------------------------

STEPS = [(1.1, 1.0), (0.8, 1.0), (1.0, 1.0), (1.3, 1.0)]  # mean error .15, median .15


def stated(path: Path) -> tuple[float, float]:
    kernels = load_kernels(load_hardware(str(path)).device)
    return kernels.error(), kernels.error(moe=True)


FORMS = (
    'base = "h100"\ncount = {n}\n# mine\n',
    'base = "h100"\ncount = {n}\n\n[constants]  # mine\nmeasured = 1\n\n[constants.clock]\n'
    "derate = 0.8\n\n[sources]\nx = 'y'",
    'base = "h100"\r\ncount = {n}\r\n[constants.clock]\r\nderate = 0.8\r\n',
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 8])
def test_the_measured_error_is_what_estimates_say(tmp_path, form, count) -> None:
    path = tmp_path / "mine.toml"
    old = form.format(n=count)
    path.write_bytes(old.encode())
    _, moe = stated(path)
    known = load_constants("h100").number("step_error.dense")
    error = step_error(STEPS, load_hardware(str(path)), "2026-01-01")
    assert error.dense == pytest.approx(0.15 if count == 1 else max(0.15, known))
    calibrating._put_error(path, old, error)
    assert stated(path) == pytest.approx((error.dense, max(moe, error.dense)), rel=0.01)
    new = path.read_bytes().decode()
    kept = old.splitlines(keepends=True)
    assert [line for line in new.splitlines(keepends=True) if line in kept][: len(kept) - 1] == (
        kept[: len(kept) - 1]
    )
    assert ("\r\n" in new) == ("\r\n" in old) and new.count("\n") == new.count("\r\n") * (
        "\r\n" in old
    ) + new.count("\n") * ("\r\n" not in old)
    # again, with other steps: the lines are replaced, and nothing is expected of the first ones
    better = step_error([(1.3, 1.0)] * 4, load_hardware(str(path)), "2026-01-02")
    calibrating._put_error(path, new, better)
    again = path.read_text()
    assert stated(path) == pytest.approx((0.3, max(moe, 0.3)), rel=0.01)
    assert again.count("[constants.step_error]") == 1 and again.count("runs = 1") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_steps_of_one_device_promise_no_less_than_published_runs(tmp_path) -> None:
    known = load_constants("h100").number("step_error.dense")
    error = step_error([(1.01, 1.0)] * 4, replace(H100, count=8), "2026-01-01")
    assert error.dense == known and "transfers were not measured" in error.source
    alone = step_error([(1.01, 1.0)] * 4, replace(H100, count=1), "2026-01-01")
    assert alone.dense == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("steps", "words"), [(STEPS[:2], "too few"), ([(0.01, 1.0)] * 4, "by a factor of 100")]
)
def test_steps_that_say_nothing_are_not_written(steps, words) -> None:
    with pytest.raises(GateError, match=words):
        step_error(steps, H100, "2026-01-01")


def test_a_file_that_cannot_take_the_error_is_left_as_it_is(tmp_path) -> None:
    error = step_error(STEPS, H100, "2026-01-01")
    path = tmp_path / "mine.toml"
    old = 'base = "h100"\ncount = 8\nconstants = {clock = {derate = 0.8}}\n'
    path.write_text(old)
    with pytest.raises(PlanError, match="cannot be put") as caught:
        calibrating._put_error(path, old, error)
    assert "dense = 0.15" in "\n".join(caught.value.lines())
    path.write_text(old + "# edited\n")
    with pytest.raises(PlanError):
        calibrating._put_error(path, FORMS[0].format(n=8), error)
    assert path.read_text() == old + "# edited\n"
    path.chmod(0o444)
    with pytest.raises(PlanError, match="cannot be written") as caught:
        calibrating._require_own(path)
    assert "read-only" in caught.value.why
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_validate_writes_the_error_and_json_is_one_document(tmp_path, monkeypatch, capsys) -> None:
    from planner.runtime import probe_steps

    tried = tuple(
        probe_steps.StepTried(name="a step", predicted_s=p, step_s=m, predicted_bytes=10,
                              peak_bytes=10) for p, m in STEPS
    )  # fmt: skip
    monkeypatch.setattr(probe_steps, "try_steps", lambda *_a, **_w: tried)
    path = tmp_path / "mine.toml"
    path.write_text(FORMS[0].format(n=1))
    path.chmod(0o640)
    command = ["calibrate", "--validate", "--hardware", str(path)]
    assert console.run(cli.app(), [*command, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["written"] and found["step_error"]["dense"] == pytest.approx(0.15)
    assert "+-15%" in said.err and stated(path)[0] == pytest.approx(0.15)
    assert path.stat().st_mode & 0o777 == 0o640
    for flag in (["-o", "x.toml"], ["--force"], ["--overwrite"], ["--disk", "/"]):
        assert console.run(cli.app(), [*command, *flag]) == 64
    before = path.read_text()
    on_cpu = tuple(replace(one, peak_bytes=None) for one in tried)
    monkeypatch.setattr(probe_steps, "try_steps", lambda *_a, **_w: on_cpu)
    assert console.run(cli.app(), command) == 4
    assert "ran on a CPU" in capsys.readouterr().err and path.read_text() == before
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(probe_steps, "try_steps", interrupted)
        calibrating.calibrate(validate=True, hardware=str(path))
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def interrupted(*_args, **_words):
    raise KeyboardInterrupt


@pytest.mark.parametrize("output", ["", "-", ".", "host"])
def test_an_output_that_is_no_hardware_file(tmp_path, monkeypatch, capsys, output) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host.toml").write_text("mine")
    assert console.run(cli.app(), ["calibrate", "-o", output]) == 64
    assert "internal" not in capsys.readouterr().err


def test_overwriting_goes_through_a_link_and_replaces_no_pipe(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "there.toml").write_text("old")
    for name in ("there.toml", "absent.toml"):
        (tmp_path / name).symlink_to(f"real/{name}")
        calibrating._require_writable(tmp_path / name, True, tmp_path)
        calibrating._write(tmp_path / name, FORMS[0].format(n=1), True)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).read_text() == FORMS[0].format(n=1)
    assert len([*tmp_path.iterdir()]) == 3 and len([*(tmp_path / "real").iterdir()]) == 2
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UsageError, match="is no file"):
        calibrating._require_writable(tmp_path / "pipe.toml", True, tmp_path)
