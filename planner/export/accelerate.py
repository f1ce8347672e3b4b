"""accelerate: the YAML of `accelerate launch --config_file`, FSDP2 or DDP."""

from __future__ import annotations

from pathlib import Path

from cost_models.fleet import parts_of
from planner.classic import differs
from planner.export.header import comment, header
from planner.export.pinned import checked
from planner.export.target import APPROXIMATE, DECISIONS, UNSUPPORTED, Exported, judge, training
from planner.plan import Plan, load_cluster

FILE = "accelerate.yaml"
ROTATION = {"allgather": "allgather", "ring": "alltoall"}  # parallelism_config_cp_comm_strategy
TAKES = ("pp=1", "ep=1", "etp=1", "zero=3")
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}


def export(plan: object, source: str) -> Exported:
    """A file `accelerate.yaml`."""
    p = training(plan, "accelerate")
    lost = judge("accelerate", DECISIONS, _rows(p), TAKES)
    d, w = p.decisions, p.workload
    fsdp = d.zero > 0
    rows: list[tuple[str, object]] = [
        ("compute_environment", "LOCAL_MACHINE"),
        ("distributed_type", "FSDP" if fsdp else "MULTI_GPU" if d.gpus > 1 else "'NO'"),
        ("mixed_precision", "'no'" if w.precision not in MIXED or w.precision == "fp32"
         else MIXED[w.precision]),
        ("num_processes", d.gpus), ("num_machines", _nodes(p, source)), ("machine_rank", 0),
        ("main_training_function", "main"), ("use_cpu", False),
    ]  # fmt: skip
    text = "".join(f"{key}: {_word(value)}\n" for key, value in rows)
    if fsdp:
        text += _section("fsdp_config", _fsdp(p)) + _section("parallelism_config", _sizes(p))
    if d.compile:
        text += _section("dynamo_config", [("dynamo_backend", "INDUCTOR")])
    told = (
        f"in code: DataLoader(batch_size={d.micro_batch}),"
        f" Accelerator(gradient_accumulation_steps={d.microbatches})"
    )
    said = (*header(p, "accelerate", checked("accelerate")), *(f"lost: {x}" for x in lost), told)
    return Exported(files=((FILE, comment(said) + text),), lost=lost, notes=(told,))


def reduced(zero: int, precision: str) -> str:
    """The format that accelerate reduces gradients in, where code does not say another."""
    return "bf16" if zero and precision in ("bf16", "fp8") else "fp32"


def _nodes(p: Plan, source: str) -> int:
    (part,) = parts_of(load_cluster(p, Path(source).parent))
    return part.nodes


def _fsdp(p: Plan) -> list[tuple[str, object]]:
    d = p.decisions
    return [
        ("fsdp_version", 2), ("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        ("fsdp_reshard_after_forward", d.zero == 3 and d.reshard),
        ("fsdp_offload_params", "params" in d.tiers),
        ("fsdp_activation_checkpointing", any(f + s for f, s in d.recompute)),
        ("fsdp_state_dict_type", "SHARDED_STATE_DICT"),
        ("fsdp_cpu_ram_efficient_loading", True),
    ]  # fmt: skip


def _sizes(p: Plan) -> list[tuple[str, object]]:
    d = p.decisions
    shard = max(1, d.shard // d.cp)
    rows: list[tuple[str, object]] = [
        ("parallelism_config_dp_replicate_size", d.dp // shard),
        ("parallelism_config_dp_shard_size", shard),
        ("parallelism_config_tp_size", d.tp), ("parallelism_config_cp_size", d.cp),
    ]  # fmt: skip
    if d.cp > 1:
        rows.append(("parallelism_config_cp_comm_strategy", ROTATION.get(d.cp_kind, "allgather")))
    return rows


def _section(name: str, rows: list[tuple[str, object]]) -> str:
    return f"{name}:\n" + "".join(f"  {key}: {_word(value)}\n" for key, value in rows)


def _word(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _rows(p: Plan) -> tuple[tuple[str, bool, str, str], ...]:
    """Every decision: whether accelerate does it, else how far and why not."""
    d, w = p.decisions, p.workload
    other = differs(p)
    again = [f + s for f, s in d.recompute]
    whole = tuple(f for f, _ in d.recompute) == d.stages
    fsdp = {"params": "cpu", "optimizer": "cpu"}
    return (
        ("pp", d.pp == 1, UNSUPPORTED, "no pipelines"),
        ("dp", d.zero == 0 or (d.shard % d.cp == 0 and (d.shard > d.cp or d.dp == 1)),
         UNSUPPORTED, "FSDP shards over dp_shard_size x cp_size, with dp_shard_size beyond 1"),
        ("tp", d.tp == 1 or d.zero > 0, UNSUPPORTED, "tensor parallelism goes with FSDP"),
        ("cp", d.cp == 1 or d.zero > 0, UNSUPPORTED, "context parallelism goes with FSDP"),
        ("ep", d.ep == 1, UNSUPPORTED, "no expert parallelism"),
        ("etp", d.etp == 1, UNSUPPORTED, "no expert parallelism"),
        ("parts", len(d.parts) < 2, UNSUPPORTED, "one kind of GPU"),
        ("shares", not d.shares, UNSUPPORTED, "every data rank runs as many micro-batches"),
        ("tp_by_part", not d.tp_by_part, UNSUPPORTED, "every stage has as many ranks"),
        ("dp_outer", d.dp_outer == 1, UNSUPPORTED, "data ranks lie in one row"),
        ("zero", d.zero in (0, 3), APPROXIMATE,
         "FSDP2 that keeps what it gathered until backward: gathered each micro-batch"),
        ("shard", True, "", ""), ("reshard", True, "", ""),
        ("micro_batch", False, UNSUPPORTED,
         f"in code: DataLoader(batch_size={d.micro_batch})"),
        ("microbatches", d.microbatches == 1, UNSUPPORTED,
         f"in code: Accelerator(gradient_accumulation_steps={d.microbatches})"),
        ("schedule", True, "", ""), ("virtual_stages", True, "", ""), ("stages", True, "", ""),
        ("recompute", not any(again) or whole, APPROXIMATE, "every layer is computed again whole"),
        ("recompute", not any(again) or d.zero > 0, UNSUPPORTED,
         "under DDP in code: model.gradient_checkpointing_enable()"),
        ("keep", not d.keep, UNSUPPORTED, "no list of operations"),
        ("offload", d.below is None and (not d.tiers or d.tiers == fsdp), UNSUPPORTED,
         "parameters with gradients and optimizer, or nothing"),
        ("formats", not d.formats, UNSUPPORTED, "fp8 has a recipe of its own (fp8_config)"),
        ("sequence_parallel", not d.sequence_parallel, APPROXIMATE,
         "the model's own tp_plan says whether the residual stream is split"),
        ("compile", True, "", ""),
        ("cp_kind", d.cp == 1 or d.cp_kind in ROTATION, UNSUPPORTED, "no Ulysses with FSDP"),
        ("grad_dtype", d.grad_dtype == reduced(d.zero, w.precision), APPROXIMATE,
         "FSDP reduces in the mixed precision's own format, DDP in fp32; else in code:"
         " MixedPrecisionPolicy(reduce_dtype=...)"),
        ("placements", d.tp == 1 or not other, APPROXIMATE, other),
        ("precision", w.precision in MIXED, UNSUPPORTED, f"no {w.precision}"),
        ("optimizer", True, "", ""),
    )  # fmt: skip
