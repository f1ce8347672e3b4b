"""Training steps of one device, predicted and then run: `plan calibrate --validate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from cost_models.hardware import Cluster, load_hardware
from cost_models.units import format_bytes
from ir.errors import InfeasibleError
from planner.plan import Plan
from planner.runtime.meta import meta
from planner.runtime.parallelize import parallelize

WARM, REPEATS = 3, 7
VOCABULARY = 32000
SMALL_VOCABULARY = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One step: a decoder of so many layers, as wide, on so many tokens. engine: as --engine."""

    width: int
    layers: int
    heads: int
    batch: int
    seq_len: int
    recompute: str
    precision: str
    vocabulary: int
    engine: str = "native"

    @property
    def name(self) -> str:
        how = "compiled" if self.engine == "native-compiled" else "eager"
        return f"{self.width} wide {self.batch}x{self.seq_len} {self.recompute[:4]} {how}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTried:
    """Predicted beside measured. peak_bytes: of the device, driver and libraries included; None
    where the device does not count it."""

    name: str
    predicted_s: float
    step_s: float
    predicted_bytes: int
    peak_bytes: int | None


def trials(kind: str, quick: bool) -> tuple[Trial, ...]:
    """Several widths and batches, with and without recomputation; on a GPU one is compiled."""
    if kind == "cpu":
        widths = (128, 256) if quick else (128, 256, 512)
        batches: tuple[int, ...] = (2,) if quick else (1, 4)
        made = [
            Trial(width=w, layers=2, heads=w // 64, batch=b, seq_len=128, recompute=r,
                  precision="bf16", vocabulary=SMALL_VOCABULARY)
            for w in widths for b in batches for r in ("none", "full")
        ]  # fmt: skip
        return tuple(made)
    sizes = [(2048, 4)] if quick else [(1024, 8), (2048, 8), (4096, 6)]
    made = [
        Trial(width=w, layers=n, heads=w // 128, batch=b, seq_len=2048, recompute=r,
              precision="bf16" if torch.cuda.is_bf16_supported() else "fp16",
              vocabulary=VOCABULARY)
        for w, n in sizes for b in (1, 4) for r in ("none", "full")
    ]  # fmt: skip
    return (*made, *([] if quick else [replace(made[-2], engine="native-compiled")]))


def try_steps(
    hardware: str,
    left_out: list[str],
    *,
    quick: bool = False,
    report: Callable[[str], None] | None = None,
) -> tuple[StepTried, ...]:
    """Predict and run every trial on one device of the hardware file.

    left_out: takes a line for each that is predicted not to fit, or did not.
    """
    cluster = replace(load_hardware(hardware), count=1)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    with _world_of_one(kind):
        for trial in trials(kind, quick):
            if report:
                report(f"training step: {trial.name}")
            try:
                plan, predicted_s = predict(trial, hardware, cluster)
            except InfeasibleError:
                left_out.append(f"{trial.name}: predicted not to fit, not run")
                continue
            try:
                step_s, peak = run(trial, plan, kind)
            except torch.OutOfMemoryError:
                size = format_bytes(plan.peak_memory_bytes)
                left_out.append(f"{trial.name}: out of memory, predicted to take {size}")
                continue
            found.append(
                StepTried(
                    name=trial.name, predicted_s=predicted_s, step_s=step_s,
                    predicted_bytes=plan.peak_memory_bytes, peak_bytes=peak,
                )
            )  # fmt: skip
    return tuple(found)


def predict(trial: Trial, hardware: str, cluster: Cluster) -> tuple[Plan, float]:
    """The plan of that step, everything pinned, and its predicted seconds."""
    from ir.capture import capture_graph
    from ir.capture.module import source_of
    from planner.capturing import Clock
    from planner.decisions import parse_pins
    from planner.options import TraceOptions
    from planner.tracing import plan_graph
    from planner.workload import Asked

    source = source_of(build(trial), inputs, loss, trial.seq_len)
    asked = Asked(
        engine=trial.engine, seq_len=trial.seq_len, global_batch=trial.batch,
        precision=trial.precision, optimizer="adamw",
    )  # fmt: skip
    pins = parse_pins(
        [f"recompute={trial.recompute}", f"micro_batch={trial.batch}", "zero=0",
         f"compile={'on' if trial.engine == 'native-compiled' else 'off'}"]
    )  # fmt: skip
    options = TraceOptions(model=source.name, hardware=hardware, pins=pins, asked=asked)
    graph = capture_graph(source, precision=trial.precision)
    result = plan_graph(graph, options, cluster, Clock())
    return result.plan, result.estimate.step_time_s


def run(trial: Trial, plan: Plan, kind: str) -> tuple[float, int | None]:
    """Median seconds of a step, optimizer included, and the device's memory at its peak."""
    with meta():
        model = build(trial)
    if kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    parallel = parallelize(model, plan, device=kind)
    parallel.init(seed=0)
    optimizer = parallel.optimizer("adamw", lr=1e-4)
    ids = torch.randint(0, trial.vocabulary, (trial.batch, trial.seq_len), device=kind)
    seconds = []
    for _ in range(WARM + REPEATS):
        _wait(kind)
        start = time.perf_counter()
        parallel.step({"input_ids": ids}, ids, loss)
        optimizer.step()
        optimizer.zero_grad()
        _wait(kind)
        seconds.append(time.perf_counter() - start)
    peak = None
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        beside = total - free - torch.cuda.memory_reserved()  # context and libraries
        peak = torch.cuda.max_memory_reserved() + beside
    return statistics.median(seconds[WARM:]), peak


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _world_of_one(kind: str) -> Iterator[None]:
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


# --- the model that is run --------------------------------------------------------------------


class Layer(nn.Module):
    """Attention and a gated feed-forward part, normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        inner = width * 8 // 3 // 64 * 64
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        y = self.before(x)
        shape = (batch, seq, self.heads, width // self.heads)
        q, k, v = (part(y).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).reshape(batch, seq, width))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build(trial: Trial) -> nn.Module:
    return Decoder(trial.width, trial.layers, trial.heads, trial.vocabulary)


def inputs(batch: int, seq_len: int) -> dict[str, Any]:
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
