"""What is trained: a run's model as arguments of `cost_models/validation/models.py`."""

from __future__ import annotations

import re
from typing import Any

from planner.validation.rows import Run, Skipped

Args = dict[str, Any]

# What tables leave out of a kind of model: (the kind, words of its name, arguments).
_GPT: Args = {"family": "gpt", "activation": "gelu", "tied": 1}
_KINDS: tuple[tuple[str, str, Args], ...] = (
    ("GPT", r"BLOOM|GPT-\d|GPT3|OPT|NeoX|MPT", _GPT),
    ("Nemotron dense", r"Nemotron-(3-8B|22B|15B|340B|4)", {"activation": "relu2"}),
    ("GPT-OSS", r"GPT-OSS", {"window": 128}),
    ("Qwen3", r"Qwen3", {"qk_norm": 1}),
    ("DeepSeek-V3", r"DeepSeek-V3|DeepSeek-R1|Kimi", {"q_rank": 1536}),
    ("GLM-5", r"GLM-5", {"q_rank": 2048}),
    ("DeepSeek-V4-Flash", r"DeepSeek-V4-Flash", {"attention": "shared"}),
    ("Nemotron-3 Nano", r"Nemotron-3.*Nano|Nemotron-3.5.*30B",
     {"activation": "relu2", "mamba_heads": 64, "shared_ffn": 3712}),
    ("Nemotron-3 Super", r"Nemotron-3.*Super",
     {"activation": "relu2", "mamba_heads": 128, "latent": 1024, "shared_ffn": 5376}),
)  # fmt: skip


def model_args(run: Run, flash: bool, defaults: list[str]) -> Args:
    """The model file's arguments. flash: whether attention keeps scores out of memory; what is
    assumed is added to `defaults`. Raises Skipped where a dimension is missing."""
    found = _of_its_kind(run, defaults) | _dimensions(run, defaults)
    if run.is_moe:
        found |= {k: v for k, v in _experts(run, defaults).items() if k not in found}
    if "activation" not in found and not run.is_moe and run.model.get("params_b"):
        found["activation"] = _activation(found, float(run.model["params_b"]) * 1e9)
        defaults.append("gated feed-forward or not: what the printed parameters come to")
    if run.model.get("hybrid"):
        found["pattern"] = _pattern(found["layers"])
        found.setdefault("mamba_heads", max(1, found["hidden"] // 32))
        defaults.append("hybrid: 8 in 88 layers attention, Mamba-2 and experts in turn")
    if not flash:
        found["flash"] = 0
    return found


def _of_its_kind(run: Run, defaults: list[str]) -> Args:
    """What tables leave out, by the model's name."""
    found: Args = {}
    for kind, pattern, args in _KINDS:
        if re.search(pattern, str(run.model.get("name", "")), re.I):
            found |= args
            defaults.append(f"what the table leaves out: as the public models of {kind}")
    return found


def _dimensions(run: Run, defaults: list[str]) -> Args:
    m = run.model
    found: Args = {}
    for key in ("layers", "hidden", "vocab", "seq_len"):
        if not m.get(key):
            raise Skipped(f"model.{key} is not stated")
        found[key] = int(m[key])
    if not m.get("heads"):
        defaults.append("heads = the most, a multiple of 8, of 128 elements or more")
    found["heads"] = int(m.get("heads") or _heads(found["hidden"]))
    if not m.get("kv_heads"):
        defaults.append("kv_heads = heads")
    found["kv_heads"] = int(m.get("kv_heads") or found["heads"])
    if found["heads"] % found["kv_heads"]:
        heads, few = found["heads"], found["kv_heads"]
        raise Skipped(f"model.heads {heads} is no multiple of model.kv_heads {few}")
    if found["hidden"] % found["heads"] and not m.get("head_dim") and not _is_latent(run):
        raise Skipped(
            f"model.hidden {found['hidden']} is no multiple of model.heads {found['heads']}, and"
            " model.head_dim is not stated"
        )
    found["head_dim"] = int(m.get("head_dim") or found["hidden"] // found["heads"])
    if _is_latent(run):
        found["attention"] = "mla"
        if str(m["attention"]).lower() != "mla":
            defaults.append(f"attention {m['attention']}: as MLA")
    if not m.get("ffn_hidden") and not run.is_moe:
        raise Skipped("model.ffn_hidden is not stated")
    found["ffn"] = int(m.get("ffn_hidden") or 4 * found["hidden"])
    return found


def _is_latent(run: Run) -> bool:
    """Whether attention is multi-head latent attention (MLA), as DeepSeek's."""
    return "mla" in str(run.model.get("attention") or "").lower()


def _experts(run: Run, defaults: list[str]) -> Args:
    """What a mixture of experts has besides."""
    m, moe = run.model, run.model["moe"]
    dense = m.get("dense_layers")
    if dense is None and _is_latent(run):
        dense = 1
        defaults.append("dense_layers = 1 under MLA")
    if dense and not m.get("ffn_hidden"):
        defaults.append("ffn_hidden = 4 x hidden")
    if int(m.get("mtp_layers") or 0) > 1:
        defaults.append(f"mtp_layers = 1, not {m['mtp_layers']}")
    width = int(moe["expert_ffn"])
    return {
        "experts": int(moe["experts"]), "top_k": int(moe["top_k"]), "expert_ffn": width,
        "shared_ffn": int(moe.get("shared") or 0) * width, "dense_layers": int(dense or 0),
        "further": int(bool(m.get("mtp_layers")) and "w/o mtp" not in run.notes.lower()),
    }  # fmt: skip


def _activation(found: Args, parameters: float) -> str:
    """"swiglu", three matmuls, or "gelu", two: whichever is nearer to the parameters."""
    h, f, d = found["hidden"], found["ffn"], found["head_dim"]
    layer = 2 * h * d * (found["heads"] + found["kv_heads"])

    def far(matmuls: int) -> float:
        total = found["layers"] * (layer + matmuls * h * f) + 2 * found["vocab"] * h
        return float(abs(total / parameters - 1))

    return "swiglu" if far(3) <= far(2) else "gelu"


def _heads(hidden: int) -> int:
    return next((k for k in range(hidden // 128 // 8 * 8, 0, -8) if hidden % k == 0), 8)


def _pattern(layers: int) -> str:
    """Mamba-2 and experts in turn, attention instead of the mixer about every sixth time."""
    attention = max(1, round(layers / 11) if layers > 60 else round(layers / 9))
    mixers = (layers + attention) // 2 - attention
    letters = []
    every = mixers / (attention + 1)
    placed = 0
    for i in range(mixers):
        letters += ["M", "E"]
        if placed < attention and i + 1 >= every * (placed + 1):
            letters[-1:] = ["E", "*"]
            placed += 1
    while len(letters) < layers:
        letters.append("E")
    return "".join(letters[:layers])
