"""A model small enough to read, and a plan for it, made by hand."""

from __future__ import annotations

from dataclasses import replace

from cost_models.decisions import Decisions, Workload
from cost_models.ledger import BREAKDOWN, MEMORY, Collective, Estimate, RankLedger
from cost_models.sharding import Edge, Sharding
from ir.graph import Dim, Graph, Node, Parameter, Tensor, Unit, dim
from ir.text import format_graph, graph_hash
from planner.plan import Plan, Solver

TOKENS = Tensor(shape=(Dim(numerator=1, batch=1), Dim(numerator=1, seq=1)), dtype="i64")
HIDDEN = Tensor(shape=(*TOKENS.shape, dim(64)), dtype="bf16")


def weight(name: str, *shape: int) -> Parameter:
    return Parameter(name=name, tensor=Tensor(shape=tuple(dim(n) for n in shape), dtype="bf16"))


def hidden(width: int) -> Tensor:
    return Tensor(shape=(*TOKENS.shape, dim(width)), dtype="bf16")


def unit(name: str, *parameters: Parameter) -> Unit:
    """A class that multiplies by its matrices in a row, and normalises by its vectors."""
    nodes, last = [], "x"
    for p in parameters:
        module = p.name.rpartition(".")[0]
        size = [int(str(d)) for d in p.tensor.shape]
        op, attrs, outputs, refs = "linear", (), (hidden(size[0]),), (last, p.name)
        if name == "Embed":
            op, outputs, refs = "embedding", (HIDDEN,), (p.name, last)
        elif len(size) == 1:
            statistics = Tensor(shape=(*TOKENS.shape, dim(1)), dtype="f32")
            op, attrs, outputs = "rms_norm", (("dims", 1),), (HIDDEN, statistics)
        node = Node(name=f"{module}/{op}" if module else op, op=op, inputs=refs, outputs=outputs,
                    attrs=attrs)  # fmt: skip
        nodes.append(node)
        last = node.name
    ids = name == "Embed"
    return Unit(name=name, inputs=(("x", TOKENS if ids else HIDDEN),), parameters=parameters,
                nodes=tuple(nodes), outputs=(last,), diff_inputs=() if ids else ("x",))  # fmt: skip


LAYER = unit(
    "Layer",
    weight("input_layernorm.weight", 64),
    *(weight(f"self_attn.{x}_proj.weight", 64, 64) for x in "qkvo"),
    weight("post_attention_layernorm.weight", 64),
    weight("mlp.up_proj.weight", 256, 64),
    weight("mlp.down_proj.weight", 64, 256),
)
SHARDED = Sharding(
    parameters=(
        ("input_layernorm.weight", "R"),
        *((f"self_attn.{x}_proj.weight", "S(0)") for x in "qkv"),
        ("self_attn.o_proj.weight", "S(1)"),
        ("post_attention_layernorm.weight", "R"),
        ("mlp.up_proj.weight", "S(0)"),
        ("mlp.down_proj.weight", "S(1)"),
    ),
    edges=(
        Edge(at="self_attn:in", forward=("S(1)", "R"), backward=("P", "S(1)")),
        Edge(at="self_attn.o_proj/linear[0]", forward=("R", "S(2)"), backward=("S(2)", "R")),
        Edge(at="self_attn.o_proj:out", forward=("P", "S(1)"), backward=("S(1)", "R")),
        Edge(at="mlp:in", forward=("S(1)", "R"), backward=("P", "S(1)")),
        Edge(at="mlp.down_proj:out", forward=("P", "S(1)"), backward=("S(1)", "R")),
        Edge(at="return[0]", forward=("S(1)", "R"), backward=("R", "S(1)")),
    ),
)


def toy_graph(layers: int = 8, *, tied: bool = False) -> Graph:
    """embed_tokens, layers, norm, lm_head in a row."""
    embed, head = (unit(name, weight("weight", 1000, 64)) for name in ("Embed", "Head"))
    units = (embed, LAYER, unit("Norm", weight("weight", 64)), head)
    paths = [("Embed", "embed_tokens"), *(("Layer", f"layers.{i}") for i in range(layers)),
             ("Norm", "norm"), ("Head", "lm_head")]  # fmt: skip
    nodes, last = [], "ids"
    for name, path in paths:
        outputs = (hidden(1000) if name == "Head" else HIDDEN,)
        nodes.append(Node(name=path, op="call", inputs=(last,), outputs=outputs,
                          attrs=(("path", path), ("unit", name))))  # fmt: skip
        last = path
    root = Unit(name="root", inputs=(("ids", TOKENS),), parameters=(), nodes=tuple(nodes),
                outputs=(last,))  # fmt: skip
    ties = (("lm_head.weight", "embed_tokens.weight"),) if tied else ()
    return Graph(name="Toy", units=units, root=root, tied=ties, max_seq_len=2048,
                 layers=tuple(f"layers.{i}" for i in range(layers)))  # fmt: skip


DECISIONS = Decisions(
    pp=2, dp=2, tp=2, zero=3, shard=2, micro_batch=1, microbatches=8, sequence_parallel=True,
    stages=(5, 3), recompute=((0, 4), (0, 0)),
)  # fmt: skip
WORKLOAD = Workload(global_batch=16, seq_len=2048)


def toy_plan(graph: Graph | None = None, **changes: object) -> Plan:
    """A whole plan on h100x8."""
    graph = graph or toy_graph()
    plan = Plan(
        graph=graph, graph_hash=graph_hash(format_graph(graph)), hardware="h100x8",
        hardware_hash="sha256:77b1", constants_hash="sha256:c04e", workload=WORKLOAD,
        decisions=DECISIONS, shardings=(("Layer", SHARDED),), step_time_us=1500,
        peak_memory_bytes=10_000, solver=Solver(status="OPTIMAL", bound_us=1500, meshes=40,
                                                meshes_solved=3),
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


def toy_estimate(graph, cluster, workload, decisions, shardings) -> Estimate:
    """A stand-in for the cost models: time and memory shrink with tp, dp halves time."""
    compute = 8_000_000_000 // (decisions.tp * decisions.dp * decisions.pp)
    parts = dict.fromkeys(BREAKDOWN, 0) | {"compute": compute, "bubble": 500_000_000}
    memory = dict.fromkeys(MEMORY, 0) | {
        "parameters": 4000 // decisions.tp, "optimizer": 6000, "activations": 2000,
    }  # fmt: skip
    ranks = tuple(
        RankLedger(
            pp_rank=rank, parameters=2000 // decisions.tp, in_flight=(1,),
            memory_bytes=tuple((k, v - 100 * rank if v else 0) for k, v in memory.items()),
            collectives=(Collective(kind="all_gather", axis="tp", size_bytes=100, count=4,
                                    where="Layer self_attn:in", total_s=1e-4, exposed_s=1e-5),),
        )
        for rank in range(decisions.pp)
    )  # fmt: skip
    return Estimate(
        step_time_ps=sum(parts.values()), breakdown_ps=tuple(parts.items()), error=0.1,
        tokens=workload.global_batch * workload.seq_len, gpus=decisions.gpus,
        model_flop=10**15, executed_flop=11 * 10**14, peak_flop_per_s=989.4e12,
        capacity_bytes=cluster.device.memory_bytes, ranks=ranks,
        assumptions=("uncalibrated network", "balanced experts"),
    )  # fmt: skip
