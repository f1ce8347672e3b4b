"""DeepSpeed: its JSON. What it leaves to the user's code is lost, and said so."""

from __future__ import annotations

import json
from typing import Any

from planner.classic import differs
from planner.export.header import header
from planner.export.pinned import checked
from planner.export.target import APPROXIMATE, DECISIONS, UNSUPPORTED, Exported, judge, training
from planner.plan import Plan

FILE = "deepspeed.json"
OURS = "meshwright"  # a key that DeepSpeed's parser does not look at: JSON has no comments
TAKES = ("pp=1",)
NVME = "/local_nvme"  # where a node's disk is mounted: to be replaced
KEEPS = 10**15  # stage3_max_live_parameters: none are released after forward


def export(plan: object, source: str) -> Exported:
    """A file `deepspeed.json`."""
    del source
    p = training(plan, "deepspeed")
    lost = judge("deepspeed", DECISIONS, _rows(p), TAKES)
    d, w = p.decisions, p.workload
    made: dict[str, Any] = {
        OURS: [*header(p, "deepspeed", checked("deepspeed")), *(f"lost: {row}" for row in lost)],
        "train_batch_size": w.global_batch,
        "train_micro_batch_size_per_gpu": d.micro_batch,
        "gradient_accumulation_steps": d.microbatches,
        "zero_optimization": _zero(p),
    }
    if w.precision in ("bf16", "fp16"):
        made[w.precision] = {"enabled": True}
        if d.zero:
            made["data_types"] = {"grad_accum_dtype": d.grad_dtype}
    if d.tp > 1:
        made["tensor_parallel"] = {"autotp_size": d.tp}
    if d.cp > 1:
        made["sequence_parallel_size"] = d.cp
    if d.ep * d.etp > 1 or p.graph.written is not None:  # else it runs the model's own forward
        made["expert_parallel"] = {
            "enabled": True, "autoep_size": d.ep, "expert_tensor_parallel_size": d.etp,
        }  # fmt: skip
    notes: tuple[str, ...] = (f"make the optimizer in code: {w.optimizer}",)
    if d.tiers.get("optimizer") == "nvme":
        notes += ("nvme_path is yours to set",)
    return Exported(
        files=((FILE, json.dumps(made, indent=2, ensure_ascii=True) + "\n"),), lost=lost,
        notes=notes,
    )  # fmt: skip


def _zero(p: Plan) -> dict[str, Any]:
    d = p.decisions
    found: dict[str, Any] = {"stage": d.zero}
    if d.zero == 3 and not d.reshard:
        found |= {"stage3_max_live_parameters": KEEPS, "stage3_max_reuse_distance": KEEPS}
    optimizer = d.tiers.get("optimizer")
    if optimizer == "cpu":
        found["offload_optimizer"] = {"device": "cpu"}
    if optimizer == "nvme":
        found["offload_optimizer"] = {"device": "nvme", "nvme_path": NVME}
    if "params" in d.tiers:
        tier = d.tiers["params"]
        found["offload_param"] = {"device": tier} | ({"nvme_path": NVME} if tier == "nvme" else {})
    return found


def _rows(p: Plan) -> tuple[tuple[str, bool, str, str], ...]:
    """Every decision: whether DeepSpeed does it, else how far and why not."""
    d, w = p.decisions, p.workload
    other = differs(p)
    tiers = d.tiers.values()
    return (
        ("pp", d.pp == 1, UNSUPPORTED, "a pipeline is made in code (PipelineModule), not in JSON"),
        ("dp", True, "", ""), ("tp", True, "", ""),
        ("cp", True, "", ""), ("ep", True, "", ""), ("etp", True, "", ""),
        ("parts", len(d.parts) < 2, UNSUPPORTED, "one kind of GPU"),
        ("shares", not d.shares, UNSUPPORTED, "every data rank runs as many micro-batches"),
        ("tp_by_part", not d.tp_by_part, UNSUPPORTED, "every stage has as many ranks"),
        ("dp_outer", d.dp_outer == 1, UNSUPPORTED, "data ranks lie in one row"),
        ("zero", True, "", ""),
        ("shard", d.zero == 0 or d.shard == d.dp * d.cp, UNSUPPORTED,
         "ZeRO shards over all data ranks"),
        ("reshard", True, "", ""), ("micro_batch", True, "", ""), ("microbatches", True, "", ""),
        ("schedule", True, "", ""), ("virtual_stages", True, "", ""), ("stages", True, "", ""),
        ("recompute", not any(f + s for f, s in d.recompute), UNSUPPORTED,
         "in code: deepspeed.checkpointing.checkpoint around the layers"),
        ("keep", not d.keep, UNSUPPORTED, "no list of operations"),
        ("offload", "activations" not in d.tiers, UNSUPPORTED, "activations: in code"),
        ("offload", d.below is None, UNSUPPORTED, "the optimizer of all layers alone"),
        ("offload", all(t in ("cpu", "nvme") for t in tiers), UNSUPPORTED,
         "its tiers are cpu and nvme"),
        ("offload", d.zero > 0 or "optimizer" not in d.tiers, UNSUPPORTED, "under ZeRO 1 to 3"),
        ("formats", not d.formats, UNSUPPORTED, "matmuls in fewer bits: in code"),
        ("sequence_parallel", not d.sequence_parallel, UNSUPPORTED,
         "AutoTP keeps the residual stream whole"),
        ("compile", not d.compile, UNSUPPORTED, "in code: engine.compile()"),
        ("cp_kind", d.cp == 1 or d.cp_kind == "ulysses", UNSUPPORTED, "Ulysses alone"),
        ("grad_dtype", d.zero > 0 or d.grad_dtype == w.precision, UNSUPPORTED,
         "without ZeRO gradients are in the model's own format"),
        ("grad_dtype", w.precision != "fp32" or d.grad_dtype == "fp32", UNSUPPORTED,
         "under fp32 gradients are fp32"),
        ("placements", not other, APPROXIMATE, other),
        ("precision", w.precision in ("fp32", "bf16", "fp16"), UNSUPPORTED, "fp32, bf16, fp16"),
        ("optimizer", True, "", ""),
    )  # fmt: skip
