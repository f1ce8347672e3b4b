"""What would relieve a plan of serving of what binds it: only what it has not yet, with its flag.

What the search was free to do and did not do is no relief: a wider tp is told where the plan's is
as wide as its GPUs, fewer bits where they were not allowed. More GPUs and other hosts are the
user's to buy.
"""

from __future__ import annotations

from collections.abc import Callable

from cost_models.serving_decisions import Serving
from cost_models.serving_engines import load_serving_engine, serving_engines
from planner.serving.asked import BITS, ServeAsked
from planner.serving.predict import Prediction

NOTHING = "nothing that is left to decide would help"
WORDS = ("int8", "int4")  # formats of weights of fewer bits that a flag may allow
_ATTENDS = "attention"  # the part of a step that reads the cache


def relief(p: Prediction, asked: ServeAsked) -> str:
    """Ways to have less of the bottleneck, in words; NOTHING where there is none."""
    found = [word for way in WAYS[p.bottleneck] if (word := way(p, asked))]
    return ", or ".join(found) or NOTHING


def _few_bits(p: Prediction, asked: ServeAsked) -> str:
    """Weights in fewer bits than are allowed; attention reads the cache instead."""
    if _largest(p) == _ATTENDS:
        return _few_cache_bits(p, asked)
    return _fewer(p, asked, WORDS)


def _few_bits_read(p: Prediction, asked: ServeAsked) -> str:
    """The same where a GPU reads weights: what an engine writes out first, it moves more of."""
    if _largest(p) == _ATTENDS:
        return _few_cache_bits(p, asked)
    handling = load_serving_engine(asked.engine).handling
    packed = tuple(word for word in WORDS if not handling.unpacks(word))
    if said := _fewer(p, asked, packed):
        return said
    able = _fewer(p, asked, WORDS)
    return f"{able} with kernels that read them packed (--engine vllm)" if able else ""


def _few_bits_multiplied(p: Prediction, asked: ServeAsked) -> str:
    """The same where the host multiplies: an engine that writes 4 bits out has a kernel of int8."""
    unpacks = load_serving_engine(asked.engine).handling.unpacks("int4")
    return _fewer(p, asked, WORDS[:1] if unpacks else WORDS)


def _fewer(p: Prediction, asked: ServeAsked, words: tuple[str, ...]) -> str:
    least = min(BITS[word] for word in (*asked.formats, *_formats(p.serving)))
    left = [word for word in words if BITS[word] < least]
    if not left:
        return ""
    flag = f"--max-bits {BITS[left[-1]]}" if asked.max_bits else f"--allow {','.join(left)}"
    return f"fewer bits a weight ({flag})"


def _few_cache_bits(p: Prediction, asked: ServeAsked) -> str:
    narrow = p.serving.kv not in ("bf16", "fp16") or asked.allow_kv
    return "" if narrow else "fewer bits in the cache (--allow kv:fp8)"


def _wider(p: Prediction, asked: ServeAsked) -> str:
    """Where tp spans all GPUs; where it does not, a wider one lost in the search."""
    s = p.serving
    return "tp over more GPUs" if s.tp == s.devices else ""


def _tensor_cores(p: Prediction, asked: ServeAsked) -> str:
    narrow = {"fp8", "fp8_block"} & {*asked.formats, *_formats(p.serving)} or asked.max_bits
    return "" if narrow else "a format that the tensor cores multiply quicker (--allow fp8)"


def _engine(p: Prediction, asked: ServeAsked) -> str:
    """Engines whose host takes less than half as long a step."""
    s = p.serving
    each = s.batch / s.replicas / s.attention_dp
    host_s = {
        name: e.step_host_s + e.sequence_host_s * each
        for name in serving_engines() if not (e := load_serving_engine(name)).kernel_host_s
    }  # fmt: skip
    here = load_serving_engine(asked.engine)
    now = here.step_host_s + here.sequence_host_s * each
    quick = [name for name in ("vllm", "sglang", "tensorrt-llm") if name != asked.engine
             and 2 * host_s.get(name, now) < now]  # fmt: skip
    return f"an engine with a quicker host (--engine {quick[0]})" if quick else ""


def _batch(p: Prediction, asked: ServeAsked) -> str:
    return "a larger batch (--batch)" if asked.batch and asked.objective != "latency" else ""


def _say(words: str) -> Callable[[Prediction, ServeAsked], str]:
    return lambda p, asked: words


WAYS: dict[str, tuple[Callable[[Prediction, ServeAsked], str], ...]] = {
    "compute": (_tensor_cores, _say("more GPUs")),
    "memory bandwidth": (_few_bits_read, _wider),
    "interconnect": (_say("quicker links between the GPUs"),),
    "host link": (_few_bits, _say("more GPUs, which hold more of the weights")),
    "disk": (_say("more host memory"), _few_bits),
    "host CPU": (_few_bits_multiplied, _say("more GPUs, which hold more of the weights"),
                 _say("faster host memory")),
    "host launches": (_engine, _batch),
    "capacity": (_few_cache_bits, _few_bits, _say("more GPUs")),
}  # fmt: skip


def _formats(s: Serving) -> tuple[str, ...]:
    return tuple(word for _, word in s.weights) or (s.default,)


def _largest(p: Prediction) -> str:
    return max(p.parts, key=lambda part: part[1])[0]
