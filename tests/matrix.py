"""Every model under every kind of plan: planned by the planner, run by the runtime, compared.

    python tests/matrix.py                    # all of it; make matrix
    python tests/matrix.py llama              # one model
    python tests/matrix.py moe:ep2 -v         # one cell, with the traceback
    python tests/matrix.py :tp2               # one layout of all models

A cell plans the whole model on simulated GPUs with the layout's pins, then does what `plan verify`
does. It passes, or the planner refuses it with a reason, which is printed. A plan that the runtime
refuses, or computes wrongly, is a failure.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from cost_models.hardware import load_hardware
from ir.errors import PlanError
from planner.capturing import Clock, capture
from planner.decisions import parse_pins
from planner.options import TraceOptions
from planner.plan import Plan
from planner.tracing import plan_graph
from planner.workload import Asked

EXAMPLES = Path(__file__).parents[1] / "examples"
LARGE = 10**14  # bytes of memory on a simulated GPU: what is tested is not what fits

# --- models -------------------------------------------------------------------------------------

HF_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
    "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
HF_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 2048,
    "intermediate_size": 7168, "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    "sliding_window": None, "torch_dtype": "bfloat16",
}  # fmt: skip
HF_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32,
    "head_dim": 128, "num_hidden_layers": 16, "num_key_value_heads": 4, "vocab_size": 151936,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
    "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
}  # fmt: skip
CONFIGS = {"hf-llama": HF_LLAMA, "hf-mixtral": HF_MIXTRAL, "hf-qwen3-moe": HF_QWEN3_MOE}
FILES = {
    "llama": "size=8b", "gpt": "size=1.3b", "moe": "size=8b-a1b", "dit": "size=xl/2",
    # at sizes where no layout is good, the cheapest are odd
    "llama-tiny": "size=tiny", "gpt-tiny": "size=tiny", "moe-tiny": "size=tiny",
    "dit-tiny": "size=tiny",
}  # fmt: skip
ODD = ("tp2", "tp2-sp", "tp2-zero3", "pp2-tp2-sp", "cp2-ring-tp2-sp", "ep2-tp2-sp", "ep2-etp2")
MODELS = (*FILES, *CONFIGS)
WITH_EXPERTS = ("moe", "moe-tiny", "hf-mixtral", "hf-qwen3-moe")


@functools.cache
def model_of(name: str) -> tuple[str, dict[str, str]]:
    """(MODEL, arguments) as `plan trace` takes them."""
    if name in FILES:
        file = name.removesuffix("-tiny")
        return str(EXAMPLES / f"{file}.py"), dict([FILES[name].split("=")])
    folder = Path(tempfile.mkdtemp(prefix="meshwright-matrix-")) / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return str(folder), {}


# --- layouts ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A kind of plan: GPUs and pins; axes that no pin names are 1, dp is what is left."""

    name: str
    gpus: int
    pins: str
    seq_len: int = 1024
    experts: bool = False


def _layouts() -> tuple[Layout, ...]:
    def row(name: str, gpus: int, pins: str, seq_len: int = 1024) -> Layout:
        return Layout(name=name, gpus=gpus, pins=pins, seq_len=seq_len, experts="ep=" in pins)

    split = "compile=off"
    return (
        *(row(f"zero{z}", 2, f"zero={z}") for z in range(4)),
        row("zero3-reshard", 2, "zero=3 reshard=on"),
        *(row(f"hsdp-zero{z}", 4, f"zero={z} shard=2") for z in (1, 2, 3)),
        row("tp2", 2, "tp=2 sequence_parallel=off"),
        row("tp2-sp", 2, "tp=2 sequence_parallel=on"),
        row("tp8-sp", 8, "tp=8 sequence_parallel=on"),
        row("tp16", 16, "tp=16 sequence_parallel=off"),
        row("tp2-zero3", 4, "tp=2 zero=3"),
        row("tp2-sp-hsdp", 8, "tp=2 sequence_parallel=on zero=3 shard=2"),
        *(row(f"pp2-{s}", 2, f"pp=2 schedule={s} {split}") for s in ("gpipe", "1f1b", "zbh1")),
        *(row(f"pp2-{s}", 2, f"pp=2 schedule={s} virtual_stages=2 {split}")
          for s in ("interleaved", "zbv", "dualpipev")),
        row("pp2-uneven", 2, "pp=2 schedule=1f1b", 1024),
        *(row(f"pp2-zero{z}", 4, f"pp=2 schedule=1f1b zero={z}") for z in (0, 1, 2, 3)),
        row("pp2-zbv-zero3", 4, f"pp=2 schedule=zbv virtual_stages=2 zero=3 {split}"),
        row("pp2-tp2-sp", 4, "pp=2 tp=2 sequence_parallel=on schedule=1f1b"),
        row("pp2-tp2-interleaved", 4, "pp=2 tp=2 sequence_parallel=on schedule=interleaved"
            " virtual_stages=2"),
        row("pp2-recompute", 2, "pp=2 schedule=1f1b recompute=full:1"),
        row("pp2-dp2-tp2-sp", 8, "pp=2 tp=2 sequence_parallel=on schedule=interleaved"
            " virtual_stages=2 zero=1"),
        row("pp2-dp2-tp2-recompute", 8, "pp=2 tp=2 schedule=1f1b zero=3 recompute=full:1"),
        *(row(f"cp2-{k}", 2, f"cp=2 cp_kind={k}", 8192) for k in ("ring", "allgather", "ulysses")),
        row("cp4-ring", 4, "cp=4 cp_kind=ring", 8192),
        *(row(f"cp2-{k}-tp2-sp", 4, f"cp=2 cp_kind={k} tp=2 sequence_parallel=on", 8192)
          for k in ("ring", "allgather", "ulysses")),
        row("cp2-dp2-zero3", 4, "cp=2 cp_kind=ring zero=3", 8192),
        row("cp2-tp2", 4, "cp=2 cp_kind=ring tp=2 sequence_parallel=off", 8192),
        row("cp2-selective", 2, "cp=2 cp_kind=allgather recompute=selective", 8192),
        row("pp2-cp2", 4, "pp=2 cp=2 cp_kind=ring schedule=1f1b", 8192),
        row("pp2-cp2-tp2", 8, "pp=2 cp=2 tp=2 cp_kind=ring schedule=1f1b", 8192),
        row("dp2-cp2-tp2-selective", 8, "cp=2 tp=2 cp_kind=allgather zero=2 recompute=selective",
            8192),
        row("ep2", 2, "ep=2 zero=1"),
        row("ep2-zero3", 4, "ep=2 zero=3"),
        row("ep4", 4, "ep=4 zero=0"),
        row("ep2-hsdp", 8, "ep=2 zero=3 shard=2"),
        row("etp2", 2, "ep=1 etp=2 zero=1"),
        row("ep2-etp2", 4, "ep=2 etp=2 zero=3"),
        row("ep2-tp2-sp", 4, "ep=2 tp=2 sequence_parallel=on zero=1"),
        row("ep2-tp2", 4, "ep=2 tp=2 sequence_parallel=off zero=1"),
        row("ep4-tp2-sp", 4, "ep=4 tp=2 sequence_parallel=on zero=1"),
        row("ep2-pp2", 4, "ep=2 pp=2 schedule=1f1b zero=1"),
        row("ep2-cp2", 4, "ep=2 cp=2 cp_kind=allgather zero=1", 8192),
        row("ep2-full", 2, "ep=2 zero=1 recompute=full"),
        row("ep2-selective", 2, "ep=2 zero=1 recompute=selective"),
        row("pp2-dp2-tp2-ep2", 8, "pp=2 tp=2 ep=2 schedule=1f1b zero=1 sequence_parallel=on"),
        *(row(f"{r}", 2, f"zero=3 recompute={r}") for r in ("selective", "full")),
        row("mixed-recompute", 2, "zero=3 recompute=full:1+selective:1"),
        *(row(f"tp2-sp-{r}", 2, f"tp=2 sequence_parallel=on recompute={r}")
          for r in ("selective", "full")),
        *(row(f"offload-{w}-{t}", 2, f"zero={1 + 2 * (w != 'optimizer')} offload={w}:{t}")
          for w, t in (("optimizer", "cpu"), ("optimizer", "nvme"), ("params", "cpu"),
                       ("activations", "cpu"))),
        row("offload-all", 4, "tp=2 zero=1 offload=optimizer:cpu,activations:cpu"),
        row("offload-layers-pp2", 2, "pp=2 schedule=1f1b zero=1 offload=activations:cpu:1"),
        row("offload-pp2", 4, "pp=2 schedule=1f1b zero=1 offload=optimizer:cpu"),
        row("compile-zero3", 2, "zero=3 compile=on"),
        row("compile-zero3-full", 2, "zero=3 compile=on recompute=full"),
        row("compile-tp2-sp", 2, "tp=2 sequence_parallel=on compile=on"),
        row("compile-tp2-zero3-full", 4, "tp=2 zero=3 compile=on recompute=full"),
        row("compile-pp2", 2, "pp=2 schedule=1f1b compile=on"),
        row("compile-ep2", 2, "ep=2 zero=1 compile=on"),
        row("compile-cp2", 2, "cp=2 cp_kind=ring compile=on", 8192),
    )  # fmt: skip


LAYOUTS = _layouts()


# --- cells --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A model under a layout."""

    model: str
    layout: Layout

    @property
    def name(self) -> str:
        return f"{self.model}:{self.layout.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """passed, refused (with the planner's reason) or failed."""

    cell: Cell
    status: str
    words: str
    seconds: float
    trace: str = ""


def cells() -> tuple[Cell, ...]:
    """All of them, but layouts of experts for models without, and few for odd ones."""
    return tuple(
        Cell(model=model, layout=layout)
        for model in MODELS for layout in LAYOUTS
        if (not layout.experts or model in WITH_EXPERTS)
        and (layout.name in ODD or not model.endswith("-tiny"))
    )  # fmt: skip


def subset() -> tuple[Cell, ...]:
    """Cells that together have every pin, every two pins that meet, every three axes that do, and
    every model under each kind of axis: those that cover most of what is left, for their cost,
    first."""
    left = [c for c in cells() if not (c.model.startswith("dit") and {"pp", "cp"} & _keys(c))]
    wanted = set().union(*map(_covered, left))
    chosen: list[Cell] = []
    while wanted:
        cell = max(left, key=lambda c: len(_covered(c) & wanted) / _cost(c))
        wanted -= _covered(cell)
        chosen.append(cell)
    for cell in sorted(chosen, key=_cost, reverse=True):  # what later ones made superfluous
        others = set().union(*(_covered(c) for c in chosen if c is not cell))
        if _covered(cell) <= others:
            chosen.remove(cell)
    # those of one mesh together: its process groups stay, and what torch found out of them
    return tuple(sorted(chosen, key=lambda c: (*_sizes(c).values(), c.model, c.layout.name)))


@functools.cache
def _cost(cell: Cell) -> int:
    """Half seconds of CPU of a cell, about: two to plan, one a rank of its twin, two a rank of tp
    (torch finds every operation's shardings), four times as much to compile."""
    sizes = {axis: min(2, size) for axis, size in _sizes(cell).items()}  # as a twin has them
    blocks = sizes["pp"] * sizes.pop("ep") * sizes.pop("etp")
    ranks = max(blocks, prod(sizes.values()) * (2 if "shard" in _keys(cell) else 1))
    return 2 + ranks * sizes["tp"] * (4 if "compile" in _keys(cell) else 1)


def _sizes(cell: Cell) -> dict[str, int]:
    """The axes of a cell's mesh, and the blocks of experts."""
    given = dict(pin.split("=", 1) for pin in cell.layout.pins.split())
    sizes = {axis: int(given.get(axis, 1)) for axis in ("pp", "cp", "tp", "ep", "etp")}
    dense = sizes["pp"] * sizes["cp"] * sizes["tp"]
    return {**sizes, "dp": cell.layout.gpus // dense}


def _keys(cell: Cell) -> set[str]:
    pins = (pin.partition("=") for pin in cell.layout.pins.split())
    return {key for key, _, value in pins if value != "off"}


@functools.cache
def _covered(cell: Cell) -> set[tuple[str, ...]]:
    """What a cell is the proof of."""
    keys = sorted(_keys(cell))
    axes = {"pp", "cp", "tp", "ep", "zero", "recompute"} & set(keys)
    mesh = [axis for axis, size in _sizes(cell).items() if size > 1 and axis != "etp"]
    return {
        *itertools.combinations(mesh, 3),
        *((pin,) for pin in cell.layout.pins.split() if not pin.endswith("=off")),
        *itertools.combinations(keys, 2),
        *((cell.model, axis) for axis in axes),
    }


def plan_of(cell: Cell) -> Plan:
    """The planner's own plan under the layout's pins. Raises PlanError where it refuses."""
    layout = cell.layout
    given = dict(pin.split("=", 1) for pin in layout.pins.split())
    pins = {"pp": "1", "tp": "1", "cp": "1", "ep": "1", "etp": "1", "recompute": "none",
            "offload": "none", "compile": "off", **given}  # fmt: skip
    if "zero" not in pins and "dp" not in pins:
        pins["zero"] = "0"
    model, args = model_of(cell.model)
    graph = _graph(cell.model)
    if not graph.seq_in_input:
        seq_len, batch = None, 64
    else:
        seq_len, batch = min(layout.seq_len, graph.max_seq_len or layout.seq_len), 64
    cluster = load_hardware(f"h100x{layout.gpus}")
    cluster = replace(cluster, device=replace(cluster.device, memory_bytes=LARGE))
    compiled = "-compiled" if pins["compile"] == "on" else ""
    options = TraceOptions(
        model=model, hardware=f"h100x{layout.gpus}", args=tuple(args.items()), cache=False,
        pins=parse_pins([f"{key}={value}" for key, value in pins.items()]), effort=20,
        asked=Asked(engine=f"native{compiled}", seq_len=seq_len, global_batch=batch,
                    precision="bf16"),
    )  # fmt: skip
    return plan_graph(graph, options, cluster, Clock()).plan


@functools.cache
def _graph(model: str):
    spec, args = model_of(model)
    options = TraceOptions(model=spec, hardware="h100x8", args=tuple(args.items()),
                           asked=Asked(precision="bf16"))  # fmt: skip
    return capture(options)


def run(world, cell: Cell, compile_backend: str = "inductor") -> Outcome:
    """Plan the cell and verify the plan."""
    from planner.runtime.verify.run import verify_twin
    from planner.runtime.verify.twin import make_twins

    start = time.perf_counter()

    def outcome(status: str, words: str, trace: str = "") -> Outcome:
        return Outcome(cell=cell, status=status, words=words, trace=trace,
                       seconds=time.perf_counter() - start)  # fmt: skip

    try:
        plan = plan_of(cell)
    except PlanError as fault:
        return outcome("refused", fault.why.splitlines()[0] if fault.why else fault.what)
    except Exception as fault:
        return outcome("FAILED", f"planning: {fault!r}", traceback.format_exc())
    try:
        twins = make_twins(plan, *model_of(cell.model), {}, 16)
        found = [verify_twin(world, twin, compile_backend) for twin in twins]
    except PlanError as fault:
        return outcome("FAILED", fault.what, "\n".join(fault.lines()))
    bad = [d for c in found for d in c.differences]
    ranks = "+".join(str(t.plan.decisions.gpus) for t in twins)
    if bad:
        worst = max(bad, key=lambda d: d.error)
        return outcome("FAILED", f"{worst.what} of {worst.name or 'the step'}: {worst.error:.1e}",
                       "\n".join(map(str, bad)))  # fmt: skip
    error = max(c.worst("gradient").gradient for c in found)
    ops = sum(n for c in found for _, _, n in c.replicated)
    notes = "".join(f"; {note}" for t in twins for note in t.notes)
    notes += "".join(f"; {unit} uncompiled: {why}" for c in found for unit, why in c.uncompiled)
    whole = f", {ops} ops whole" if ops else ""
    return outcome("passed", f"{error:.0e} on {ranks} ranks{whole}{notes}")


def main(arguments: list[str]) -> int:
    from planner.runtime.world import PRELOAD_COMPILED, PRELOAD_HF, local_world

    wanted = [a for a in arguments if not a.startswith("-")]
    chosen = subset() if "--subset" in arguments else cells()
    if wanted:
        chosen = tuple(c for c in cells() if any(_named(c, w) for w in wanted))
    counts = dict.fromkeys(("passed", "refused", "FAILED"), 0)
    start = time.perf_counter()
    with local_world(PRELOAD_HF + PRELOAD_COMPILED) as world:
        for cell in chosen:
            found = run(world, cell)
            counts[found.status] += 1
            words = found.words if "-v" in arguments else found.words[:110]
            print(f"{cell.name:36}{found.status:9}{found.seconds:5.1f} s  {words}", flush=True)
            if found.trace and "-v" in arguments:
                print(found.trace)
    print(", ".join(f"{n} {word}" for word, n in counts.items())
          + f" in {time.perf_counter() - start:.0f} s")  # fmt: skip
    return 1 if counts["FAILED"] else 0


def _named(cell: Cell, word: str) -> bool:
    model, _, layout = word.partition(":")
    return model in ("", cell.model) and layout in ("", cell.layout.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
