"""torchtitan: the TOML of 0.2.2 and before, and the Python of releases since."""

from __future__ import annotations

import math
import re
from typing import Any

from cost_models.checked_toml import parse_toml
from ir.errors import PlanError
from planner.export.torchtitan import DTYPES, ROTATION, SCHEDULES
from planner.importing import python_literals
from planner.importing.settings import (
    Facts,
    Setting,
    Settings,
    Setup,
    data_ranks,
    joined,
    steps,
    switch,
)

_CLASSES = {"TrainingConfig": "training", "ParallelismConfig": "parallelism",
            "CompileConfig": "compile"}  # fmt: skip
_POLICIES = {"FullAC.Config": "full", "SelectiveAC.Config": "op", "None": "none"}
_SECTIONS = ("training", "parallelism", "compile")
_SCHEDULES = {theirs: ours for ours, theirs in SCHEDULES.items()}
_SINGLE = ("gpipe", "1f1b")  # one stage a rank
_CP = {theirs: ours for ours, theirs in ROTATION.items()}
_MICRO, _LOCAL = "parallelism.pipeline_parallel_microbatch_size", "training.local_batch_size"


def is_python(source: str) -> bool:
    """Whether the file is the Python of releases since 0.3."""
    return source.endswith(".py")


def parse(text: str, source: str) -> Settings:
    """Settings "section.key". Raises PlanError for what is neither."""
    if is_python(source):
        return python_literals.parse(text, source, _CLASSES, _POLICIES, _SECTIONS)
    try:
        raw = parse_toml(text)
    except ValueError as fault:
        raise PlanError(f"{source} is no TOML", where=source, why=str(fault)[:200],
                        hints=("a .py file is read as Python",)) from fault  # fmt: skip
    values: dict[str, Setting] = {}
    for section, rows in raw.items():
        inside: dict[str, Any] = rows if isinstance(rows, dict) else {"": rows}
        for key, value in inside.items():
            values[f"{section}.{key}".rstrip(".")] = Setting(value=value)
    return Settings(source=source, values=values)


def precision(s: Settings) -> str:
    """Of training.mixed_precision_param."""
    words = {theirs: ours for ours, theirs in DTYPES.items()}
    return words[s.word("training.mixed_precision_param", "bfloat16", words)]


def decide(s: Settings, facts: Facts) -> Setup:
    """All that the file decides; what it leaves open is torchtitan's default."""
    p, python = "parallelism.", is_python(s.source)
    tp, pp = s.number(p + "tensor_parallel_degree", 1), s.number(p + "pipeline_parallel_degree", 1)
    cp = s.number(p + "context_parallel_degree", 1)
    dp = data_ranks(s, facts, {"tp": tp, "pp": pp, "cp": cp})
    replicas = s.number(p + "data_parallel_replicate_degree", 1)
    shards = s.number(p + "data_parallel_shard_degree", -1, least=-1)
    shards = dp // replicas if shards == -1 else shards
    if replicas * shards != dp:
        raise s.fault(p + "data_parallel_shard_degree",
                      f"{shards} x {replicas} replicas are not {dp} data ranks")  # fmt: skip
    zero = 3 if shards * cp > 1 else 0
    always = s.word(p + "fsdp_reshard_after_forward", "default", ("default", "always", "never"))
    stages, virtual, schedule = _stages(s, facts.layers, pp)
    batch, micro = _batch(s, dp, pp)
    if s.word("training.mixed_precision_reduce", "float32", ("float32",)) and python:
        s.on("training.disable_cuda_graphs")
    offloads = s.on("training.enable_cpu_offload")
    old = not python and s.on("training.compile")  # of 0.1 and before, where it had no section
    rotation = s.word(p + "context_parallel_rotate_method", "allgather", _CP)
    split = s.on(p + "enable_sequence_parallel", True)
    pins = {
        "pp": str(pp), "dp": str(dp), "cp": str(cp), "tp": str(tp),
        "ep": str(s.number(p + "expert_parallel_degree", 1)),
        "etp": str(s.number(p + "expert_tensor_parallel_degree", 1)),
        "zero": str(zero), "shard": str(shards * cp if zero else 1),
        "reshard": switch(zero == 3 and pp == 1 and always != "never"),
        "micro_batch": str(micro), "microbatches": str(steps(s, batch, dp, micro)),
        "schedule": schedule, "virtual_stages": str(virtual), "stages": joined(stages),
        "recompute": _recompute(s, stages), "formats": "none",
        "offload": "optimizer:cpu,params:cpu" if offloads else "none",
        "sequence_parallel": switch(tp > 1 and split),
        "compile": switch(s.on("compile.enable") or old),
        "cp_kind": _CP[rotation] if cp > 1 else "ring", "grad_dtype": "fp32",
    }  # fmt: skip
    asked = {"global_batch": str(batch), "seq_len": str(s.number("training.seq_len", 2048))}
    if not python:
        s.word("optimizer.name", "AdamW", ("Adam", "AdamW"))
    return Setup(engine="torchtitan", pins=pins, asked={**asked, "optimizer": "adamw"})


def _batch(s: Settings, dp: int, pp: int) -> tuple[int, int]:
    """(global batch, samples of a micro-batch)."""
    local = s.number(_LOCAL, 8)
    batch = s.number("training.global_batch_size", -1, least=-1)
    micro = s.number(_MICRO, 1)
    batch = local * dp if batch == -1 else batch
    if pp == 1:
        return batch, local
    if local % micro:
        raise s.fault(_LOCAL, f"is {local}, which micro-batches of {micro} do not divide")
    if batch > local * dp:
        s.doubts.append(f"training.global_batch_size {batch}: {batch // (local * dp)} runs of the"
                        " pipeline a step are costed as one")  # fmt: skip
    return batch, micro


def _stages(s: Settings, layers: int, pp: int) -> tuple[tuple[int, ...], int, str]:
    """(layers of each stage, stages on a rank, schedule)."""
    name = "parallelism.pipeline_parallel_"
    schedule = _SCHEDULES[s.word(f"{name}schedule", "1F1B", _SCHEDULES)]
    listed = "parallelism.module_fqns_per_model_part"
    ends = [s.number(f"{name}{end}_stage_less_layers", 1, least=0) for end in ("first", "last")]
    each = s.number(f"{name}layers_per_stage", 0, least=0)
    given = s.values[listed].value if s.has(listed) else None
    if pp == 1:
        return (layers,), 1, "1f1b"
    if given is not None:
        if not isinstance(given, list) or not all(isinstance(part, list) for part in given):
            raise s.fault(listed, "is no list of lists of module names")
        stages = tuple(sum(1 for m in part if str(m).startswith("layers.")) for part in given)
        if sum(stages) != layers or len(stages) % pp or min(stages) < 1:
            raise s.fault(listed, f"has {sum(stages)} layers on {len(stages)} stages",
                          why=f"the model has {layers}, on a multiple of {pp} stages")  # fmt: skip
        return stages, len(stages) // pp, schedule
    count = pp * (1 if schedule in _SINGLE else 2)
    if each:
        count = math.ceil((layers + sum(ends)) / each)
    stages = _weighted(layers, count, ends)
    if count % pp or min(stages) < 1 or sum(stages) != layers:
        raise s.fault(f"{name}degree", f"{pp}: {layers} layers do not make {count} stages",
                      "module_fqns_per_model_part names them")  # fmt: skip
    return stages, count // pp, schedule


def _weighted(layers: int, count: int, ends: list[int]) -> tuple[int, ...]:
    """Layers a stage where the ends weigh as much as some more: torchtitan 0.2.2,
    distributed/pipeline_parallel.py, generate_llm_fqn_per_model_part."""
    each, more = divmod(layers + sum(ends), count)
    rows = [each + (i < more) for i in range(count)]
    rows[0] -= ends[0]
    rows[-1] -= ends[1]
    return tuple(rows)


def _recompute(s: Settings, stages: tuple[int, ...]) -> str:
    if is_python(s.source):
        kind = s.word("activation_checkpoint", "op", ("none", "full", "op"))
        option = kind
    else:
        kind = s.word("activation_checkpoint.mode", "selective", ("none", "full", "selective"))
        name = "activation_checkpoint.selective_ac_option"
        option = str(s.values[name].value) if s.has(name) else "2"
    if kind in ("none", "full"):
        return kind
    if option == "op":
        return "selective"
    if not re.fullmatch(r"[1-9][0-9]{0,3}", option):
        raise s.fault("activation_checkpoint.selective_ac_option", f"is {option[:60]!r}",
                      why="expected op, or a number: every so many layers")  # fmt: skip
    s.doubts.append(f"selective_ac_option {option}: every so many layers, costed as so many of"
                    " each stage")  # fmt: skip
    counts = [n // int(option) for n in stages]
    return f"full:{joined(counts, '/')}" if any(counts) else "none"
