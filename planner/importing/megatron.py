"""Megatron-LM: flags of `pretrain_gpt.py` in a shell script or a file of arguments."""

from __future__ import annotations

import re

from planner.export.megatron import CP_COMM, OPTIMIZERS, STRATEGIES
from planner.export.pinned import pinned
from planner.importing import shell
from planner.importing.settings import (
    Facts,
    Settings,
    Setup,
    data_ranks,
    even,
    joined,
    steps,
    switch,
)

_MOST_STAGES = 100_000  # of a layout written out
_FSDP = {"no_shard": 0, "optim": 1, **{word: stage for stage, word in STRATEGIES.items()}}
_OPTIMIZERS = {theirs: ours for ours, theirs in OPTIMIZERS.items()} | {"dist_muon": "muon"}
_CP_KINDS = {theirs: ours for ours, theirs in CP_COMM.items()}


def parse(text: str, source: str) -> Settings:
    """The flags of the file."""
    return shell.parse(text, source, pinned("megatron").plan)


def precision(s: Settings) -> str:
    """Of --bf16, --fp16 and --fp8-format; without them fp32."""
    if s.on("--bf16") and s.on("--fp16"):
        raise s.fault("--bf16", "and --fp16 are both there", "leave one of them out")
    if s.has("--fp8-format"):
        return "fp8"
    return "bf16" if s.on("--bf16") else "fp16" if s.on("--fp16") else "fp32"


def decide(s: Settings, facts: Facts) -> Setup:
    """All that the flags decide; what they leave open is Megatron-LM's default."""
    tp = s.number("--tensor-model-parallel-size", 1)
    pp = s.number("--pipeline-model-parallel-size", 1)
    cp = s.number("--context-parallel-size", 1)
    dp = data_ranks(s, facts, {"tp": tp, "pp": pp, "cp": cp})
    layers = s.number("--num-layers", facts.layers)
    if layers != facts.layers:
        raise s.fault("--num-layers", f"is {layers}, and the model has {facts.layers}",
                      "--model of this configuration")  # fmt: skip
    stages, virtual = _stages(s, facts.layers, pp)
    zero = _zero(s)
    copies = s.number("--num-distributed-optimizer-instances", 1)
    if dp * cp % copies:
        raise s.fault("--num-distributed-optimizer-instances",
                      f"{copies} does not divide {dp * cp} data ranks")  # fmt: skip
    micro = s.number("--micro-batch-size", 0, least=0)
    if not micro:
        raise s.fault("--micro-batch-size", "is not there", "add it: samples a rank runs at once")
    batch = s.number("--global-batch-size", micro * dp)
    count = steps(s, batch, dp, micro)
    once = "1f1b" if count >= pp else "gpipe"  # what its 1F1B is with fewer micro-batches
    pins = {
        "pp": str(pp), "dp": str(dp), "cp": str(cp), "tp": str(tp),
        "ep": str(s.number("--expert-model-parallel-size", 1)),
        "etp": str(s.number("--expert-tensor-parallel-size", tp) if facts.experts else 1),
        "zero": str(zero), "shard": str(dp * cp // copies if zero else 1),
        "reshard": switch(zero == 3 and pp == 1),
        "micro_batch": str(micro), "microbatches": str(count),
        "schedule": "interleaved" if virtual > 1 else once, "virtual_stages": str(virtual),
        "stages": joined(stages), "recompute": _recompute(s, stages),
        "offload": _offload(s, stages),
        "formats": "none", "sequence_parallel": switch(tp > 1 and s.on("--sequence-parallel")),
        "compile": "on", "cp_kind": _cp_kind(s), "grad_dtype": _gradients(s),
    }  # fmt: skip
    asked = {"global_batch": str(batch), "optimizer": _OPTIMIZERS[
        s.word("--optimizer", "adam", _OPTIMIZERS)]}  # fmt: skip
    if s.has("--seq-length"):
        asked["seq_len"] = str(s.number("--seq-length", 1))
    _processes(s, facts)
    return Setup(engine="megatron", pins=pins, asked=asked)


def layout(word: str) -> tuple[int, ...] | None:
    """Layers of each stage of --pipeline-model-parallel-layout; None where it is none, or has
    layers that are not planned (multi-token prediction)."""
    word = re.sub(r"[\s,]", "", word)
    for pattern in (r"\(([^()]+)\)\*(\d{1,5})", r"([^()*])\*(\d{1,5})"):
        while match := re.search(pattern, word):
            if len(word) + len(match[1]) * int(match[2]) > _MOST_STAGES:
                return None
            word = word[: match.start()] + match[1] * int(match[2]) + word[match.end() :]
    if not re.fullmatch(r"E[t|]*L", word):
        return None
    return tuple(part.count("t") for part in word.split("|"))


def _stages(s: Settings, layers: int, pp: int) -> tuple[tuple[int, ...], int]:
    """(layers of each stage, stages on a rank)."""
    names = ("--pipeline-model-parallel-layout", "--num-virtual-stages-per-pipeline-rank",
             "--num-layers-per-virtual-pipeline-stage")  # fmt: skip
    given = [name for name in names if s.has(name)]
    if len(given) > 1:
        raise s.fault(given[0], f"and {given[1]} are both there", "leave one of them out")
    ends = [s.number(f"--decoder-{end}-pipeline-num-layers", 0) for end in ("first", "last")]
    if names[0] in given:
        text = str(s.values[names[0]].value)
        stages = layout(text)
        if stages is None or min(stages) < 1 or sum(stages) != layers or len(stages) % pp:
            raise s.fault(
                names[0], f"is {text[:60]!r}",
                why=f"expected E, {layers} layers t and L on a multiple of {pp} stages, a layer on"
                    " each at least",
            )  # fmt: skip
        return stages, len(stages) // pp
    if any(ends):
        inner = layers - sum(ends)
        others = pp - sum(1 for n in ends if n)
        if len(given) or others < 1 or inner < others or inner % others:
            raise s.fault("--decoder-first-pipeline-num-layers",
                          f"and last leave {inner} layers to {others} stages")  # fmt: skip
        first, last = ([n] if n else [] for n in ends)
        return (*first, *[inner // others] * others, *last), 1
    virtual = s.number(names[1], 1)
    if names[2] in given:
        each = s.number(names[2], 1)
        if layers % (pp * each):
            raise s.fault(names[2], f"{each}: {layers} layers on {pp} ranks do not divide by it")
        virtual = layers // (pp * each)
    return even(s, layers, pp * virtual), virtual


def _zero(s: Settings) -> int:
    strategy = s.word("--data-parallel-sharding-strategy", "no_shard", _FSDP)
    distributed = s.on("--use-distributed-optimizer")
    if s.on("--use-megatron-fsdp"):
        return _FSDP[strategy]
    if strategy != "no_shard":
        raise s.fault("--data-parallel-sharding-strategy", f"{strategy} has no effect here",
                      "add --use-megatron-fsdp, or leave it out")  # fmt: skip
    return int(distributed)


def _recompute(s: Settings, stages: tuple[int, ...]) -> str:
    selective = s.on("--recompute-activations")
    kind = s.word("--recompute-granularity", "selective" if selective else "none",
                  ("none", "full", "selective"))  # fmt: skip
    method = s.word("--recompute-method", "", ("uniform", "block", ""))
    count = s.number("--recompute-num-layers", 1)
    if kind != "full":
        if kind == "selective":
            s.doubts.append("--recompute-granularity selective: costed as all but matmuls and"
                            " attention of every layer computed again")  # fmt: skip
        return kind
    if not method:
        raise s.fault("--recompute-granularity", "full has no --recompute-method",
                      "--recompute-method uniform: every layer", "block: some of each stage")
    if method == "uniform" and count > 1:
        s.doubts.append(f"--recompute-num-layers {count}: costed as layers one by one")
    most = max(stages)  # of block, a count beyond a stage's layers is all of them
    return "full" if method == "uniform" or count >= most else f"full:{count}"


def _offload(s: Settings, stages: tuple[int, ...]) -> str:
    parts = []
    if s.on("--optimizer-cpu-offload"):
        parts.append("optimizer:cpu")
    if s.has("--optimizer-offload-fraction"):
        share = str(s.values["--optimizer-offload-fraction"].value)
        if share not in ("1", "1.0"):
            s.doubts.append(f"--optimizer-offload-fraction {share[:20]}: costed as all of it")
    moved = s.number("--cpu-offloading-num-layers", 0, least=0)
    if moved:
        parts.append(f"activations:cpu:{moved}" if moved < max(stages) else "activations:cpu")
    return ",".join(parts) or "none"


def _cp_kind(s: Settings) -> str:
    return _CP_KINDS[s.word("--cp-comm-type", "p2p", _CP_KINDS)]


def _gradients(s: Settings) -> str:
    wide = s.on("--accumulate-allreduce-grads-in-fp32")
    if s.on("--grad-reduce-in-bf16"):
        if wide:
            raise s.fault("--grad-reduce-in-bf16",
                          "and --accumulate-allreduce-grads-in-fp32 are both there")  # fmt: skip
        return "bf16"
    return "fp32"


def _processes(s: Settings, facts: Facts) -> None:
    """The launcher's own count, where the same file has it, is the hardware's."""
    started = 1
    for names in (("--nproc-per-node", "--nproc_per_node"), ("--nnodes",)):
        name = next((n for n in names if s.has(n)), None)
        if name is None or not re.fullmatch(r"[0-9]{1,9}", str(s.values[name].value)):
            return
        started *= s.number(name, 1)
    if started != facts.gpus:
        raise s.fault("--nnodes", f"x processes a node is {started}, not {facts.gpus} GPUs",
                      f"--hardware NAMEx{started}")  # fmt: skip
