"""A plan in a screenful of text, or as one JSON document."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cost_models.ledger import Estimate, RankLedger
from cost_models.schedule import rank_of
from cost_models.units import format_bytes, format_count, format_rate, format_seconds
from cost_models.validation.accuracy import memory_error
from ir.errors import UsageError
from planner.charges import Charges
from planner.decisions import recompute_words
from planner.decisions_json import decisions_json
from planner.names import fold, fold_text, many
from planner.offloads import offload_words
from planner.options import Baseline, Timing
from planner.placements import placements, tp_idle
from planner.plan import Plan
from planner.plan_text import SCHEMA, recompute_records, stage_records, workload_json
from planner.proved import all_pinned, an_axis, gain_words, status_words
from planner.share_words import microbatch_words, tp_words
from planner.tightness import tight, tight_words
from planner.wrapping import side_by_side, wrapped

WIDTH = 80
BAR = 32
MOST_STAGES = 4  # rows on the first screen; --layers shows every stage
LEAST_FOLDED = 3  # stages in a row that are told in one
MOST_BARS = 6
MOST_LINES = 39  # of a screen
SHORT_RECOMPUTE = 24  # letters; where stages differ more than that, totals are told
MOST_ASSUMPTIONS = 2


def document(
    plan: Plan,
    estimate: Estimate,
    *,
    timing: Timing | None = None,
    baselines: Sequence[Baseline] | None = None,
    charges: Charges | None = None,
) -> dict[str, Any]:
    """The plan as cli.md's JSON, base units. timing, baselines and charges are trace's alone."""
    keys = decisions_json(plan.decisions)
    recompute = {"recompute": recompute_words(plan.decisions)}
    place = list(keys).index("offload")
    decisions = dict([*keys.items()][:place]) | recompute | dict([*keys.items()][place:])
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"name": plan.graph.name, "parameters": plan.graph.parameter_count},
        "hardware": plan.hardware,
        "workload": workload_json(plan.workload),
        "decisions": decisions,
        "estimate": estimate_json(estimate),
        "solver": {
            "status": plan.solver.status,
            "gap": plan.solver.gap_ppm / 1e6,
            "bound_s": plan.solver.bound_us / 1e6,
            "meshes": plan.solver.meshes,
            "meshes_solved": plan.solver.meshes_solved,
            **({"pins": list(plan.solver.pins)} if plan.solver.pins else {}),
            **({"objective": plan.solver.objective} if plan.solver.objective != "time" else {}),
        },
    }
    if charges is not None:
        prices = ("usd_per_million_tokens", "spot_usd_per_million_tokens")
        found["estimate"] |= {key: getattr(charges, key) for key in prices}
    if timing is not None:
        found["timing"] = asdict(timing)
    if baselines is not None:
        found["baselines"] = [asdict(baseline) for baseline in baselines]
    return found


def estimate_json(e: Estimate) -> dict[str, Any]:
    """The estimate of a training step, seconds, bytes and rates."""
    return {
        "step_time_s": e.step_time_s,
        "error": e.error,
        "tokens_per_s_per_gpu": e.tokens / e.step_time_s / e.gpus,
        "model_tflops_per_gpu": e.model_flop_per_s_per_gpu / 1e12,
        "hardware_tflops_per_gpu": e.executed_flop / e.step_time_s / e.gpus / 1e12,
        "mfu": e.mfu,
        "usd_per_million_tokens": None,
        "breakdown_s": {name: ps / 1e12 for name, ps in e.breakdown_ps},
        "peak_memory_bytes": e.peak_memory_bytes,
        "capacity_bytes": e.capacity_bytes,
        "memory_by_pp_rank": [dict(rank.memory_bytes) for rank in e.ranks],
    }


def summary(
    plan: Plan,
    estimate: Estimate,
    *,
    notes: Sequence[str] = (),
    baselines: Sequence[Baseline] = (),
) -> str:
    """The plan at 80 columns, under 40 lines: what was decided, and what it will do.

    notes: lines to print first, such as the defaults used or that the estimate is stale.
    """
    parts = (_stages(plan), _memory(estimate), _time(estimate, plan.graph.seq_in_input))
    lines = [*_head(plan), *(line for part in parts for line in ("", *part)), ""]
    beside = side_by_side(notes)  # samples of assumptions go before notes do
    for told, shown in ((notes, MOST_ASSUMPTIONS), (beside, MOST_ASSUMPTIONS), (beside, 0)):
        rows = [*lines, *_verdict(plan, estimate, baselines, shown)]
        folded = "\n".join(wrapped(line, 12) for line in rows).split("\n")
        said = "\n".join(map(wrapped, told)).split("\n") if told else []
        if len(folded) + len(said) <= MOST_LINES:
            return "\n".join([*said, *folded])
    return "\n".join([*map(_cut, beside), *folded])  # notes are cut, decisions never


def _head(plan: Plan) -> list[str]:
    w, d, graph = plan.workload, plan.decisions, plan.graph
    length = f"{w.global_batch} x {w.seq_len} tokens" if graph.seq_in_input else w.global_batch
    mesh = [f"{axis} {size}" for axis, size in _mesh(plan)]
    shard = "" if d.shard in (1, d.dp * d.cp) else f" in groups of {d.shard}"
    recompute = recompute_words(d)
    if len(recompute) > SHORT_RECOMPUTE and not d.shares:
        full, selective = (sum(counts) for counts in zip(*d.recompute))
        recompute = f"{full} layers in full, {selective} in part"
    if d.keep:
        recompute += f", in part keeping {_kept(plan)}"
    allowed = "".join(f" ({word} allowed)" for word in w.allowed_formats)
    skew = f", expert imbalance {w.expert_imbalance:g}" if w.expert_imbalance != 1 else ""
    virtual = f" x {d.virtual_stages} virtual stages" if d.virtual_stages > 1 else ""
    words = [
        f"ZeRO-{d.zero}{shard}" + (", resharding" if d.reshard else ""),
        f"recompute {recompute}",
        *([f"dp outside the pipeline: {d.dp_outer}"] if d.dp_outer > 1 else []),
        *(["sequence parallel"] if d.sequence_parallel else []),
        *([f"cp by {d.cp_kind}"] if d.cp > 1 else []),
        "compiled" if d.compile else "eager",
        *offload_words(d),
        *(f"{group} in {word}" for group, word in d.formats),
    ]
    return [
        f"{graph.name}, {format_count(graph.parameter_count)} parameters, on {plan.hardware}",
        _row(
            "workload",
            f"batch {length}, {w.precision}{allowed}, {w.optimizer}, {w.engine}{skew}",
        ),
        _row("mesh", ", ".join(mesh) + f" = {many(d.gpus, 'GPU')}"),
        *([_row("parts", _parts(plan))] if d.parts or d.shares else []),
        _row("steps", f"micro-batches {microbatch_words(d)} x {d.micro_batch},"
             f" {d.schedule}{virtual}"),
        *(_row("" if i else "layout", row) for i, row in enumerate(_pack(words, ", "))),
        *([_row("note", f"tp {d.tp} splits nothing of this model: its ranks all do the same")]
          if tp_idle(d, plan.sharding_by_unit) else []),
    ]


def _mesh(plan: Plan) -> list[tuple[str, int | str]]:
    d = plan.decisions
    experts = [("ep", d.ep), ("etp", d.etp)] if d.ep * d.etp > 1 else []
    return [("pp", d.pp), ("dp", d.dp), ("cp", d.cp), ("tp", tp_words(d)), *experts]


def _parts(plan: Plan) -> str:
    """Which GPUs run which stages, where the hardware is of several kinds."""
    d, at, words = plan.decisions, 0, []
    if d.shares:
        shares = (f"{s.dp * d.cp * d.tp} {s.part}: {s.microbatches * s.dp * d.micro_batch} samples"
                  for s in d.shares)  # fmt: skip
        return "; ".join(shares) + "; replicas on each"
    for name, ranks in d.parts:
        tp = dict(d.tp_by_part).get(name, d.tp)
        gpus = ranks * d.dp * d.cp * tp
        here = f"stages {at} to {at + ranks - 1}" if ranks > 1 else f"stage {at}"
        own = f", tp {tp}" if d.tp_by_part else ""
        words.append(f"{gpus} {name}: {here if len(d.parts) > 1 else 'all stages'}{own}")
        at += ranks
    return "; ".join(words) + ("" if len(d.parts) > 1 else "; all others idle")


def _stage_words(record: Mapping[str, Any]) -> str:
    """A stage, where it runs and what."""
    part = f", {record['part']}" if "part" in record else ""
    return f"stage {record['stage']} (pp rank {record['pp_rank']}{part}): {record['units']}"


def _stages(plan: Plan) -> list[str]:
    """Stages with their layers; the middle ones left out where there are many."""
    records = stage_records(plan.decisions, plan.graph)
    rows = [_stage_words(record) for record in records]
    if len(rows) > MOST_STAGES:
        left = len(rows) - MOST_STAGES + 1
        half = (MOST_STAGES - 1) // 2
        middle = f"... {left} stages more (plan show --stage N)"
        rows = [*rows[: half + 1], middle, *rows[-half:]]
    return rows


def _memory(e: Estimate) -> list[str]:
    """The fullest rank's memory by name, as bars against the capacity."""
    rank = e.fullest
    total = rank.peak_bytes
    share = total / e.capacity_bytes
    head = f"memory of {rank.name}: {format_bytes(total)} +-{memory_error():.0%} of "
    lines = [head + f"{format_bytes(e.capacity_bytes)} ({share:.0%})"]
    if not e.fits:
        lines[0] += "  DOES NOT FIT"
    elif tight(e):
        lines.append(f"  {tight_words()}: leave room with --max-memory")
    lines.append(_arithmetic(rank))
    most = _most(rank.memory_bytes)
    lines += [_bar(name, format_bytes(n), n / e.capacity_bytes) for name, n in most]
    return lines + [
        f"tier {use.said}" + ("" if use.fits else "  DOES NOT FIT") for use in e.tiers
    ]


def _arithmetic(rank: RankLedger) -> str:
    """Where the bytes of the state come from: the rank's parameters, and the bytes of each."""
    sizes = dict(rank.memory_bytes)
    each = [
        f"{sizes[name] / max(1, rank.parameters):.3g}"
        for name in ("parameters", "gradients", "optimizer")
    ]
    if not any(sizes[name] for name in ("parameters", "gradients", "optimizer")):
        return f"  {format_count(rank.parameters)} params, all of whose state lies below"
    head = f"  {format_count(rank.parameters)} params x ({' + '.join(each)}) bytes of weights, "
    words = "gradients, optimizer"
    return head + (words if len(head + words) <= WIDTH else "grads, optimizer")


def _time(e: Estimate, has_tokens: bool) -> list[str]:
    head = f"step {format_seconds(e.step_time_s)} +-{e.error:.0%}"
    rate = e.tokens / e.step_time_s / e.gpus
    what = "tokens" if has_tokens else "samples"
    head += f"   {format_rate(rate)} {what}/s/GPU"
    head += f"   {e.model_flop_per_s_per_gpu / 1e12:.0f} TFLOP/s/GPU"
    return [
        f"{head}   MFU {e.mfu:.1%}",
        *(
            _bar(name, format_seconds(ps / 1e12), ps / e.step_time_ps)
            for name, ps in _most(e.breakdown_ps)
        ),
    ]


def _most(items: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The largest items, and what the others come to."""
    ordered = sorted((item for item in items if item[1]), key=lambda item: -item[1])
    if len(ordered) <= MOST_BARS:
        return ordered
    rest = ordered[MOST_BARS - 1 :]
    return [*ordered[: MOST_BARS - 1], (f"{len(rest)} others", sum(size for _, size in rest))]


def _verdict(
    plan: Plan, e: Estimate, baselines: Sequence[Baseline], shown: int
) -> list[str]:
    s = plan.solver
    better = {"cost": "costs less", "energy": "takes less energy"}.get(s.objective, "is better")
    proof = {
        "OPTIMAL": (  # an axis more must earn 2% of the step: see docs/search.md
            f"no plan of {many(s.meshes, 'mesh')} {better}{an_axis(s, ' by')}",
            f"{s.meshes_solved} solved",
        ),
        "FEASIBLE": (
            *gain_words(s).split(", "),
            f"{many(s.meshes, 'mesh')}, {many(s.meshes_solved, 'program')} solved",
        ),
        "ESTIMATE": ("every decision is given", "an estimate, not a search"),
    }
    said: tuple[str, ...] = () if all_pinned(plan) else proof.get(s.status, ())
    words = _pack([*status_words(plan).split(", "), *said], ", ")
    lines = [_row("" if i else "search", row) for i, row in enumerate(words)]
    if baselines:
        rows = [
            f"{b.name} {format_seconds(b.step_time_s)}"
            f" ({round(b.step_time_s / e.step_time_s - 1, 2) + 0.0:+.0%}"  # never -0%
            f"{'' if b.fits else ', does not fit'})"
            for b in baselines
        ]
        rows += ["(without the pins)"] * bool(s.pins)
        lines += [
            _row("baselines" if not i else "", row) for i, row in enumerate(_pack(rows, "  "))
        ]
    if e.assumptions:
        where = "first of them:" if shown else "plan report has them"
        lines.append(_row("assumed", f"{len(e.assumptions)} things; {where}"))
        lines += [_cut(_row("", text)) for text in e.assumptions[:shown]]  # the report's are whole
    return lines


def layers_text(plan: Plan) -> str:
    """Every stage, what is computed again, and every parameter's placement on tp."""
    groups: dict[str, list[str]] = {}
    for name, placement in placements(plan.sharding_by_unit, plan.graph).items():
        groups.setdefault(placement, []).append(name)
    lines = _folded_stages(plan)
    lines += [f"recompute {r['recompute']}: {r['units']}"
              for r in recompute_records(plan.decisions, plan.graph)]  # fmt: skip
    lines += [f"kept in part of {name}: {' '.join(words) or 'its inputs alone'}"
              for name, words in plan.decisions.keep]  # fmt: skip
    for placement, names in groups.items():
        lines += [f"{placement:5} {pattern}" for pattern in fold(names)]
    return "\n".join(wrapped(line, 6) for line in lines)


def _folded_stages(plan: Plan) -> list[str]:
    """A line a stage; one for several in a row that have as many layers each and nothing else."""
    from planner.chain import stage_units

    d, units = plan.decisions, stage_units(plan.graph, plan.decisions.stages)
    records = stage_records(d, plan.graph)

    def alike(r: Mapping[str, Any]) -> tuple[Any, ...]:
        at = r["stage"]
        layers = d.stages[at] if len(units[at]) == d.stages[at] else -1 - at
        return layers, at // d.pp, r.get("part")  # ranks go up, or down, within pp stages

    lines: list[str] = []
    for (layers, _, part), group in itertools.groupby(records, alike):
        run = list(group)
        first, last = run[0], run[-1]
        if len(run) < LEAST_FOLDED:
            lines += map(_stage_words, run)
            continue
        names = fold_text([name for r in run for name in units[r["stage"]]])
        ranks = f"{first['pp_rank']} to {last['pp_rank']}{f', {part}' if part else ''}"
        lines.append(f"stages {first['stage']} to {last['stage']} (pp ranks {ranks}): {names},"
                     f" {layers} on each")  # fmt: skip
    return lines


def stage_text(plan: Plan, e: Estimate, stage: int) -> str:
    """One stage: its units, its recomputation, its rank's memory and collectives."""
    from planner.chain import stage_units

    d = plan.decisions
    if not 0 <= stage < len(d.stages):
        raise UsageError(f"--stage {stage}: there are stages 0 to {len(d.stages) - 1}")
    full, selective = d.recompute[stage] if d.recompute else (0, 0)
    mine = rank_of(d.schedule, d.pp, stage)
    return "\n".join(
        [
            f"stage {stage} on pp rank {mine}: {d.stages[stage]} layers",
            _row("units", fold_text(stage_units(plan.graph, d.stages)[stage])),
            _row("recompute", f"{full} layers in full, {selective} in part"
                 + (f", keeping {_kept(plan)}" if d.keep and selective else "")),
            *(_row("", f"on {share.part} {full} in full, {selective} in part")
              for share in d.shares if share.recompute
              for full, selective in share.recompute[stage : stage + 1]),
            *([_row("offload", f"activations of {d.moved[stage]} layers")] if d.moved else []),
            *([_row("offload", f"optimizer of {d.below[stage]} layers")] if d.below else []),
            *(line for rank in e.ranks if rank.pp_rank == mine
              for line in _rank_lines(rank, e.capacity_of(rank))),
        ]
    )  # fmt: skip


def _rank_lines(rank: RankLedger, capacity: int) -> list[str]:
    """A rank's memory and collectives."""
    moved = sorted(rank.collectives, key=lambda c: (-c.exposed_s, c.kind, c.where))
    return [
        "",
        f"memory of {rank.name}: {format_bytes(rank.peak_bytes)} of {format_bytes(capacity)}",
        *(
            _bar(name, format_bytes(size), size / capacity)
            for name, size in rank.memory_bytes
            if size
        ),
        "",
        f"{'collective':16}{'axis':5}{'count':>8}{'bytes':>10}{'exposed':>10}  where",
        *(
            f"{c.kind:16}{c.axis:5}{c.count:8}{format_bytes(c.size_bytes):>10}"
            f"{format_seconds(c.exposed_s):>10}  {c.where}"
            for c in moved
        ),
    ]


def _kept(plan: Plan) -> str:
    """What layers keep that are computed again in part, once where their classes keep alike."""
    found = dict.fromkeys(" ".join(words) or "inputs alone" for _, words in plan.decisions.keep)
    return "; ".join(found)


def _row(name: str, text: str) -> str:
    return f"  {name:10}{text}"


def _bar(name: str, amount: str, share: float) -> str:
    return f"  {name:14}{amount:>10}  {'#' * round(min(share, 1) * BAR):{BAR}}{share:>5.0%}"


def _pack(words: Sequence[str], between: str) -> list[str]:
    """Words joined in lines that fit beside a row's name."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(between) + len(word) > WIDTH - 12:
            lines[-1] += between.rstrip()
            lines.append(word)
        else:
            lines[-1] += between + word
    return lines


def _cut(line: str) -> str:
    """The line at 80 columns."""
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
