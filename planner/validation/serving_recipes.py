"""What public recipes set that a table's columns do not say, and that a first token waits for.

The runs at the recipes' three loads are those of SemiAnalysis' InferenceX (Apache-2.0), whose
scripts say how each engine was started; a setting is a fact of a run, nothing is fitted here.
"""

from __future__ import annotations

# benchmarks/dsr1_fp4_b200.sh, dsr1_fp8_b200_docker.sh, qwen3.5_fp8_b200.sh: SGLang on Blackwell is
# started with --scheduler-recv-interval 30, and 10 below 16 requests: it looks for arrivals once in
# so many steps. Those on H200 (dsr1_fp8_h200.sh) are not: each step.
_LOOKED_EVERY, _LOOKED_EVERY_FEW, _FEW = 30, 10, 16
_BLACKWELL = ("b200", "b300")
# benchmarks/70b_fp8_h200_trt_slurm.sh and its likes: TensorRT-LLM at 1K/1K below tp 8 is started
# with batch_wait_timeout_iters 20: so many steps pass before prompts of fewer tokens than a step
# takes are read.
_GATHERED_STEPS = 20.0
_LLAMA_70B = "llama-3.1-70b"

# Prompt and answer of the recipes' loads.
LOADS = ((1024.0, 1024.0), (1024.0, 8192.0), (8192.0, 1024.0))


def held_steps(
    backend: str, model: str, device: str, load: tuple[float, float], tp: int, concurrency: float
) -> float:
    """Decode steps that a request is left waiting on the mean, beyond the one that runs."""
    if load not in LOADS:
        return 0.0
    if backend == "sglang" and device in _BLACKWELL:
        every = _LOOKED_EVERY if concurrency >= _FEW else _LOOKED_EVERY_FEW
        return (every - 1) / 2
    if backend == "trtllm" and model == _LLAMA_70B and load == LOADS[0] and tp < 8:
        return _GATHERED_STEPS
    return 0.0
