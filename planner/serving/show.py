"""A plan of serving in a screenful of text, or as one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from cost_models.serving import WORKSPACE_BYTES
from cost_models.serving_decisions import Pool, ServeLoad, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_pools import Pooled
from cost_models.serving_shapes import BLOCKS
from cost_models.units import format_bytes, format_count, format_rate, format_seconds
from planner.names import many
from planner.options import Timing
from planner.proved import status_words
from planner.serving.asked import ServeAsked
from planner.serving.plan import ServingPlan, kept_words
from planner.serving.predict import Prediction
from planner.serving.relief import relief
from planner.serving.text import block_records, decisions_json, workload_json
from planner.wrapping import wrapped

WIDTH, BAR = 80, 32
_LEAST = 0.005  # of a step: smaller parts are told together


def document(
    plan: ServingPlan, found: Prediction, *, others: Sequence[Prediction] = (),
    timing: Timing | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The plan as JSON, base units."""
    made: dict[str, Any] = {
        "schema": "plan/1",
        "model": {"name": plan.graph.name, "parameters": plan.graph.parameter_count},
        "hardware": plan.hardware,
        "workload": workload_json(plan.asked),
        "decisions": decisions_json(plan) | {"blocks": block_records(plan.serving)},
        "estimate": estimate_json(found, plan.asked, plan.solver.pins),
        "lossy": list(plan.lossy),
        "solver": {"status": plan.solver.status, "gap": plan.solver.gap_ppm / 1e6,
                   "meshes": plan.solver.meshes,
                   **({"pins": list(plan.solver.pins)} if plan.solver.pins else {})},
    }  # fmt: skip
    if others:
        made["others"] = [
            {"decisions": division(p), "ttft_s": p.ttft_s, "tpot_s": p.tpot_s,
             "tokens_per_s": p.tokens_per_s} for p in others
        ]  # fmt: skip
    if timing is not None:
        from dataclasses import asdict

        made["timing"] = asdict(timing)
    return made


def estimate_json(
    p: Prediction, asked: ServeAsked, pinned: Sequence[str] = ()
) -> dict[str, Any]:
    """What requests see, seconds, bytes and rates."""
    m = p.memory
    return {
        "ttft_s": p.ttft_s, "tpot_s": p.tpot_s, "tokens_per_s": p.tokens_per_s,
        "running": p.running, "decode_step_s": p.decode_s,
        "breakdown_s": dict(p.parts), "prefill_breakdown_s": dict(p.prefill_parts),
        "peak_memory_bytes": round(dict(p.tiers)["gpu"]),
        "memory_error": None, "reserved_bytes": round(m.reserved_bytes),
        "capacity_bytes": round(m.capacity_bytes),
        "kv_bytes_per_token": round(m.kv_bytes_per_token),
        "kv_gpu_bytes_per_sequence": round(m.kv_bytes_per_sequence),
        "max_concurrency": None if m.sequences is None else (
            m.sequences * p.serving.attention_dp * p.serving.replicas
        ),
        "bottleneck": p.bottleneck, "relief": relief(p, asked, pinned),
        "tiers": {name: round(size) for name, size in p.tiers},
        **({} if p.pools is None else {"pools": pools_json(p.pools)}),
    }  # fmt: skip


def pools_json(found: Pooled) -> dict[str, Any]:
    """What pools of prefill and decode add: the parts of the first token's time, the cache sent."""
    return {
        "waiting_s": found.waiting_s, "reading_s": found.reading_s,
        "moving_s": found.moves.exposed_s, "kv_bytes_moved": round(found.moves.bytes),
        "decoding": found.decoding, "full": found.binds or None,
    }  # fmt: skip


def summary(
    plan: ServingPlan, found: Prediction, *, notes: Sequence[str] = (),
    others: Sequence[Prediction] = (),
) -> str:  # fmt: skip
    """The plan at 80 columns: what was decided, what requests see, what binds."""
    s, asked = plan.serving, plan.asked
    load = ServeLoad(prompt=asked.prompt, output=asked.output)
    lines = [*notes, f"{plan.graph.name}, {format_count(plan.graph.parameter_count)} parameters,"
             f" served on {plan.hardware}"]  # fmt: skip
    lines += _packed("load", [many(s.batch, "request") + " at once", f"{asked.prompt} tokens in",
                              f"{asked.output} out", asked.engine, f"for {asked.objective}"])
    mine = s.devices - (s.prefill.devices if s.prefill else 0)
    if s.prefill:
        lines += _packed("prefill", [f"{k} {v}" for k, v in _degrees(s.prefill).items()]
                         + ["= " + many(s.prefill.devices, "GPU")])  # fmt: skip
    lines += _packed("decode" if s.prefill else "division",
                     [f"{k} {v}" for k, v in _degrees(s).items()] + ["= " + many(mine, "GPU")])
    if s.prefill_chunk:
        lines.append(_row("prompts", f"in chunks of {s.prefill_chunk} tokens"))
    lines.append("")
    first, *rest = block_records(s)
    rows = [*rest, first | {"block": "others"}] if rest else [first]
    lines += [_row("blocks", _block(row, plan.rows_on_host, found)) for row in rows]
    cache = [f"{format_bytes(round(found.memory.kv_bytes_per_token))} a token and GPU in {s.kv}"]
    if s.kv_tier != "gpu":
        length = load.prompt + load.output
        here = format_bytes(round(found.memory.kv_bytes_per_sequence / length))
        cache += [f"on {s.kv_tier}", f"{here} of it on the GPU"]
    if s.kv_window and not s.kv_policy:
        cache.append(f"{s.kv_window} tokens kept (lossy)")
    lines += _packed("cache", cache)
    if s.kv_policy:
        read = "read" if s.kv_policy.startswith("retrieve") else "kept"
        lines.append(_row("", f"{kept_words(s)} {read}"))
    if plan.lossy:
        lines += _packed("lossy", list(plan.lossy))
    if unpacked := unpacked_words(plan):
        lines.append(_row("assumed", unpacked))
    lines += ["", f"first token {format_seconds(found.ttft_s)}, then one every"
              f" {format_seconds(found.tpot_s)}: a request {format_seconds(found.latency_s(load))};"
              f" {format_rate(found.tokens_per_s)} tokens/s"]  # fmt: skip
    if found.pools:
        lines += _pools(found.pools)
    if found.running < s.batch:
        lines.append(_row("", f"{found.running:.0f} of {s.batch} run at once, the others wait"))
    lines += _bars(found.parts, found.decode_s)
    lines += ["", "memory of the fullest GPU and below it"]
    capacity = found.memory.capacity_bytes
    for name, size in found.tiers:
        share = size / capacity if name == "gpu" else None
        lines.append(_bar(name, format_bytes(round(size)), share))
    lines += [_row("", line) for line in wrap(memory_basis(found), WIDTH - 12)]
    lines += ["", _row("binds", f"{found.bottleneck}: {relief(found, asked, plan.solver.pins)}")]
    predicted = many(plan.solver.meshes, "plan") + " predicted"
    lines += _packed("search", [*status_words(plan).split(", "), predicted])
    for at, p in enumerate(others[:3]):
        degrees = " ".join(f"{k} {v}" for k, v in _degrees(p.serving).items())
        if p.serving.prefill:
            read = " ".join(f"{k} {v}" for k, v in _degrees(p.serving.prefill).items())
            degrees = f"prefill {read} | decode {degrees}"
        lines.append(_row("beside" if not at else "", f"{degrees}: first token"
                          f" {format_seconds(p.ttft_s)}, then {format_seconds(p.tpot_s)}"))
    return "\n".join(wrapped(line, 12) for line in lines)


def unpacked_words(plan: ServingPlan) -> str:
    """What the engine's writing out of packed weights and cache is costed by, "" if it has none."""
    s, handling = plan.serving, load_serving_engine(plan.asked.engine).handling
    formats = dict.fromkeys(s.format_of(b) for b in BLOCKS)
    each = [f"{name} {handling.unpacks(name):g}" for name in formats if handling.unpacks(name)]
    each += [f"cache {handling.cache_unpack_bytes:g}"] if handling.unpacks_cache(s.kv) else []
    if not each:
        return ""
    return (f"{plan.asked.engine} unpacks what is packed before it is read: on a GPU"
            f" {', '.join(each)} bytes of traffic an element, counted, not measured")  # fmt: skip


def memory_basis(found: Prediction) -> str:
    """What of a GPU's memory is counted, what is not, and that its error is not known."""
    m = found.memory
    size = format_bytes(round(m.reserved_bytes))
    held = f"{size} are workspace and context, a reserve"
    if m.workspace_bytes > WORKSPACE_BYTES:
        held = f"{size} are context, a reserve, and the values of prompts that are read at once"
    if not m.context_bytes:
        held = f"{size} for the values of a pass are an estimate"
    return (f"weights and cache are counted by the byte, {held}: no run of the data prints a"
            " server's memory, so its error is not known")  # fmt: skip


def _pools(found: Pooled) -> list[str]:
    """The parts of the first token's time, and which pool is full."""
    moved = found.moves
    lines = _packed("first", [f"{format_seconds(found.waiting_s)} waiting",
                              f"{format_seconds(found.reading_s)} reading",
                              f"{format_seconds(moved.exposed_s)} moving the cache,"
                              f" {format_bytes(round(moved.bytes))}"])  # fmt: skip
    full = {"prompts": "the GPUs that read prompts are all busy",
            "moving": "the links between the pools are all busy"}.get(found.binds)  # fmt: skip
    decode = f"{found.decoding:.0f} decode at once"
    return [*lines, _row("", f"{decode}; {full}" if full else decode)]


def division(p: Prediction) -> dict[str, Any]:
    """The degrees of a plan, those that divide something; of prefill apart where it has GPUs."""
    found: dict[str, Any] = {}
    if p.serving.prefill:
        found["prefill"] = _degrees(p.serving.prefill)
    return found | _degrees(p.serving)


def _degrees(s: Serving | Pool) -> dict[str, int]:
    found = {"tp": s.tp, "pp": s.pp}
    etp = s.expert_tp if isinstance(s, Serving) else s.etp
    found |= {"ep": s.ep, "etp": etp} if s.ep > 1 else {}
    found |= {"attention_dp": s.attention_dp} if s.attention_dp > 1 else {}
    return found | {"replicas": s.replicas}


def _block(row: dict[str, Any], rows_on_host: int, found: Prediction) -> str:
    """A block's format and place; of one that the CPU may multiply, up to how many rows it does,
    and what the steps of this load do."""
    text = f"{row['block'].replace('_', ' ')}: {row['format']}"
    if "tier" in row:
        way = "streamed from"
        if row["place"] == "compute" and dict(found.parts).get("cpu"):
            way = "multiplied on"
        if row["block"] == "embeddings":  # in either place
            way = "looked up on"
        unit = "a layer" if row["block"] == "routed_experts" else "layers"
        kept = f", {row['resident']} {unit} on the GPU" if row["resident"] else ""
        text += f", {way} {row['tier']}{kept}"
        if row["place"] == "compute" and rows_on_host and row["block"] != "embeddings":
            text += f" (multiplied there up to {many(rows_on_host, 'row')} a step, streamed beyond)"
    return text


def _bars(parts: Sequence[tuple[str, float]], total: float) -> list[str]:
    """The parts of a decode step; those that are small together."""
    large = [(n, v) for n, v in sorted(parts, key=lambda x: -x[1]) if v >= _LEAST * total]
    rest = total - sum(v for _, v in large)
    rows = [*large, ("others", rest)] if rest > 1e-6 * total else large
    head = f"a decode step {format_seconds(total)}"
    return [head, *(_bar(n, format_seconds(v), v / total) for n, v in rows)]


def _packed(name: str, words: list[str]) -> list[str]:
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 2 > WIDTH - 12:
            lines[-1] += ","
            lines.append(word)
        else:
            lines[-1] += f" {word}" if word.startswith("=") else f", {word}"
    return [_row(name if not at else "", line) for at, line in enumerate(lines)]


def _row(name: str, text: str) -> str:
    return f"  {name:10}{text}"


def _bar(name: str, amount: str, share: float | None) -> str:
    drawn = "" if share is None else f"{'#' * round(min(share, 1) * BAR):{BAR}}{share:>5.0%}"
    return f"  {name:14}{amount:>10}  {drawn}".rstrip()
