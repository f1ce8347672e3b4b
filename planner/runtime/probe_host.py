"""What serving asks of the host: products on the CPU, a piece fetched, the calls of a step.

Products run over weights that no cache holds, as a step's do: one copy after another. The calls
are those of a small Hugging Face Llama's own `generate`, so small that little else is in them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cost_models.calibrate import Probe
from planner.runtime.probe_kernels import TYPES, WIDTH
from planner.runtime.probe_timer import Timer, undisturbed
from planner.runtime.serve.bytes import InMemory, as_bytes, block_of
from planner.runtime.serve.lent import Place, Spec, lent, parameter, views
from planner.runtime.serve.ring import Ring

# [rows, columns, inner]: a token, few requests, prompts; and as many weights in many short columns,
# in few long ones. A call takes ten times what it costs to make.
WEIGHTS = 1 << 20
PRODUCTS = (
    *((rows, 1024, 1024) for rows in (1, 2, 8, 32, 128, 256)),
    (1, 4096, 256), (8, 4096, 256), (1, 256, 4096), (8, 256, 4096),
)  # fmt: skip
CACHED = (1, 1024, 1024)
ROTATED_BYTES = 1 << 28  # of all copies, several times a last-level cache
FETCHED_BYTES = 1 << 12
PIECES, PIECE_WEIGHTS = 6, 3  # blocks of a ring; weights of one, as a gated MLP has
LAYERS = (4, 8)  # the difference is of layers, the rest of a token
# Of those layers. On a CPU their weights pass through the caches between the calls, as a real
# model's do, and those of the fewer layers are more than a last level holds; a GPU must wait for
# its host.
WIDTHS = {"cpu": 512, "cuda": 64}
TOKENS, TURNS = 16, 6


def host_probes(timer: Timer, large: float, left_out: list[str]) -> Iterator[Probe]:
    """Everything; what cannot be measured is named in left_out."""
    yield from products(timer.on_host, max(int(ROTATED_BYTES * large), 1 << 26))
    yield fetch(timer)
    yield pieces(timer)
    yield from calls(timer, left_out)


def products(timer: Timer, rotated_bytes: int) -> Iterator[Probe]:
    """Rows times a weight on the CPU: "product" [rows, columns, inner]; "cached", one weight again
    and again."""
    for dtype in ("fp32", "bf16"):
        width = WIDTH[dtype]
        held = [torch.randn(WEIGHTS).to(TYPES[dtype])
                for _ in range(rotated_bytes // (WEIGHTS * width))]  # fmt: skip
        asked = [*(("product", shape, held) for shape in PRODUCTS), ("cached", CACHED, held[:1])]
        for op, (rows, columns, inner), weights in asked:
            x = torch.randn(rows, inner).to(TYPES[dtype])
            turn = cycle([w.view(columns, inner) for w in weights])
            yield Probe(
                op=op, dtype=dtype, shape=(rows, columns, inner), flop=2.0 * rows * WEIGHTS,
                moved_bytes=float((WEIGHTS + rows * (columns + inner)) * width),
                seconds=timer.repeats(partial(_product, x, turn)),
            )  # fmt: skip


def _product(x: torch.Tensor, weights: Iterator[torch.Tensor]) -> torch.Tensor:
    return F.linear(x, next(weights))


def fetch(timer: Timer) -> Probe:
    """A small piece of host memory to the device, asked for and waited for."""
    host = torch.ones(FETCHED_BYTES, dtype=torch.uint8)
    there = torch.empty(FETCHED_BYTES, dtype=torch.uint8, device=timer.device)
    host = host.pin_memory() if timer.device.type == "cuda" else host

    def call() -> None:
        there.copy_(host, non_blocking=True)
        if timer.device.type == "cuda":
            torch.cuda.synchronize(timer.device)

    return Probe(op="fetch", moved_bytes=float(FETCHED_BYTES), seconds=timer.on_host.repeats(call))


def pieces(timer: Timer) -> Probe:
    """A unit's streamed weights, small ones in host memory: asked of the runtime's own ring, waited
    for and put in their places."""
    specs = [Spec.of((8, 8), torch.float32, "")] * PIECE_WEIGHTS
    weights = [torch.ones(8, 8) for _ in specs]
    pinned = timer.device.type == "cuda"
    ring = Ring(
        [block_of([InMemory(as_bytes(w)) for w in weights], pinned=pinned)
         for _ in range(PIECES)], timer.device,
    )  # fmt: skip
    modules = [torch.nn.Linear(8, 8) for _ in specs]
    places, turn = [Place(m, "weight") for m in modules], cycle(range(PIECES))
    empty = [parameter(spec.placeholder()) for spec in specs]

    def call() -> None:
        with ring.use(next(turn)) as slot:
            given = [parameter(v) for v in views(specs, ring.memory(slot))]
            with lent(places, given, empty):
                pass

    try:
        return Probe(op="piece", seconds=timer.on_host.repeats(call))
    finally:
        ring.close()


def calls(timer: Timer, left_out: list[str]) -> Iterator[Probe]:
    """"token" and "request" [layers, ops]: seconds of a greedy token of small fp32 models, and of a
    call of `generate` before its first step; and the ops that their layers run, views apart.
    flop, moved_bytes and a third number, columns: of a token's products, where they are a part of
    the seconds."""
    try:
        import transformers
    except ImportError:
        left_out.append("host time of a step: transformers is not installed")
        return
    on_cpu = timer.device.type == "cpu"
    width = WIDTHS["cpu" if on_cpu else "cuda"]
    for layers in LAYERS:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, vocab_size=256,
            max_position_embeddings=64, bos_token_id=0, eos_token_id=None, pad_token_id=0,
        )).eval().to(timer.device)  # fmt: skip
        ids = torch.zeros(1, 1, dtype=torch.long, device=timer.device)
        starts, others = [], []
        for _ in range(TURNS):
            start, steps = token_times(model, ids, TOKENS)
            starts.append(start)
            others += steps[2:]  # the first ones allocate
        products = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        weights, columns = (sum(f(w) for w in products) for f in (torch.numel, len))
        shape = (layers, _layer_ops(model, ids))
        yield Probe(
            op="token", shape=(*shape, columns * on_cpu), flop=2.0 * weights * on_cpu,
            moved_bytes=4.0 * weights * on_cpu,
            seconds=undisturbed(others) if on_cpu else tuple(others),
        )  # fmt: skip
        yield Probe(op="request", shape=shape,
                    seconds=undisturbed(starts) if on_cpu else tuple(starts))  # fmt: skip


def token_times(model: Any, ids: torch.Tensor, count: int) -> tuple[float, list[float]]:
    """Seconds of a greedy answer: from the call to the first step, and of each token."""
    ends: list[float] = []

    def begin(*_: Any) -> None:
        if not ends:
            ends.append(time.perf_counter())

    def end(found: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if found.device.type == "cuda":
            torch.cuda.synchronize(found.device)
        ends.append(time.perf_counter())
        return torch.zeros(len(found), dtype=torch.bool, device=found.device)

    handle = model.register_forward_pre_hook(begin)
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                   pad_token_id=0, stopping_criteria=[end])  # fmt: skip
    handle.remove()
    return ends[0] - start, [after - before for before, after in pairwise(ends)]


class _Ops(TorchDispatchMode):
    """Counts what is dispatched and is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(out.alias_info for out in func._schema.returns)
        return func(*args, **(kwargs or {}))


def _layer_ops(model: Any, ids: torch.Tensor) -> int:
    """Ops that the layers run, together."""
    counted = []
    for layers in (model.model.layers, model.model.layers[:0]):
        held, model.model.layers = model.model.layers, layers
        kept, model.config.num_hidden_layers = model.config.num_hidden_layers, len(layers)
        with _Ops() as ops:
            model(ids)
        model.model.layers, model.config.num_hidden_layers = held, kept
        counted.append(ops.count)
    return counted[0] - counted[1]

