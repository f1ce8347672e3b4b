"""One Python file that applies a plan: torch's public APIs, and the runtime where they end.

What it writes is what `planner.parallelize` does for this plan, spelled out for a reviewer: the
mesh, which units are sharded how, what is computed again, and a step over micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from cost_models.chain import chain_of
from cost_models.decisions import Decisions
from cost_models.stage_problem import starts_of
from cost_models.state import ranks_of
from planner.chain import layer_paths, stage_units
from planner.export.header import one_line, plan_hash, quoted
from planner.export.pytorch_text import HEADER, TORCH_ALONE, WITH_RUNTIME, fill
from planner.export.target import CHECKED_TORCH, Exported, training
from planner.names import fold_text
from planner.placements import edge_rules, parameter_rules
from planner.plan import Plan
from planner.runnable import require_own_forward

_DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}


def export(given: object, source: str) -> Exported:
    """A file `parallel_NAME.py` with `parallelize(model)` and `train_step(...)`."""
    plan = training(given, "pytorch")
    reasons = beyond_torch(plan.decisions)
    if reasons:
        require_own_forward(plan)
    body = _with_runtime(plan, source, reasons) if reasons else _with_torch(plan)
    name = "".join(c if c.isalnum() else "_" for c in plan.graph.name)
    return Exported(
        files=((f"parallel_{name}.py", body),),
        notes=tuple(f"calls meshwright's runtime for {reason}" for reason in reasons),
    )  # fmt: skip


def beyond_torch(d: Decisions) -> tuple[str, ...]:
    """What of these decisions torch's public APIs cannot do to an unmodified forward."""
    cases = (
        (d.tp > 1, "tensor parallelism: module styles need a forward with local head counts"),
        (d.pp > 1, "pipeline stages: torch's tracer gives up the module tree"),
        (d.cp > 1, "context parallelism: torch's is experimental and has no choice of kind"),
        (d.ep * d.etp > 1, "expert parallelism: torch has no dispatch"),
        (bool(d.offload), "offload"),
        (bool(d.formats), "matmuls in fewer bits"),
        (bool(d.shares), "unequal shares of the batch"),
        (bool(d.keep), "operations kept one by one: torch's list of what is kept is by kind"),
    )
    return tuple(reason for holds, reason in cases if holds)


def _text(plan: Plan, body: str, holds: dict[str, bool], holes: dict[str, object]) -> str:
    """A file: its header and body, with what both say of the plan."""
    again = _recomputed(plan)
    return fill(
        HEADER + body,
        {"full": bool(again["full"]), "selective": bool(again["selective"]), **holds},
        {
            **asdict(plan.decisions), "gpus": plan.decisions.gpus, "model": _plain(plan.graph.name),
            "hardware": _plain(plan.hardware), "graph_hash": plan.graph_hash,
            "plan_hash": plan_hash(plan),
            "torch": CHECKED_TORCH,
            "recomputed_full": _names("RECOMPUTED_FULL", again["full"]),
            "recomputed_selective": _names("RECOMPUTED_SELECTIVE", again["selective"]), **holes,
        },
    )  # fmt: skip


def _plain(name: str) -> str:
    """A name inside the docstring, which it can neither end nor escape from."""
    return one_line(name).replace("\\", "?").replace('"', "'")


def _names(label: str, names: list[str]) -> str:
    """A list of module names, one folded pattern a comment, the names spelled out."""
    rows = [f"# {one_line(fold_text(names))}" if names else "# none", f"{label} = ["]
    line = "   "
    for name in names:
        word = f" {quoted(name)},"
        if len(line) + len(word) > 96:
            rows.append(line)
            line = "   "
        line += word
    return "\n".join([*rows, *([line] if line.strip() else []), "]"]) + "\n"


def _recomputed(plan: Plan) -> dict[str, list[str]]:
    """Module names of the layers that are computed again: "full" and "selective"."""
    d, layers = plan.decisions, layer_paths(plan.graph)
    found: dict[str, list[str]] = {"full": [], "selective": []}
    for start, count, (full, some) in zip(starts_of(d.stages), d.stages, d.recompute):
        paths = layers[start : start + count]
        found["full"] += paths[:full]
        found["selective"] += paths[full : full + some]
    return found


def _units(plan: Plan) -> list[str]:
    return list(dict.fromkeys(link.path for link in chain_of(plan.graph).links if link.path))


def _with_torch(plan: Plan) -> str:
    """The file of a plan that is data parallelism and recomputation alone."""
    d, w, tied = plan.decisions, plan.workload, _tied(plan)
    again, ranks = _recomputed(plan), ranks_of(d, False)
    words = "" if w.precision == "fp32" else (
        f"param_dtype={_DTYPES[w.precision]}, reduce_dtype={_DTYPES[d.grad_dtype]}"
    )  # fmt: skip
    contexts = ", create_selective_checkpoint_contexts" if again["selective"] else ""
    holds = {
        "runtime": False, "again": any(again.values()), "tied": bool(tied), "compile": d.compile,
        "reduced_once": d.zero < 2, "gathered_once": d.zero < 3,
    }  # fmt: skip
    return _text(plan, TORCH_ALONE, holds, {
        "checkpoint": f"checkpoint{contexts}",
        "units": _names("UNITS", _units(plan)),
        "together": _rows(f"[{', '.join(map(quoted, names))}]" for names in tied),
        "alone": "[n for n in UNITS if all(n not in names for names in TOGETHER)]"
        if tied else "UNITS",
        "replicas": ranks.replicas, "shards": ranks.shard,
        "reshards": d.zero == 3 and d.reshard,
        "policy": f"MixedPrecisionPolicy({words})",
    })  # fmt: skip


def _tied(plan: Plan) -> list[list[str]]:
    """Units that share a parameter: FSDP2 takes them in one group."""
    units = sorted(_units(plan), key=len, reverse=True)

    def unit_of(parameter: str) -> str:
        return next((u for u in units if parameter.startswith(f"{u}.")), "")

    groups: dict[str, list[str]] = {}
    for alias, owner in plan.graph.tied:
        group = groups.setdefault(unit_of(owner), [unit_of(owner)])
        if unit_of(alias) not in group:
            group.append(unit_of(alias))
    return [group for group in groups.values() if len(group) > 1 and all(group)]


def _rows(rows: Iterable[str]) -> str:
    """The lines of a list in the file."""
    return "".join(f"    {row},\n" for row in rows)


def _with_runtime(plan: Plan, source: str, reasons: tuple[str, ...]) -> str:
    """The file of any other plan: what is decided, spelled out, and the parts that apply it."""
    d, shardings, graph = plan.decisions, plan.sharding_by_unit, plan.graph
    holds = {"runtime": True, "tp": d.tp > 1, "pp": d.pp > 1}
    return _text(plan, WITH_RUNTIME, holds, {
        "reasons": "".join(f"- {reason}\n" for reason in reasons),
        "plan_name": quoted(source.rpartition("/")[2].strip("-") or "plan.json"),
        "parameters": _rows(
            f"({quoted(r['match'])}, {quoted(r['tp'])})" for r in parameter_rules(shardings, graph)
        ),
        "edges": _rows(
            f"({quoted(r['at'])}, {quoted(r['forward'])}, {quoted(r['backward'])})"
            for r in edge_rules(shardings, graph)
        ),
        "stages": _rows(quoted(fold_text(list(paths))) for paths in stage_units(graph, d.stages)),
    })  # fmt: skip
