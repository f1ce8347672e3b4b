"""DeepSpeed: its JSON."""

from __future__ import annotations

import json
from typing import Any

from ir.errors import PlanError
from planner.export.deepspeed import KEEPS, OURS
from planner.importing.settings import (
    AUTO,
    Facts,
    Setting,
    Settings,
    Setup,
    data_ranks,
    steps,
    switch,
)

_DEFAULT_LIVE = 10**9  # stage3_max_live_parameters: DeepSpeed 0.19.8, runtime/zero/config.py
_OPEN = "zero_optimization.offload_"


def parse(text: str, source: str) -> Settings:
    """Scalars by the dotted path of their keys. Raises PlanError for what is no JSON object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(k for k, _ in pairs if [key for key, _ in pairs].count(k) > 1)
            raise PlanError(f"{twice[:60]} is given twice", where=source)
        return found

    try:
        raw = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as fault:
        raise PlanError(f"{source} is no JSON", where=source, why=str(fault)[:200]) from fault
    if not isinstance(raw, dict):
        raise PlanError(f"{source} is no JSON object", where=source)
    raw.pop(OURS, None)
    values: dict[str, Setting] = {}
    _flatten(raw, "", values)
    return Settings(source=source, values=values)


def _flatten(raw: dict[str, Any], prefix: str, values: dict[str, Setting]) -> None:
    for key, value in raw.items():
        if isinstance(value, dict) and prefix.count(".") < 5:
            _flatten(value, f"{prefix}{key}.", values)
        else:
            values[prefix + key] = Setting(value=value)


def precision(s: Settings) -> str:
    """Of bf16.enabled and fp16.enabled; without them fp32. Raises PlanError where they are auto."""
    for name in ("bf16.enabled", "fp16.enabled"):
        if name in s.values and s.values[name].value == AUTO:
            raise s.fault(name, "is auto: the launching program fills it in", "--precision bf16")
    if s.on("bf16.enabled") and s.on("fp16.enabled"):
        raise s.fault("bf16.enabled", "and fp16.enabled are both true", "leave one of them out")
    return "bf16" if s.on("bf16.enabled") else "fp16" if s.on("fp16.enabled") else "fp32"


def decide(s: Settings, facts: Facts) -> Setup:
    """All that the file decides; what it leaves to code is left open, or DeepSpeed's default."""
    tp = max(1, s.number("tensor_parallel.autotp_size", 1, least=0))
    cp = s.number("sequence_parallel_size", 1)
    dp = data_ranks(s, facts, {"tp": tp, "sp": cp})
    zero = s.number("zero_optimization.stage", 0, least=0)
    if zero > 3:
        raise s.fault("zero_optimization.stage", f"is {zero}", why="expected 0 to 3")
    kept = s.number("zero_optimization.stage3_max_live_parameters", _DEFAULT_LIVE, 0, KEEPS)
    s.number("zero_optimization.stage3_max_reuse_distance", _DEFAULT_LIVE, 0, KEEPS)
    experts = s.on("expert_parallel.enabled", "expert_parallel.autoep_size" in s.values)
    for name in ("bf16.enabled", "fp16.enabled"):
        s.has(name)
    wide = facts.precision == "fp32"
    pins = {
        "pp": "1", "dp": str(dp), "cp": str(cp), "tp": str(tp),
        "ep": str(s.number("expert_parallel.autoep_size", 1) if experts else 1),
        "etp": str(s.number("expert_parallel.expert_tensor_parallel_size", 1) if experts else 1),
        "zero": str(zero), "shard": str(dp * cp if zero else 1),
        "reshard": switch(zero == 3 and not (kept > _DEFAULT_LIVE and kept >= facts.parameters)),
        "schedule": "1f1b", "virtual_stages": "1", "stages": str(facts.layers),
        "offload": _offload(s), "formats": "none", "sequence_parallel": "off",
        "cp_kind": "ulysses" if cp > 1 else "ring",
        "grad_dtype": "fp32" if wide else s.word(
            "data_types.grad_accum_dtype", "bf16" if facts.precision == "bf16" else "fp32",
            ("fp32", "bf16")),
    }  # fmt: skip
    asked = {}
    micro = s.number("train_micro_batch_size_per_gpu", 0, least=0)
    times = s.number("gradient_accumulation_steps", 0, least=0)
    batch = s.number("train_batch_size", 0, least=0)
    if micro and not batch:
        times = times or 1
        batch = micro * times * dp
    if batch and times and not micro:
        micro = steps(s, batch, dp, times)
    if batch:
        asked["global_batch"] = str(batch)
    if batch and micro:
        found = steps(s, batch, dp, micro)
        if times and found != times:
            raise s.fault(
                "train_batch_size", f"is {batch}, and micro-batches make {micro * times * dp}",
                why=f"{micro} samples x {times} micro-batches x {dp} data ranks",
            )  # fmt: skip
        pins |= {"micro_batch": str(micro), "microbatches": str(found)}
    notes = ("recompute and compile are set in code: --fix recompute=full, --fix compile=on",)
    return Setup(engine="deepspeed", pins=pins, asked=asked, notes=notes)


def _offload(s: Settings) -> str:
    parts = []
    for what, word in (("optimizer", "optimizer"), ("params", "param")):
        tiers = ("none", "cpu", "nvme")
        tier = s.word(f"{_OPEN}{word}.device", "none", tiers)
        if tier != "none":
            parts.append(f"{what}:{tier}")
    return ",".join(parts) or "none"
