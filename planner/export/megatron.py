"""Megatron-LM: arguments of `pretrain_gpt.py`, as a shell array that a script sources."""

from __future__ import annotations

from cost_models.chain import chain_of
from cost_models.decisions import Decisions
from planner.classic import differs
from planner.export.header import comment, header
from planner.export.pinned import checked
from planner.export.target import (
    APPROXIMATE,
    DECISIONS,
    UNSUPPORTED,
    Exported,
    judge,
    training,
)
from planner.mesh import facts_of
from planner.plan import Plan

FILE = "megatron_args.sh"
CP_COMM = {"ring": "p2p", "allgather": "allgather", "ulysses": "a2a"}
OPTIMIZERS = {"adamw": "adam", "sgd": "sgd", "muon": "muon"}
STRATEGIES = {2: "optim_grads", 3: "optim_grads_params"}
FP8 = "hybrid"  # --fp8-format: e4m3 forward, e5m2 backward
TAKES = ("cp=1",)
Flags = list[tuple[str, ...]]


def export(plan: object, source: str) -> Exported:
    """A file `megatron_args.sh` with MEGATRON_ARGS, everything that the plan decides."""
    del source
    p = training(plan, "megatron")
    lost = judge("megatron", DECISIONS, _rows(p), TAKES)
    flags = [*_layout(p), *_state(p.decisions), *_work(p)]
    lines = "".join(f"    {' '.join(flag)}\n" for flag in flags)
    head = comment((*header(p, "megatron", checked("megatron")), *(f"lost: {x}" for x in lost)))
    usage = '# source this file; torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}" <model, data>\n'
    notes = ["the model's shape, its data and learning rate are not in a plan: add their flags"]
    if p.decisions.tp * p.decisions.cp > 1 and p.decisions.zero < 2:
        notes.append("Megatron-LM wants CUDA_DEVICE_MAX_CONNECTIONS=1 before Blackwell")
    return Exported(
        files=((FILE, f"{head}{usage}MEGATRON_ARGS=(\n{lines})\n"),), lost=lost,
        notes=tuple(notes),
    )  # fmt: skip


def layout_word(stages: tuple[int, ...]) -> str:
    """--pipeline-model-parallel-layout: E, t and L stand for embedding, layer and loss."""
    parts = ["t" * n if n < 4 else f"t*{n}" for n in stages]
    return "|".join(("E" + parts[0], *parts[1:])) + "L"


def _layout(p: Plan) -> Flags:
    d = p.decisions
    flags: Flags = [
        ("--tensor-model-parallel-size", str(d.tp)),
        ("--pipeline-model-parallel-size", str(d.pp)),
        ("--context-parallel-size", str(d.cp)),
    ]
    if d.sequence_parallel:
        flags.append(("--sequence-parallel",))
    if d.cp > 1:
        flags.append(("--cp-comm-type", CP_COMM[d.cp_kind]))
    if facts_of(chain_of(p.graph)).experts:
        flags += [("--expert-model-parallel-size", str(d.ep)),
                  ("--expert-tensor-parallel-size", str(d.etp))]  # fmt: skip
    if len(set(d.stages)) > 1:
        flags.append(("--pipeline-model-parallel-layout", f"'{layout_word(d.stages)}'"))
    elif d.virtual_stages > 1:
        flags.append(("--num-virtual-stages-per-pipeline-rank", str(d.virtual_stages)))
    return flags


def _state(d: Decisions) -> Flags:
    flags: Flags = []
    zero = d.zero if d.pp == 1 else min(d.zero, 1)
    if zero:
        flags.append(("--use-distributed-optimizer",))
        flags += [("--overlap-grad-reduce",), ("--overlap-param-gather",)]
    if zero >= 2:
        flags += [("--use-megatron-fsdp",),
                  ("--data-parallel-sharding-strategy", STRATEGIES[zero]),
                  ("--ckpt-format", "fsdp_dtensor")]  # fmt: skip
    if zero and d.shard < d.dp * d.cp:
        flags.append(("--num-distributed-optimizer-instances", str(d.dp * d.cp // d.shard)))
    if d.tiers.get("optimizer") == "cpu":
        flags += [("--optimizer-cpu-offload",), ("--optimizer-offload-fraction", "1.0"),
                  ("--use-precision-aware-optimizer",)]  # fmt: skip
    if _offloads_layers(d):
        flags.append(("--cpu-offloading-num-layers", str(_offloaded_layers(d))))
    return flags


def _work(p: Plan) -> Flags:
    d, w = p.decisions, p.workload
    flags: Flags = [("--micro-batch-size", str(d.micro_batch)),
                    ("--global-batch-size", str(w.global_batch)),
                    ("--seq-length", str(w.seq_len))]  # fmt: skip
    full, selective = [f for f, _ in d.recompute], [s for _, s in d.recompute]
    if tuple(full) == d.stages:
        flags += [("--recompute-granularity", "full"), ("--recompute-method", "uniform"),
                  ("--recompute-num-layers", "1")]  # fmt: skip
    elif any(full):
        flags += [("--recompute-granularity", "full"), ("--recompute-method", "block"),
                  ("--recompute-num-layers", str(max(full)))]  # fmt: skip
    elif any(selective):
        flags.append(("--recompute-granularity", "selective"))
    if w.precision in ("bf16", "fp8"):
        flags.append(("--bf16",))
    if w.precision == "fp16":
        flags.append(("--fp16",))
    if w.precision == "fp8":
        flags.append(("--fp8-format", FP8))
    if w.precision != "fp32":
        flags.append(("--accumulate-allreduce-grads-in-fp32" if d.grad_dtype == "fp32"
                      else "--grad-reduce-in-bf16",))  # fmt: skip
    return [*flags, ("--optimizer", OPTIMIZERS.get(w.optimizer, "adam"))]


def _offloads_layers(d: Decisions) -> bool:
    on_host = d.tiers.get("activations") == "cpu"
    return on_host and d.pp == 1 and not any(f + s for f, s in d.recompute)


def _offloaded_layers(d: Decisions) -> int:
    return sum(d.stages) if d.moved is None else sum(d.moved)


def _rows(p: Plan) -> tuple[tuple[str, bool, str, str], ...]:
    """Every decision: whether Megatron-LM does it, else how far and why not."""
    d, w = p.decisions, p.workload
    full = {f for f, _ in d.recompute}
    block = not any(full) or tuple(f for f, _ in d.recompute) == d.stages or len(full) == 1
    other = differs(p)
    experts = bool(facts_of(chain_of(p.graph)).experts)
    tiers = {w: t for w, t in d.tiers.items() if (w, t) != ("optimizer", "cpu")}
    return (
        ("pp", True, "", ""), ("dp", True, "", ""), ("tp", True, "", ""),
        ("cp", d.cp == 1 or w.seq_len % (2 * d.cp) == 0, UNSUPPORTED,
         "the sequence must divide by 2*cp"),
        ("ep", d.ep == 1 or experts, UNSUPPORTED, "the model has no experts"),
        ("etp", True, "", ""),
        ("parts", len(d.parts) < 2, UNSUPPORTED, "one kind of GPU"),
        ("shares", not d.shares, UNSUPPORTED, "every data rank runs as many micro-batches"),
        ("tp_by_part", not d.tp_by_part, UNSUPPORTED, "every stage has as many ranks"),
        ("dp_outer", d.dp_outer == 1, UNSUPPORTED, "its pipeline ranks lie outermost"),
        ("zero", d.zero < 2 or d.pp == 1, UNSUPPORTED,
         "Megatron FSDP and pipelines are not combined here: the optimizer alone is sharded"),
        ("shard", True, "", ""),
        ("reshard", d.zero < 3 or d.pp > 1 or d.reshard, APPROXIMATE,
         "Megatron FSDP frees what it gathered after forward"),
        ("micro_batch", True, "", ""), ("microbatches", True, "", ""),
        ("schedule", d.pp == 1 or (d.microbatches < d.pp and d.schedule == "gpipe")
         or d.schedule in ("1f1b", "interleaved"), UNSUPPORTED,
         f"no {d.schedule}: it runs 1f1b, or interleaved where a rank has several stages"),
        ("virtual_stages", True, "", ""), ("stages", True, "", ""),
        ("recompute", block, APPROXIMATE,
         f"one count for all stages: {max(full, default=0)} of each is computed again"),
        ("recompute", not any(s for _, s in d.recompute), APPROXIMATE,
         "selective computes attention's core again in every layer (--recompute-modules), the"
         " plan all but matmuls and attention in some" if not any(full) else
         "full and selective do not go together: what is selective in the plan is kept"),
        ("keep", not d.keep, UNSUPPORTED, "no list of operations"),
        ("offload", not tiers or (set(tiers) == {"activations"} and _offloads_layers(d)),
         UNSUPPORTED, "on the CPU: the optimizer; activations without pipeline and recomputation"),
        ("offload", d.below is None, APPROXIMATE,
         "a share of all parameters (--optimizer-offload-fraction), not layers: here all of it"),
        ("formats", not d.formats, UNSUPPORTED,
         "one recipe for all matmuls: trace with --precision fp8"),
        ("sequence_parallel", d.sequence_parallel or d.ep == 1 or d.tp == 1, UNSUPPORTED,
         "experts under tp want --sequence-parallel"),
        ("compile", d.compile and w.engine.startswith("megatron"), APPROXIMATE,
         "Transformer Engine's fused kernels, no torch.compile"),
        ("cp_kind", True, "", ""),
        ("grad_dtype", w.precision != "fp32" or d.grad_dtype == "fp32", UNSUPPORTED,
         "under fp32 gradients are fp32"),
        ("placements", not other, APPROXIMATE, other),
        ("precision", w.precision != "nvfp4", UNSUPPORTED, "nvfp4 is not written yet"),
        ("optimizer", w.optimizer in OPTIMIZERS, UNSUPPORTED, f"it has no {w.optimizer}"),
    )  # fmt: skip
