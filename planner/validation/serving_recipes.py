"""What public recipes set that a table's columns do not say, and that a first token waits for.

The runs at the recipes' three loads are those of SemiAnalysis' InferenceX (Apache-2.0), whose
scripts (benchmarks/single_node/*.sh; before 2026 benchmarks/*_docker.sh and *_slurm.sh) say how
each engine was started; a setting is a fact of a run, nothing is fitted here.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.serving_decisions import Serving

# Prompt and answer of the recipes' loads.
LOADS = ((1024.0, 1024.0), (1024.0, 8192.0), (8192.0, 1024.0))
_EVEN = LOADS[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """chunk_tokens: of prompts a step takes, 0 the engine's own. looked_every: decode steps between
    looks for arrivals. gathered_tokens, gathered_steps: prompts wait until a step has so many
    tokens, or for so many steps. gathered_ranks: until so many have come, one an attention
    replica, or for so many steps."""

    chunk_tokens: int = 0
    looked_every: int = 1
    gathered_tokens: float = 0.0
    gathered_ranks: int = 1
    gathered_steps: int = 0


def recipe_of(
    backend: str, version: str, model: str, device: str, precision: str,
    load: tuple[float, float], serving: Serving,
) -> Recipe:  # fmt: skip
    """The recipe of a run; of loads that are no recipe's, the engine's own defaults."""
    if load not in LOADS:
        return Recipe()
    if backend == "sglang":
        return _sglang(version, model, device, precision, serving)
    if backend == "trtllm":
        return _trtllm(version, model, device, precision, load, serving)
    return Recipe()  # vLLM's leave both as they are, or say what is the default


def _sglang(version: str, model: str, device: str, precision: str, s: Serving) -> Recipe:
    # --scheduler-recv-interval 30, and 10 below 16 requests, on Blackwell; not on H200.
    looked = 1
    if device in ("b200", "b300"):
        looked = 30 if s.batch >= 16 else 10
    # --chunked-prefill-size: dsr1_fp4_b200 (16384), dsr1_fp8_b200 (32768, 8192 on 4 GPUs),
    # dsr1_fp8_h200 and qwen3.5 on Blackwell (32768), qwen3.5_fp8_h200 (16384).
    chunk = 0
    if model.startswith("deepseek"):
        chunk = 16384 if precision == "fp4" else 8192 if s.ranks == 4 else 32768
    elif model.startswith("qwen3.5"):
        chunk = 16384 if device == "h200" else 32768
        if device == "b300" and precision == "fp8" and version.startswith("0.5.10"):
            chunk, looked = 16384, 10  # qwen3.5_fp8_b300 as it came to be
    return Recipe(chunk_tokens=chunk, looked_every=looked)


def _trtllm(
    version: str, model: str, device: str, precision: str, load: tuple[float, float], s: Serving
) -> Recipe:
    later = version.startswith(("1.2", "1.3"))
    if model.startswith("deepseek"):
        # --max_num_tokens: CONC + ISL + 64, to the next 64; in scripts of 2026 at least 8192.
        tokens = (s.batch + int(load[0]) + 127) // 64 * 64
        tokens = max(tokens, 8192) if later else tokens
        if s.attention_dp > 1:  # attention_dp_config: enable_balance, timeout_iters 60
            return Recipe(chunk_tokens=tokens, gathered_ranks=s.attention_dp, gathered_steps=60)
        # dsr1_fp8_b200_trt, DELAY_BATCHING: batch_wait_timeout_iters 40, max_tokens_ratio .8
        if later and (device, precision, load) == ("b200", "fp8", _EVEN) and s.batch >= 64:
            return Recipe(chunk_tokens=tokens, gathered_tokens=0.8 * tokens, gathered_steps=40)
        return Recipe(chunk_tokens=tokens)
    if model.startswith("gpt-oss"):
        # --max_num_tokens 20000; attention_dp_config on Blackwell without a timeout: 50, the
        # default of TensorRT-LLM's AttentionDpConfig.
        if s.attention_dp > 1 and device != "h200":
            return Recipe(chunk_tokens=20000, gathered_ranks=s.attention_dp, gathered_steps=50)
        return Recipe(chunk_tokens=20000)
    if model == "llama-3.1-70b":
        # --max_num_tokens $MAX_MODEL_LEN, prompt and answer and 200; at 1K/1K below tp 8
        # batch_wait_timeout_iters 20, batch_wait_max_tokens_ratio .9.
        tokens = int(sum(load)) + 200
        if load == _EVEN and s.tp < 8:
            return Recipe(chunk_tokens=tokens, gathered_tokens=0.9 * tokens, gathered_steps=20)
        return Recipe(chunk_tokens=tokens)
    return Recipe()
