"""torchtitan: a Python function that returns `Trainer.Config`, as its releases since 0.3 read it,
and the TOML of 0.2.2, the last that read one."""

from __future__ import annotations

import json
from dataclasses import dataclass

from planner.chain import stage_units
from planner.classic import differs
from planner.export.header import comment, file_name, header
from planner.export.pinned import checked
from planner.export.target import APPROXIMATE, DECISIONS, UNSUPPORTED, Exported, judge, training
from planner.plan import Plan

SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B",
             "zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV"}  # fmt: skip
ROTATION = {"allgather": "allgather", "ring": "alltoall"}  # context_parallel_rotate_method
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
TAKES = ("zero=3", "etp=1")
Section = list[tuple[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What a release of torchtitan has words for. head: how it names the head's module."""

    target: str
    pinned: str
    head: str
    toml: bool

    @property
    def rotates(self) -> bool:
        return self.toml

    @property
    def expert_tp(self) -> bool:
        return self.toml


PYTHON = Dialect(target="torchtitan", pinned="torchtitan", head="lm_head", toml=False)
TOML = Dialect(target="torchtitan-toml", pinned="torchtitan-toml", head="output", toml=True)


def export(plan: object, source: str) -> Exported:
    """A file `torchtitan_NAME.py` with a function that returns a Trainer.Config."""
    del source
    p = training(plan, PYTHON.target)
    lost = judge(PYTHON.target, DECISIONS, _rows(p, PYTHON), TAKES)
    name = file_name(p.graph.name)
    head = (*header(p, PYTHON.target, checked(PYTHON.pinned)), *(f"lost: {row}" for row in lost))
    again = {"full": "FullAC.Config()", "selective": "SelectiveAC.Config()"}.get(_again(p), "None")
    needs = {"full": "FullAC", "selective": "SelectiveAC"}.get(_again(p), "")
    text = comment(head) + (
        "\nfrom torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig\n"
        + (f"from torchtitan.distributed.activation_checkpoint import {needs}\n" if needs else "")
        + "from torchtitan.trainer import Trainer\n\n\n"
        f"def {name}_plan() -> Trainer.Config:\n"
        '    """What the plan decides; model_spec, data and learning rate are yours to set."""\n'
        "    return Trainer.Config(\n"
        f"        training=TrainingConfig(\n{_arguments(_training(p, PYTHON))}        ),\n"
        f"        parallelism=ParallelismConfig(\n{_arguments(_parallelism(p, PYTHON))}        ),\n"
        f"        compile=CompileConfig(enable={p.decisions.compile}),\n"
        f"        activation_checkpoint={again},\n"
        "    )\n"
    )
    notes = ("model_spec, data and learning rate are not in a plan: set them on what it returns",)
    return Exported(files=((f"torchtitan_{name}.py", text),), lost=lost, notes=notes)


def export_toml(plan: object, source: str) -> Exported:
    """A file `torchtitan_NAME.toml` for --job.config_file of torchtitan 0.2.2."""
    del source
    p = training(plan, TOML.target)
    lost = judge(TOML.target, DECISIONS, _rows(p, TOML), TAKES)
    head = (*header(p, TOML.target, checked(TOML.pinned)), *(f"lost: {row}" for row in lost))
    again: Section = [("mode", _again(p))]
    if _again(p) == "selective":
        again.append(("selective_ac_option", "op"))
    sections: list[tuple[str, Section]] = [
        ("training", _training(p, TOML)), ("parallelism", _parallelism(p, TOML)),
        ("activation_checkpoint", again), ("compile", [("enable", p.decisions.compile)]),
        ("optimizer", [("name", "AdamW")]),
    ]  # fmt: skip
    text = comment(head) + "".join(
        f"\n[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rows)
        for name, rows in sections
    )
    notes = ("[model], data and learning rate are not in a plan: add their sections",)
    return Exported(
        files=((f"torchtitan_{file_name(p.graph.name)}.toml", text),), lost=lost, notes=notes
    )


def _arguments(rows: Section) -> str:
    lines = []
    for key, value in rows:
        if isinstance(value, list):
            parts = "".join(f"                {_literal(part)},\n" for part in value)
            lines.append(f"            {key}=[\n{parts}            ],\n")
        else:
            lines.append(f"            {key}={_literal(value)},\n")
    return "".join(lines)


def _literal(value: object) -> str:
    return str(value) if isinstance(value, bool | int) else json.dumps(value)


def _training(p: Plan, dialect: Dialect) -> Section:
    d, w = p.decisions, p.workload
    # under a pipeline the local batch is what a step divides into micro-batches
    local = d.micro_batch * (d.microbatches if d.pp > 1 else 1)
    rows: Section = [
        ("local_batch_size", local), ("global_batch_size", w.global_batch),
        ("seq_len", w.seq_len), ("enable_cpu_offload", "params" in d.tiers),
        ("mixed_precision_param", DTYPES.get(w.precision, "bfloat16")),
        ("mixed_precision_reduce", "float32"),
    ]  # fmt: skip
    if not dialect.toml:  # they take neither pipelines nor its default dispatch of experts
        rows.append(("disable_cuda_graphs", d.pp > 1 or d.ep > 1))
    return rows


def _parallelism(p: Plan, dialect: Dialect) -> Section:
    d = p.decisions
    shard = max(1, d.shard // d.cp) if d.zero else 1
    rows: Section = [
        ("data_parallel_replicate_degree", d.dp // shard), ("data_parallel_shard_degree", shard),
        ("fsdp_reshard_after_forward", "always" if d.zero == 3 and d.reshard else "never"),
        ("tensor_parallel_degree", d.tp),
    ]  # fmt: skip
    if not dialect.toml:
        rows.append(("enable_sequence_parallel", d.sequence_parallel or d.tp == 1))
    rows += [("context_parallel_degree", d.cp)]
    if dialect.rotates and d.cp > 1:
        rows.append(("context_parallel_rotate_method", ROTATION.get(d.cp_kind, "allgather")))
    rows.append(("expert_parallel_degree", d.ep))
    if dialect.expert_tp and d.ep > 1:
        rows.append(("expert_tensor_parallel_degree", d.etp))
    rows.append(("pipeline_parallel_degree", d.pp))
    if d.pp > 1:
        rows += [
            ("pipeline_parallel_schedule", SCHEDULES.get(d.schedule, "1F1B")),
            ("pipeline_parallel_microbatch_size", d.micro_batch),
        ]  # fmt: skip
        named = _modules(p, dialect)
        if named is not None:
            rows.append(("module_fqns_per_model_part", named))
    return rows


def _modules(p: Plan, dialect: Dialect) -> list[list[str]] | None:
    """Module names of every stage as torchtitan's decoders have them; None where the model is
    not an embedding, layers, a norm and a head."""
    units = stage_units(p.graph, p.decisions.stages)
    extra = len([path for paths in units for path in paths]) - sum(p.decisions.stages)
    if extra != 3 or len(units[0]) != p.decisions.stages[0] + 1:
        return None
    found, at = [], 0
    for count in p.decisions.stages:
        found.append([f"layers.{i}" for i in range(at, at + count)])
        at += count
    found[0].insert(0, "tok_embeddings")
    found[-1] += ["norm", dialect.head]
    return found


def _again(p: Plan) -> str:
    """The nearest that fits in no more memory: full, selective or none."""
    rows = p.decisions.recompute
    return "full" if any(f for f, _ in rows) else "selective" if any(s for _, s in rows) else "none"


def _rows(p: Plan, dialect: Dialect) -> tuple[tuple[str, bool, str, str], ...]:
    """Every decision: whether torchtitan does it, else how far and why not."""
    d, w = p.decisions, p.workload
    other = differs(p)
    full = tuple(f for f, _ in d.recompute) == d.stages
    some = tuple(s for _, s in d.recompute) == d.stages
    kind = _again(p)
    tiers = {"params": "cpu", "optimizer": "cpu"}
    named = d.pp == 1 or _modules(p, dialect) is not None
    return (
        ("pp", True, "", ""),
        ("dp", d.zero == 0 or d.shard % d.cp == 0, UNSUPPORTED,
         "FSDP shards over data_parallel_shard_degree x context_parallel_degree"),
        ("tp", d.tp == 1 or d.zero > 0, UNSUPPORTED, "DDP alone: tp goes with FSDP (zero=3)"),
        ("cp", d.cp == 1 or d.zero > 0, UNSUPPORTED, "DDP alone: cp goes with FSDP (zero=3)"),
        ("ep", True, "", ""),
        ("etp", d.etp == 1 or (dialect.expert_tp and d.etp == d.tp), UNSUPPORTED,
         "expert_tensor_parallel_degree is 1 or tp" if dialect.expert_tp else
         "experts are not split further"),
        ("parts", len(d.parts) < 2, UNSUPPORTED, "one kind of GPU"),
        ("shares", not d.shares, UNSUPPORTED, "every data rank runs as many micro-batches"),
        ("tp_by_part", not d.tp_by_part, UNSUPPORTED, "every stage has as many ranks"),
        ("dp_outer", d.dp_outer == 1, UNSUPPORTED, "its pipeline ranks lie outermost"),
        ("zero", d.zero in (0, 3), APPROXIMATE,
         "FSDP2 keeps shards of parameters and gradients too, gathered for each micro-batch"),
        ("shard", True, "", ""), ("reshard", True, "", ""),
        ("micro_batch", True, "", ""), ("microbatches", True, "", ""),
        ("schedule", d.pp == 1 or d.schedule in SCHEDULES, UNSUPPORTED, f"no {d.schedule}"),
        ("virtual_stages", named, UNSUPPORTED, "stages are not those of a decoder: divided evenly"),
        ("stages", named, UNSUPPORTED, "stages are not those of a decoder: divided evenly"),
        ("recompute", kind == "none" or full or some, APPROXIMATE,
         f"one policy for all layers: {kind}"),
        ("recompute", kind != "selective" or w.engine.startswith("torchtitan"), APPROXIMATE,
         "its selective computes every second matmul again, the plan's none"),
        ("keep", not d.keep, UNSUPPORTED, "no list of operations"),
        ("offload", d.below is None and (not d.tiers or d.tiers == tiers), UNSUPPORTED,
         "parameters with gradients and optimizer, or nothing"),
        ("formats", not d.formats, UNSUPPORTED, "converters of the model: in its registry"),
        ("sequence_parallel", d.sequence_parallel or d.tp == 1 or not dialect.toml, APPROXIMATE,
         "tp always splits the residual stream"),
        ("compile", True, "", ""),
        ("cp_kind", d.cp == 1 or d.cp_kind == "allgather" or (dialect.rotates
                                                              and d.cp_kind in ROTATION),
         APPROXIMATE, "keys and values are gathered (allgather)"),
        ("grad_dtype", d.grad_dtype == "fp32", UNSUPPORTED, "gradients are reduced in fp32"),
        ("placements", not other, APPROXIMATE, other),
        ("precision", w.precision in DTYPES, UNSUPPORTED, f"no {w.precision} here"),
        ("optimizer", w.optimizer == "adamw", UNSUPPORTED, f"{w.optimizer}: in code"),
    )  # fmt: skip
