"""Kernels that are timed: GEMMs, attention, memory-bound chains, a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from cost_models.calibrate import Probe
from planner.runtime.probe_timer import Timer

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}

# [m, n, k]: large and square, of layers with few tokens, of few rows: what tells peak, bandwidth
# and overhead apart.
GPU_GEMMS = (
    (8192, 8192, 8192), (4096, 4096, 4096), (8192, 1024, 8192), (2048, 14336, 4096),
    (1024, 4096, 4096), (512, 8192, 8192), (256, 2048, 2048), (64, 8192, 8192), (16, 8192, 8192),
    (16, 16384, 4096),
)  # fmt: skip
CPU_GEMMS = (
    (768, 768, 768), (512, 1024, 512), (256, 1024, 1024), (64, 2048, 2048), (16, 2048, 2048),
    (128, 256, 256), (32, 128, 128),
)  # fmt: skip
GPU_ATTENTIONS = ((1, 32, 8192, 128), (4, 32, 2048, 128), (2, 16, 4096, 128), (4, 16, 4096, 64))
CPU_ATTENTIONS = ((1, 4, 512, 128), (1, 4, 256, 128), (2, 2, 512, 128), (1, 8, 512, 64))
GPU_ELEMENTS = (1 << 29, 1 << 28, 1 << 26)  # of 2 bytes: 1 GiB to 128 MiB, beyond any L2
CPU_ELEMENTS = (1 << 26, 1 << 25)  # of 4 bytes: 256 and 128 MiB, beyond most last-level caches


def gemms(timer: Timer, dtypes: tuple[str, ...], left_out: list[str]) -> Iterator[Probe]:
    """Every shape in every format; one whose kernels this build lacks is left out."""
    shapes = GPU_GEMMS if timer.device.type == "cuda" else CPU_GEMMS
    for dtype in dtypes:
        try:
            gemm_call(timer.device, dtype, shapes[-1])()
        except (RuntimeError, NotImplementedError) as fault:
            left_out.append(f"gemm {dtype}: {str(fault).splitlines()[0][:80]}")
            continue
        for shape in shapes if dtype != "fp32" or timer.device.type == "cpu" else shapes[1:6]:
            yield gemm(timer, dtype, shape)


def gemm(timer: Timer, dtype: str, shape: tuple[int, ...]) -> Probe:
    m, n, k = shape
    return Probe(
        op="gemm", dtype=dtype, shape=shape, flop=2.0 * m * n * k,
        moved_bytes=float(WIDTH[dtype] * (m * k + k * n) + max(WIDTH[dtype], 2) * m * n),
        seconds=timer.repeats(gemm_call(timer.device, dtype, shape)),
    )  # fmt: skip


def gemm_call(
    device: torch.device, dtype: str, shape: tuple[int, ...]
) -> Callable[[], torch.Tensor]:
    """A linear layer's matmul: weights [n, k], as they are stored. fp8: e4m3, one scale each."""
    m, n, k = shape
    if dtype != "fp8":
        x = torch.randn(m, k, device=device).to(TYPES[dtype])
        weight = torch.randn(n, k, device=device).to(TYPES[dtype])
        return lambda: F.linear(x, weight)
    eight = torch.float8_e4m3fn
    x8 = torch.randn(m, k, device=device).to(eight)
    w8 = torch.randn(n, k, device=device).to(eight)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        x8, w8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def attentions(timer: Timer, dtype: str) -> Iterator[Probe]:
    """Causal attention as torch picks it, forward and backward alone."""
    shapes = GPU_ATTENTIONS if timer.device.type == "cuda" else CPU_ATTENTIONS
    for batch, heads, seq, dim in shapes:
        q, k, v = (
            torch.randn(batch, heads, seq, dim, device=timer.device, dtype=TYPES[dtype])
            .requires_grad_()
            for _ in range(3)
        )  # fmt: skip
        pairs = seq * (seq + 1) / 2
        flop = 2.0 * batch * heads * pairs * 2 * dim
        moved = 4.0 * WIDTH[dtype] * batch * heads * seq * dim
        shape = (batch, heads, seq, dim)

        def forward(q=q, k=k, v=v) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        with torch.no_grad():
            seconds = timer.repeats(forward)
        yield Probe(op="attention", dtype=dtype, shape=shape, flop=flop, moved_bytes=moved,
                    seconds=seconds)  # fmt: skip
        out = forward()
        grad = torch.randn_like(out)

        def backward(out=out, grad=grad, given=(q, k, v)) -> object:  # type: ignore[no-untyped-def]
            return torch.autograd.grad(out, given, grad, retain_graph=True)

        yield Probe(op="attention_backward", dtype=dtype, shape=shape, flop=2.5 * flop,
                    moved_bytes=2 * moved, seconds=timer.repeats(backward))  # fmt: skip


def streams(timer: Timer, dtype: str, large: float) -> Iterator[Probe]:
    """A copy, a sum and a norm of what is too large for caches: bytes read and written."""
    gpu = timer.device.type == "cuda"
    for elements in GPU_ELEMENTS if gpu else CPU_ELEMENTS:
        count = max(int(elements * large), 1 << 20)
        width = 4096
        x = torch.randn(count // width, width, device=timer.device, dtype=TYPES[dtype])
        y, size = torch.empty_like(x), float(x.numel() * WIDTH[dtype])
        weight = torch.ones(width, device=timer.device, dtype=TYPES[dtype])
        calls: tuple[tuple[str, float, Callable[[], object]], ...] = (
            ("copy", 2 * size, lambda y=y, x=x: y.copy_(x)),  # type: ignore[misc]
            ("add", 3 * size, lambda y=y, x=x: torch.add(x, y, out=y)),  # type: ignore[misc]
            ("norm", 2 * size,
             lambda x=x, w=weight: F.layer_norm(x, (w.numel(),), w)),  # type: ignore[misc]
        )  # fmt: skip
        for op, moved, call in calls:
            yield Probe(op=op, dtype=dtype, shape=(x.numel(),), moved_bytes=moved,
                        seconds=timer.repeats(call))  # fmt: skip


def launch(timer: Timer) -> Iterator[Probe]:
    """One op with nothing to do, called in a row: what the host needs to launch it."""
    x = torch.zeros(16, device=timer.device)
    yield Probe(op="launch", seconds=timer.repeats(lambda: x.add_(1.0)))
