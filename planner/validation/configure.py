"""A published run as a case: a model file's arguments, a cluster, a workload, decisions.

What a source leaves unsaid gets a named default, listed with the case. A run that cannot be laid
out (degrees that do not multiply to its GPUs) is skipped with the reason. The rules are in
`configure_model.py` (what is trained), `configure_engine.py` (what runs it), `configure_cluster.py`
(where) and `configure_layout.py` (how it is spread).
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.decisions import Decisions, Workload
from cost_models.engines import Engine
from cost_models.hardware import Cluster
from planner.validation.configure_cluster import cluster_of
from planner.validation.configure_engine import engine_of, natural, precision_of, switches_of
from planner.validation.configure_layout import decisions_of, recompute_of
from planner.validation.configure_model import model_args
from planner.validation.rows import Run, Skipped

NATURAL_IMBALANCE = 1.3  # assumed: the busiest expert rank of a trained router over the mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a run is predicted from. args: of validation/models.py; defaults: what was assumed.

    stages and recompute of `decisions` are set once the graph is there: `recompute` says how.
    """

    run: Run
    args: tuple[tuple[str, str], ...]
    cluster: Cluster
    workload: Workload
    engine: Engine
    switches: tuple[str, ...]
    decisions: Decisions
    recompute: str  # none, selective, full, unstated, or a share of the layers
    defaults: tuple[str, ...]


def configure(run: Run) -> Case:
    """The case of a run. Raises Skipped with the reason."""
    defaults = list(run.unread)
    for name in ("model", "hardware", "config"):
        if not getattr(run, name):
            raise Skipped(f"{name} is not stated")
    for name in ("gpu", "num_gpus"):
        if not run.hardware.get(name):
            raise Skipped(f"hardware.{name} is not stated")
    engine = engine_of(run, defaults)
    args = model_args(run, engine.flash, defaults)
    cluster = cluster_of(run, defaults)
    d = decisions_of(run, engine, args, cluster.count, defaults)
    if natural(run):
        defaults.append("natural routing: the busiest expert rank has 1.3 x the mean")
    workload = Workload(
        engine=engine.name, global_batch=int(run.config["global_batch_sequences"]),
        seq_len=args["seq_len"], precision=precision_of(run, defaults),
        expert_imbalance=NATURAL_IMBALANCE if natural(run) else 1.0,
    )  # fmt: skip
    _require_rate(run, cluster, workload.precision)
    return Case(
        run=run, args=tuple((k, str(x)) for k, x in args.items() if x != ""), cluster=cluster,
        workload=workload, engine=engine, switches=switches_of(run, engine, cluster, defaults),
        decisions=d, recompute=recompute_of(run, defaults),
        defaults=tuple(dict.fromkeys(defaults)),
    )  # fmt: skip


def _require_rate(run: Run, cluster: Cluster, precision: str) -> None:
    """Raises Skipped where GPUs are said to compute faster than their datasheet (fp32 may be TF32,
    at half of bf16)."""
    if run.flop_per_s is None:
        return
    rate = run.flop_per_s / cluster.count
    peak = max(cluster.device.peak(dtype) for dtype in ("bf16", precision))
    if rate > peak:
        raise Skipped(
            f"measured.tflops_per_gpu is {rate / 1e12:g}, over the {peak / 1e12:g} of the device"
        )
