"""What runs a plan: an engine's overheads, what it keeps for backward, its schedules, its ZeRO.

One table, `engines.toml`; each number with its source.
"""

from __future__ import annotations

import difflib
import functools
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cost_models.constants_table import FIT_WORDS
from ir.errors import UsageError

_TABLE = Path(__file__).with_name("engines.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroMode:
    """What sharding over data-parallel ranks means: where things are, and what moves.

    The first five are "whole", "shard" or "units" (sharded, with gathered units beside). The
    rest counts collectives over the local parameters: all-gathers (gather) and reduce-scatters
    (reduce) of each micro-batch and of each step; all-reduces of each step.
    """

    name: str
    parameters_at_rest: str
    gradients_at_rest: str
    optimizer_at_rest: str
    parameters_peak: str
    gradients_peak: str
    gather_per_microbatch: int
    reduce_per_microbatch: int
    gather_per_step: int
    reduce_per_step: int
    all_reduce_per_step: int
    call: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine.

    fused: elementwise chains run as one kernel; unfused_factor multiplies their bytes.
    saves: what backward keeps, "autograd" (what each op saves) or "min-cut" (a partitioner).
    attention: which kernels, as `compute.load_kernels` names them. flash: they keep no scores in
    memory; False: the engine's own model multiplies heads op by op (a graph says which it does).
    sp_regather_backward: sequence parallelism gathers a saved input again in backward.
    schedules, compiled_schedules: legal with eager and with compiled stages.
    fills_stages: where layers do not divide, the first stages get the most that any has; False:
    embedding and head count as layers. Of layouts that nobody chose: a plan's are searched.
    pp_zero: ZeRO stages that go with a pipeline. precisions: formats it computes in.
    formats: of fewer bits that matmuls of layers may be in beside a 16-bit precision, those of
    format_groups. formats_apart: a group may be in another format than the others.
    kernel_host_s, layer_host_s, moe_layer_host_s, expert_host_s (of each local
    expert), step_host_s: host time of each, per
    micro-batch (step: per step); a layer takes hypot(device, host).
    narrow_host_ratio: what formats of 8 bits and less multiply moe_layer_host_s by: more kernels.
    host_blocks: the host waits for each kernel (CUDA_LAUNCH_BLOCKING), so its time is added.
    tp_exposed, ep_exposed, cp_exposed, p2p_exposed (one stage a rank, or more): share of that
    traffic that is not hidden.
    ep_dedupe: a token goes once to each rank, and once to each node, that has experts of its own.
    cast_traffic: bytes that casts to narrow formats move, over those of one scale a tensor.
    cast_beyond: bytes that they move beside: of each element of an input (forward, backward), of
    a gradient, of a weight (forward, backward).
    loss_traffic: bytes a logit that a fused cross-entropy moves, both ways; 0: op by op.
    network_share: share of a node's network ports that a collective drives.
    p2p_scatter: a tp rank sends its share of a value that all have, gathered again on arrival.
    fsdp_interference: what hidden FSDP traffic still costs its layer.
    dp_reduce_hidden, dp_gather_hidden: share of a stage's time that hides the sharded
    optimizer's traffic; dp_exposed_least of it is exposed in any case.
    context_bytes, comm_buffer_bytes (each communicator), bucket_bytes (of gradient reduction and
    parameter gathers), workspace_bytes, cached_bytes (in the allocator's blocks that nothing
    fits), fragmentation (of activations, gathered units and logits): what is reserved, by name.
    receives_apart: whether a pipeline receives each micro-batch in a buffer of its own.
    fp16_grad_bytes: of an accumulated gradient under fp16. gradient_copy_bytes: of a 16-bit
    gradient that stays beside the fp32 one it was added to. shard_gradient_bytes: of the
    optimizer's own copies of its shard's gradient, where gradients are 16-bit. live_parameters:
    the most that are gathered at once, 0 for two whole units. combine_saves: whether the rows
    that experts return are kept, to weigh them after the last matmul. master_bytes: of the copy
    of a parameter that is updated, 0 where the 16-bit parameter is. moment_share: the moments
    over fp32 ones.
    loss_bytes: a logit at the loss, in all of its copies; 0 where the op rules say it.
    split_loss_bytes: the same where tensor parallelism splits them; 0: the same.
    selective: what selective recomputation keeps, "matmuls" or "alternate" (every second one).
    routes_experts: it has layers of its own that give an expert its own tokens alone, whatever the
    forward of the model does with a stack of experts; False: it runs the model's forward.
    recompute_grain: what a plan chooses to recompute, whole layers and that in part ("layer"), or
    in part operation by operation too ("op").
    """

    name: str
    title: str
    fused: bool
    unfused_factor: float
    saves: str
    attention: str
    flash: bool
    sp_regather_backward: bool
    schedules: tuple[str, ...]
    compiled_schedules: tuple[str, ...]
    fills_stages: bool
    pp_zero: tuple[int, ...]
    precisions: tuple[str, ...]
    formats: tuple[str, ...]
    format_groups: tuple[str, ...]
    formats_apart: bool
    grad_dtype: str
    kernel_host_s: float
    layer_host_s: float
    moe_layer_host_s: float
    expert_host_s: float
    narrow_host_ratio: float
    step_host_s: float
    host_blocks: bool
    jitter_per_doubling: float
    jitter_from_gpus: int
    tp_exposed: float
    ep_exposed: float
    ep_dedupe: bool
    cast_traffic: float
    cast_beyond: tuple[float, ...]
    loss_traffic: float
    network_share: float
    cp_exposed: float
    p2p_scatter: bool
    p2p_exposed: float
    p2p_exposed_interleaved: float
    fsdp_interference: float
    dp_reduce_hidden: float
    dp_gather_hidden: float
    dp_exposed_least: float
    optimizer_bytes_per_parameter: float
    context_bytes: int
    comm_buffer_bytes: int
    bucket_bytes: int
    receives_apart: bool
    workspace_bytes: int
    cached_bytes: int
    fragmentation: float
    fp16_grad_bytes: int
    gradient_copy_bytes: int
    shard_gradient_bytes: int
    master_bytes: int
    moment_share: float
    live_parameters: int
    loss_bytes: float
    split_loss_bytes: float
    combine_saves: bool
    selective: str
    recompute_grain: str
    routes_experts: bool
    zero_modes: tuple[ZeroMode, ...]
    switches: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
    sources: tuple[tuple[str, str], ...]

    def zero_mode(self, zero: int, *, reshard: bool = True, pp: int = 1) -> ZeroMode:
        """The row of ZeRO stage 0-3; reshard: gather parameters again in backward (stage 3)."""
        name = ("replicate", "zero1", "zero2", "zero3")[zero]
        if pp > 1 and zero >= 2:
            name += "_pp"
        elif zero == 3 and not reshard:
            name += "_keep"
        for mode in self.zero_modes:  # asked for by every row of every way to hold a state
            if mode.name == name:
                return mode
        raise KeyError(name)

    def switched(self, switch: str) -> Engine:
        """The engine with an option of its software on: a row of [switch], factors by field."""
        factors = dict(self.switches)[switch]
        return replace(self, **{k: getattr(self, k) * x for k, x in factors})


@functools.cache
def engine_names() -> tuple[str, ...]:
    """The engines there are, in the order of the table."""
    return tuple(_table()["engine"])


@functools.cache
def load_engine(name: str) -> Engine:
    """The engine of that name. Raises UsageError naming those there are."""
    table = _table()
    rows = table["engine"]
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=1)
        raise UsageError(
            f"unknown engine {name!r}",
            why=f"known: {', '.join(rows)}",
            hints=tuple(f"did you mean {match}?" for match in near),
        )
    values = dict(table["defaults"])
    for row in _lineage(rows, name):
        sources = {**values["sources"], **row.get("sources", {})}
        values |= {**row, "sources": sources}
    sources = values.pop("sources")
    for word in ("base", "fits"):  # fits: samples and errors of fitted fields, for readers
        values.pop(word, None)
    modes = _zero_modes(table["zero"], values.pop("zero_table"))
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    plain["sources"] = tuple(sorted(sources.items()))
    switches = tuple(
        (key, tuple((k, x) for k, x in row.items() if k not in ("source", *FIT_WORDS)))
        for key, row in table["switch"].items()
    )
    known = {field.name for field in fields(Engine)}
    assert set(plain) | {"name", "zero_modes", "switches"} == known
    return Engine(name=name, zero_modes=modes, switches=switches, **plain)


def _lineage(rows: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A row after what it is based on, the furthest first."""
    base = rows[name].get("base")
    return [*(_lineage(rows, base) if base else ()), rows[name]]


def uncompiled(engine: Engine) -> Engine:
    """The engine with compilation off: kernels, host and what is kept as the native eager row."""
    eager = load_engine("native")
    return replace(
        engine, fused=False, unfused_factor=eager.unfused_factor, saves=eager.saves,
        kernel_host_s=eager.kernel_host_s,
    )  # fmt: skip


def _table() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def _zero_modes(tables: dict[str, Any], table: str) -> tuple[ZeroMode, ...]:
    """The modes of one engine family; what a family does not say is torch's."""
    rows = dict(tables["torch"])
    for name, row in tables[table].items():
        rows[name] = {**rows[name], **row}
    return tuple(
        ZeroMode(
            name=name,
            parameters_at_rest=row["at_rest"]["parameters"],
            gradients_at_rest=row["at_rest"]["gradients"],
            optimizer_at_rest=row["at_rest"]["optimizer"],
            parameters_peak=row["peak"]["parameters"],
            gradients_peak=row["peak"]["gradients"],
            gather_per_microbatch=row["per_microbatch"]["gather"],
            reduce_per_microbatch=row["per_microbatch"]["reduce"],
            gather_per_step=row["per_step"]["gather"],
            reduce_per_step=row["per_step"]["reduce"],
            all_reduce_per_step=row["per_step"]["all_reduce"],
            call=row["call"],
        )
        for name, row in rows.items()
    )
