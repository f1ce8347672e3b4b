"""Small models served by `planner.serve` on this machine as a device, predicted against measured.

    plan calibrate --quick --disk . -o host.toml
    python benchmarks/serve_small.py --hardware host.toml [--folder DIR] [--json]

A CPU's hardware file stands for the device: its "GPU memory" is what the plan leaves resident, its
host link a copy in memory, its disk the file's own. Each row serves a Llama or an MoE (100-200 MB
in fp32) with its layers where the row says, and times the tokens of greedy `generate`: the first
(a call's own time and the prompt), and the others (decode steps). Reads of a disk row are not the
page cache's: it is asked to drop the file before each step, which is not counted. What else runs on
the machine only adds time, so the fastest third counts, as in `plan calibrate`; the rows of one try
go round. Where other programs have the cores throughout, `--cpu` has the seconds that the thread
itself ran: of rows that wait for nothing, on one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import planner
from cost_models.hardware import load_hardware
from cost_models.serving_decisions import Held
from planner.runtime.probe_timer import undisturbed
from planner.serving.plan import ServingPlan
from planner.serving.tracing import recosted

PROMPT, OUTPUT = 64, 10
TRIES = 6
Clock = Callable[[], float]
ROWS = {
    "llama": {
        "resident": (),
        "mlp from RAM": (Held(block="mlp", tier="cpu", place="stream"),),
        "half the mlp from RAM": (Held(block="mlp", tier="cpu", place="stream", resident=4),),
        "mlp from disk": (Held(block="mlp", tier="nvme", place="stream"),),
    },
    "moe": {
        "resident": (),
        "experts from RAM": (Held(block="routed_experts", tier="cpu", place="stream"),),
        "experts from disk": (Held(block="routed_experts", tier="nvme", place="stream"),),
    },
}


def llama() -> Any:
    """103 MB of layers: 8 of width 512."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=4096, max_position_embeddings=256,
    ))  # fmt: skip


def moe() -> Any:
    """200 MB: 4 layers of 16 experts, 2 a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=4096, num_local_experts=16, num_experts_per_tok=2,
        sliding_window=None, max_position_embeddings=256,
    ))  # fmt: skip


def _inputs(batch: int, seq_len: int) -> dict[str, Any]:
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


class _Dropped:
    """Has the page cache drop a folder's files before each step; the seconds that took."""

    def __init__(self, model: nn.Module, folder: Path, clock: Clock) -> None:
        self.folder, self.clock, self.seconds = folder, clock, 0.0
        model.register_forward_pre_hook(self.drop)

    def drop(self, *_: Any) -> None:
        start = self.clock()
        for path in self.folder.rglob("*.safetensors"):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        self.seconds = self.clock() - start


def _plan(model: nn.Module, hardware: str) -> ServingPlan:
    return planner.trace_serving(model, _inputs, hardware=hardware, precision="fp32",
                                 prompt=PROMPT, output=OUTPUT, batch=1)  # fmt: skip


def measure(
    kind: str, hardware: str, folder: Path, tries: int, clock: Clock
) -> list[dict[str, Any]]:
    """Every row of a model: predicted, then measured in turns."""
    torch.manual_seed(0)
    model = {"llama": llama, "moe": moe}[kind]().eval()
    plan, cluster = _plan(model, hardware), load_hardware(hardware)
    ids = torch.randint(0, 4096, (1, PROMPT))
    made, rows = [], []
    for name, tiers in ROWS[kind].items():
        one = replace(plan, serving=replace(plan.serving, tiers=tiers))
        found = recosted(one, cluster)
        where = folder / f"{kind}-{len(made)}"
        served = planner.serve(copy.deepcopy(model), one, folder=where, device="cpu")
        on_disk = any(h.tier != "cpu" for h in tiers)
        dropped = _Dropped(served, where, clock) if on_disk else None
        made.append((served, dropped))
        rows.append({
            "model": kind, "weights": name, "decode_s": found.decode_s, "prompt_s": found.ttft_s,
            "stream_s": dict(found.parts).get("stream", 0.0), "bottleneck": found.bottleneck,
            "parts": dict(found.parts), "prompt_parts": dict(found.prefill_parts),
        })  # fmt: skip
    firsts: list[list[float]] = [[] for _ in made]
    others: list[list[float]] = [[] for _ in made]
    waits: list[float] = [0.0 for _ in made]
    for turn in range(tries + 1):
        for at, (served, dropped) in enumerate(made):
            before = _waited(served)
            first, *rest = token_times(served, ids, clock, dropped)
            if turn:  # the first warms allocators and the order of the ring
                firsts[at].append(first)
                others[at] += rest
                waits[at] += (_waited(served) - before) / OUTPUT / tries
    for row, first_s, other_s, waited in zip(rows, firsts, others, waits, strict=True):
        row |= {
            "measured_decode_s": statistics.median(undisturbed(other_s)),
            "measured_prompt_s": statistics.median(undisturbed(first_s)), "waited_s": waited,
        }  # fmt: skip
    return rows


def token_times(
    model: Any, ids: torch.Tensor, clock: Clock, dropped: _Dropped | None
) -> list[float]:
    """Seconds of each token of an answer, the first from the call on; dropping apart."""
    spent: list[float] = []

    def end(found: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        spent.append(clock())
        if dropped:
            apart.append(dropped.seconds)
        return torch.zeros(len(found), dtype=torch.bool)

    apart: list[float] = []
    start = clock()
    model.generate(ids, max_new_tokens=OUTPUT, min_new_tokens=OUTPUT, do_sample=False,
                   pad_token_id=0, stopping_criteria=[end])  # fmt: skip
    steps = [after - before for before, after in pairwise([start, *spent])]
    return [s - a for s, a in zip(steps, apart, strict=True)] if dropped else steps


def _waited(served: Any) -> float:
    """Seconds that units waited for streamed weights so far."""
    return sum(ring.report.waited_s for ring in served.served.loaded.rings)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--folder", default=".", help="on the disk that was calibrated")
    parser.add_argument("--model", choices=tuple(ROWS), default=None)
    parser.add_argument("--tries", type=int, default=TRIES)
    parser.add_argument("--cpu", action="store_true", help="seconds that the thread ran")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        for kind in [asked.model] if asked.model else ROWS:
            rows += measure(kind, asked.hardware, Path(folder), asked.tries,
                            time.thread_time if asked.cpu else time.perf_counter)  # fmt: skip
    if asked.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'model, weights':28}{'decode':>9}{'measured':>10}{'ratio':>7}"
          f"{'prompt':>9}{'measured':>10}{'ratio':>7}{'stream':>9}{'waited':>9}  ms")
    for r in rows:
        name = f"{r['model']}, {r['weights']}"
        numbers = [r["decode_s"], r["measured_decode_s"], r["prompt_s"], r["measured_prompt_s"]]
        d, md, p, mp = (1e3 * x for x in numbers)
        print(f"{name:28}{d:9.1f}{md:10.1f}{d / md:7.2f}{p:9.1f}{mp:10.1f}{p / mp:7.2f}"
              f"{1e3 * r['stream_s']:9.1f}{1e3 * r['waited_s']:9.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
