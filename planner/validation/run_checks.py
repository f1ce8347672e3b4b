"""What a run's numbers must be before it is laid out: one that cannot be is a reason to skip it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from planner.options import Progress
from planner.validation.row_form import is_positive, shown
from planner.validation.rows import Run
from planner.validation.running import LeftOut, Outcome, predict_runs

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "nvfp4")
OUTCOMES = ("", "ok", "oom")
_WORDS = {  # of the configuration
    "precision": PRECISIONS, "recompute": ("none", "selective", "full"),
    "schedule": ("1F1B", "1F1B interleaved"),
    "fsdp_strategy": ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"),
}  # fmt: skip
_ATTENTION = ("mla", "mha", "gqa", "mqa")  # but for MLA, `kv_heads` says which
_COUNTS = {
    "model": ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "vocab",
              "seq_len"),
    "hardware": ("num_gpus", "gpus_per_node"),
    "config": ("tp", "pp", "cp", "ep", "dp", "virtual_pp", "global_batch_sequences",
               "micro_batch", "fsdp_shard_group"),
}  # fmt: skip
_NONE_TOO = {"model": ("dense_layers", "mtp_layers"), "model.moe": ("shared",)}  # counts, or 0
_MOST = 1e9  # of a count: beyond it a row is a slip of the pen


def outcomes_of(runs: Sequence[Run], report: Progress | None = None) -> list[Outcome]:
    """What each run comes to, in order; those whose numbers cannot be are left out."""
    reasons = [reason_of(run) for run in runs]
    good = [run for run, reason in zip(runs, reasons, strict=True) if not reason]
    found = iter(predict_runs(good, report))
    return [
        LeftOut(id=run.id, reason=reason) if reason else next(found)
        for run, reason in zip(runs, reasons, strict=True)
    ]


def reason_of(run: Run) -> str:
    """Why a run cannot be predicted, or ""."""
    return next(_reasons(run), "")


def _reasons(run: Run) -> Iterator[str]:
    yield from run.faults
    model, hardware, config = run.model, run.hardware, run.config
    for table, names in _COUNTS.items():
        yield from _not_counts(table, getattr(run, table), names)
    yield from _not_counts("model", model, _NONE_TOO["model"], least=0)
    yield from _moe(run)
    if int(model.get("dense_layers") or 0) > int(model.get("layers") or 0):
        yield f"model.dense_layers is {shown(model['dense_layers'])}, more than model.layers"
    if model.get("params_b") is not None and not is_positive(model["params_b"]):
        yield f"model.params_b is {shown(model['params_b'])}, expected a number above 0"
    attention = model.get("attention")
    if attention and not any(word in str(attention).lower() for word in _ATTENTION):
        yield f"model.attention {shown(attention)} is not known: {' '.join(_ATTENTION)}"
    gpu = hardware.get("gpu")
    if gpu is not None and (not isinstance(gpu, str) or not gpu):
        yield f"hardware.gpu is {shown(gpu)}, expected a name"
    yield from _words(config)
    if config.get("offload") not in (None, False, "none"):
        yield f"config.offload is {shown(config['offload'])}: runs that offload are not predicted"
    if run.outcome not in OUTCOMES:
        yield f"outcome {shown(run.outcome)} is not known: oom, or nothing of a run that fitted"
    if run.oom and run.step_time_s is not None:
        yield "outcome is oom, yet a step was measured"


def _not_counts(
    table: str, values: dict[str, Any], names: Sequence[str], least: int = 1
) -> Iterator[str]:
    for name in names:
        value = values.get(name)
        if value is not None and not _is_count(value, least):
            yield f"{table}.{name} is {shown(value)}, expected a whole number, {least} to 1e9"


def _moe(run: Run) -> Iterator[str]:
    """What a mixture of experts must have, and what only one may have."""
    moe = run.model.get("moe")
    if moe is None or moe is False:
        if run.model.get("hybrid"):
            yield "model.hybrid is predicted with model.moe only, which is not stated"
        if int(run.config.get("ep") or 1) != 1:
            yield f"config.ep is {shown(run.config['ep'])}, and model.moe is not stated"
        return
    if not isinstance(moe, dict):
        yield f"model.moe is {shown(moe)}, expected an object: {{...}}"
        return
    needed = ("experts", "top_k", "expert_ffn")
    missing = [name for name in needed if moe.get(name) is None]
    if missing:
        yield f"model.moe.{missing[0]} is not stated"
        return
    yield from _not_counts("model.moe", moe, needed)
    yield from _not_counts("model.moe", moe, _NONE_TOO["model.moe"], least=0)
    top_k, experts = moe["top_k"], moe["experts"]
    if int(top_k) > int(experts):
        yield f"model.moe.top_k {top_k} is more than model.moe.experts {experts}"


def _words(config: dict[str, Any]) -> Iterator[str]:
    """Words that are not known, and what is not true or false."""
    for name, known in _WORDS.items():
        value = config.get(name)
        if value is not None and value not in known:
            yield f"config.{name} {shown(value)} is not known: {', '.join(known)}"
    for name in ("zero_or_fsdp", "recompute_modules"):
        if not isinstance(config.get(name) or "", str):
            yield f"config.{name} is {shown(config[name])}, expected a word"
    for name in ("sequence_parallel", "torch_compile"):
        if not isinstance(config.get(name, False), bool | None):
            yield f"config.{name} is {shown(config[name])}, expected true or false"


def _is_count(value: Any, least: int) -> bool:
    """A whole number, as digits or not."""
    if isinstance(value, str) and not value.isdecimal():
        return False
    if not is_positive(value):
        return least == 0 and value in (0, "0") and not isinstance(value, bool)
    return float(value) == int(float(value)) and float(value) <= _MOST
