"""The form of a row of a file of runs: its fields by name, and what is written in another form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

_TABLES = ("model", "hardware", "config", "measured")
_MEASURED = (
    "step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu_pct", "hfu_pct",
    "peak_memory_gb",
)  # fmt: skip
_SHARES = ("mfu_pct", "hfu_pct")  # of a peak, percent
_KNOWN: Mapping[str, tuple[str, ...]] = {  # those that say where a figure is from among them
    "": ("id", "source", "group", "framework", "task", *_TABLES, "outcome", "flops_convention",
         "notes", "derived", "arch_source"),
    "model": ("name", "params_b", "active_params_b", "layers", "hidden", "heads", "kv_heads",
              "head_dim", "ffn_hidden", "vocab", "seq_len", "moe", "hybrid", "attention",
              "dense_layers", "mtp_layers"),
    "model.moe": ("experts", "top_k", "expert_ffn", "shared"),
    "hardware": ("gpu", "num_gpus", "gpus_per_node", "interconnect"),
    "config": ("tp", "pp", "cp", "ep", "dp", "zero_or_fsdp", "micro_batch",
               "global_batch_sequences", "virtual_pp", "recompute", "recompute_modules",
               "sequence_parallel", "precision", "offload", "schedule", "grad_accum",
               "local_batch", "fsdp_shard_group", "fsdp_strategy", "mixed_precision_mode",
               "torch_compile"),
    "measured": _MEASURED,
}  # fmt: skip


def shown(value: Any) -> str:
    """A value as the file has it, cut where it is long."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def is_positive(value: Any) -> bool:
    """A number above 0, or its digits."""
    try:
        return not isinstance(value, bool) and 0 < float(value) < math.inf
    except (TypeError, ValueError, OverflowError):
        return False


def faults_of(raw: Mapping[str, Any]) -> Iterator[str]:
    """What is no object, or no measurement, though it is written as one."""
    tables = {name: raw.get(name) for name in _TABLES}
    for name, value in tables.items():
        if value is not None and not isinstance(value, dict):
            yield f"{name} is {shown(value)}, expected an object: {{...}}"
    measured = tables["measured"]
    if not isinstance(measured, dict):
        return
    for key in _MEASURED:
        value = measured.get(key)
        if value is not None and not is_positive(value):
            yield f"measured.{key} is {shown(value)}, expected a number above 0"
        elif value is not None and key in _SHARES and float(value) > 100:
            yield f"measured.{key} is {shown(value)}, over 100%"


def unread_in(raw: Mapping[str, Any]) -> Iterator[str]:
    """Fields that nothing here reads: unknown ones, and what a prediction does not depend on."""
    for table, known in _KNOWN.items():
        found: Any = raw
        for name in table.split(".") if table else ():
            found = found.get(name) if isinstance(found, dict) else None
        for key in found if isinstance(found, dict) else ():
            if key not in known and found[key] is not None:
                yield f"{table}.{key} is not known here: ignored".removeprefix(".")
    config = raw.get("config")
    if not isinstance(config, dict):
        return
    if config.get("mixed_precision_mode") is not None:
        yield "config.mixed_precision_mode is not read"
    modules = config.get("recompute_modules")
    if modules not in (None, "none", "core_attn"):
        yield f"config.recompute_modules {shown(modules)} is not read"
