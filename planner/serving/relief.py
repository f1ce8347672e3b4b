"""What would relieve a plan of serving of what binds it: only what it has not yet, with its flag.

What the search was free to do and did not do is no relief: a wider tp is told where the plan's is
as wide as its GPUs, fewer bits where they were not allowed. More GPUs and other hosts are the
user's to buy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cost_models.serving_decisions import Serving
from cost_models.serving_engines import load_serving_engine, serving_engines
from planner.serving.asked import BITS, ServeAsked
from planner.serving.predict import Prediction

Pins = Mapping[str, str]
NOTHING = "nothing that is left to decide would help"
WORDS = ("int8", "int4")  # formats of weights of fewer bits that a flag may allow
_ATTENDS = "attention"  # the part of a step that reads the cache


def relief(p: Prediction, asked: ServeAsked, pinned: Sequence[str] = ()) -> str:
    """Ways to have less of the bottleneck, in words; NOTHING where there is none. pinned: what the
    search was not free to decide, as `--fix` has it."""
    pins = dict(pin.split("=", 1) for pin in pinned)
    found = [word for way in WAYS[p.bottleneck] if (word := way(p, asked, pins))]
    return ", or ".join(found) or NOTHING


def _few_bits(p: Prediction, asked: ServeAsked, pins: Pins) -> str:
    """Weights in fewer bits than are allowed; attention reads the cache instead."""
    if _largest(p) == _ATTENDS:
        return _few_cache_bits(p, asked, pins)
    return _fewer(p, asked, pins, WORDS)


def _few_bits_read(p: Prediction, asked: ServeAsked, pins: Pins) -> str:
    """The same where a GPU reads weights: what an engine writes out first, it moves more of."""
    if _largest(p) == _ATTENDS:
        return _few_cache_bits(p, asked, pins)
    handling = load_serving_engine(asked.engine).handling
    packed = tuple(word for word in WORDS if not handling.unpacks(word))
    if said := _fewer(p, asked, pins, packed):
        return said
    able = _fewer(p, asked, pins, WORDS)
    return f"{able} with kernels that read them packed (--engine vllm)" if able else ""


def _few_bits_multiplied(p: Prediction, asked: ServeAsked, pins: Pins) -> str:
    """The same where the host multiplies: an engine that writes 4 bits out has a kernel of int8."""
    unpacks = load_serving_engine(asked.engine).handling.unpacks("int4")
    return _fewer(p, asked, pins, WORDS[:1] if unpacks else WORDS)


def _fewer(p: Prediction, asked: ServeAsked, pins: Pins, words: tuple[str, ...]) -> str:
    least = min(BITS[word] for word in (*asked.formats, *_formats(p.serving)))
    left = [word for word in words if BITS[word] < least]
    if not left:
        return ""
    flag = f"--max-bits {BITS[left[-1]]}" if asked.max_bits else f"--allow {','.join(left)}"
    if "weights" in pins:
        flag = f"--fix weights={left[0]}"
    return f"fewer bits a weight ({flag})"


def _few_cache_bits(p: Prediction, asked: ServeAsked, pins: Pins) -> str:
    narrow = p.serving.kv not in ("bf16", "fp16") or (asked.allow_kv and "kv" not in pins)
    flag = "--fix kv=fp8" if "kv" in pins else "--allow kv:fp8"
    return "" if narrow else f"fewer bits in the cache ({flag})"


def _wider(p: Prediction, asked: ServeAsked, pins: Pins) -> str:
    """Where tp spans all GPUs, or is pinned; else a wider one lost in the search."""
    s = p.serving
    if s.tp == s.devices:
        return "tp over more GPUs"
    return f"a wider tp than is pinned (--fix tp={s.tp})" if "tp" in pins else ""


def _unpinned(p: Prediction, asked: ServeAsked, pins: Pins) -> str:
    """Where what lies below the GPU was not the search's to decide."""
    named = [f"--fix {name}={pins[name]}" for name in ("offload", "kv_tier")
             if pins.get(name, "none") not in ("none", "gpu")]  # fmt: skip
    return f"leaving where it lies to the search (without {' '.join(named)})" if named else ""


def _tensor_cores(p: Prediction, asked: ServeAsked, pins: Pins) -> str:
    narrow = {"fp8", "fp8_block"} & {*asked.formats, *_formats(p.serving)} or asked.max_bits
    return "" if narrow else "a format that the tensor cores multiply quicker (--allow fp8)"


def _engine(p: Prediction, asked: ServeAsked, pins: Pins) -> str:
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


def _batch(p: Prediction, asked: ServeAsked, pins: Pins) -> str:
    return "a larger batch (--batch)" if asked.batch and asked.objective != "latency" else ""


def _say(words: str) -> Callable[[Prediction, ServeAsked, Pins], str]:
    return lambda p, asked, pins: words


WAYS: dict[str, tuple[Callable[[Prediction, ServeAsked, Pins], str], ...]] = {
    "compute": (_tensor_cores, _say("more GPUs")),
    "memory bandwidth": (_few_bits_read, _wider),
    "interconnect": (_say("quicker links between the GPUs"),),
    "host link": (_unpinned, _few_bits, _say("more GPUs, which hold more of the weights")),
    "disk": (_unpinned, _say("more host memory"), _few_bits),
    "host CPU": (_unpinned, _few_bits_multiplied, _say("more GPUs, which hold more of the weights"),
                 _say("faster host memory")),
    "host launches": (_engine, _batch),
    "capacity": (_few_cache_bits, _few_bits, _say("more GPUs")),
}  # fmt: skip


def _formats(s: Serving) -> tuple[str, ...]:
    return tuple(word for _, word in s.weights) or (s.default,)


def _largest(p: Prediction) -> str:
    return max(p.parts, key=lambda part: part[1])[0]
