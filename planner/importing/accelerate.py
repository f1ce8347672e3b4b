"""accelerate: the YAML or JSON of `accelerate config`, for FSDP and DDP."""

from __future__ import annotations

from planner.export.accelerate import MIXED, ROTATION, reduced
from planner.importing import deepspeed, yaml_subset
from planner.importing.settings import Facts, Settings, Setup, data_ranks, switch

_FSDP, _SIZES = "fsdp_config.", "parallelism_config.parallelism_config_"
_STRATEGIES = {"FULL_SHARD": 3, "SHARD_GRAD_OP": 2, "NO_SHARD": 0}
_STRATEGIES |= {str(at): zero for at, zero in enumerate(_STRATEGIES.values(), 1)}
_PRECISIONS = {theirs: ours for ours, theirs in MIXED.items()}
_CP = {theirs: ours for ours, theirs in ROTATION.items()}


def parse(text: str, source: str) -> Settings:
    """Scalars by the dotted path of their keys."""
    if source.endswith(".json"):
        return deepspeed.parse(text, source)
    return Settings(source=source, values=yaml_subset.parse(text, source))


def precision(s: Settings) -> str:
    """Of mixed_precision."""
    return _PRECISIONS[s.word("mixed_precision", "no", _PRECISIONS)]


def decide(s: Settings, facts: Facts) -> Setup:
    """All that the file decides; batches are set in code."""
    kind = s.word("distributed_type", "NO", ("FSDP", "MULTI_GPU", "NO", "DEEPSPEED", "MEGATRON_LM"))
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise s.fault("distributed_type", f"is {kind}", f"--from {kind.lower().partition('_')[0]}"
                      " and that engine's own file")  # fmt: skip
    processes = s.number("num_processes", facts.gpus)
    if processes != facts.gpus:
        raise s.fault("num_processes", f"is {processes}, not {facts.gpus} GPUs",
                      f"--hardware NAMEx{processes}")  # fmt: skip
    tp, cp = s.number(f"{_SIZES}tp_size", 1), s.number(f"{_SIZES}cp_size", 1)
    if s.number(f"{_SIZES}sp_size", 1) > 1:
        raise s.fault(f"{_SIZES}sp_size", "is DeepSpeed's Ulysses", "--from deepspeed")
    dp = data_ranks(s, facts, {"tp": tp, "cp": cp})
    zero, reshard = _zero(s) if kind == "FSDP" else (0, False)
    replicas = s.number(f"{_SIZES}dp_replicate_size", 1 if zero else dp)
    shards = s.number(f"{_SIZES}dp_shard_size", dp // replicas if zero else 1)
    if replicas * shards != dp:
        raise s.fault(f"{_SIZES}dp_shard_size",
                      f"{shards} x {replicas} replicas are not {dp} data ranks")  # fmt: skip
    again = s.on(f"{_FSDP}fsdp_activation_checkpointing")
    offloads = s.on(f"{_FSDP}fsdp_offload_params")
    backend = str(s.values["dynamo_config.dynamo_backend"].value) if s.has(
        "dynamo_config.dynamo_backend") else "NO"  # fmt: skip
    compiled = backend.upper() not in ("NO", "FALSE")
    if compiled and backend.upper() != "INDUCTOR":
        s.doubts.append(f"dynamo_backend {backend[:40]}: costed as inductor")
    rotation = s.word(f"{_SIZES}cp_comm_strategy", "allgather", _CP)
    nodes = s.number("num_machines", 1)
    if facts.gpus % nodes:
        raise s.fault("num_machines", f"is {nodes}, which does not divide {facts.gpus} GPUs")
    pins = {
        "pp": "1", "dp": str(dp), "cp": str(cp), "tp": str(tp), "ep": "1", "etp": "1",
        "zero": str(zero), "shard": str(shards * cp if zero else 1), "reshard": switch(reshard),
        "schedule": "1f1b", "virtual_stages": "1", "stages": str(facts.layers),
        "recompute": "full" if again else "none", "formats": "none",
        "offload": "optimizer:cpu,params:cpu" if offloads else "none",
        "sequence_parallel": "off", "compile": switch(compiled),
        "cp_kind": _CP[rotation] if cp > 1 else "ring",
        "grad_dtype": reduced(zero, facts.precision),
    }  # fmt: skip
    notes = ("batches are set in code: --fix micro_batch=N, and --fix microbatches=N where"
             " gradients are accumulated",)  # fmt: skip
    engine = "native-compiled" if compiled else "native"
    return Setup(engine=engine, pins=pins, asked={}, notes=notes)


def _zero(s: Settings) -> tuple[int, bool]:
    """(ZeRO stage, whether parameters are gathered again in backward)."""
    version = s.number(f"{_FSDP}fsdp_version", 1)
    name = f"{_FSDP}fsdp_reshard_after_forward"
    if version == 2:
        s.has(f"{_FSDP}fsdp_sharding_strategy")  # of version 1: not looked at
        return 3, s.on(name, True)
    old = f"{_FSDP}fsdp_sharding_strategy"
    name = old if s.has(old) else name
    zero = _STRATEGIES[s.word(name, "FULL_SHARD", _STRATEGIES)]
    return zero, zero == 3
