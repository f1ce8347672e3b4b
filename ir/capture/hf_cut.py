"""A Hugging Face configuration with its sizes cut and its structure kept: a model for a laptop.

One table says what each key becomes. Kept are ratios (grouped heads, experts a token), oddness
(sizes that ranks do not share evenly), tied weights, the kinds of layers and their order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from ir.capture import hf

LENGTH = 128  # positions
WINDOW = 16  # tokens that a window or chunk of the twin sees: fewer than its sequences have
HEADS, WIDTH = 4, 64
HEAD = WIDTH // HEADS


def _small(most: int) -> Callable[[int], int]:
    """A size of about `most` that divides by 2, 4 and 8 as the whole one does."""

    def cut(size: int) -> int:
        if size <= most:
            return size
        power = next(p for p in (8, 4, 2, 1) if size % p == 0)
        return most if power == 8 else most + power

    return cut


def _most(n: int) -> Callable[[int], int]:
    return lambda size: min(size, n)


SIZES: dict[str, Callable[[int], int]] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), lambda size: WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), _small(128)),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
         "shared_intermediate_size"),
        _small(64),
    ),
    **dict.fromkeys(("vocab_size",), _small(256)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), _most(HEADS)),
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), _most(8)
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "top_k_experts", "n_shared_experts",
         "num_shared_experts", "n_group", "mlp_ratio"),
        _most(2),
    ),
    **dict.fromkeys(("topk_group",), _most(1)),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), _most(2 * HEAD)),
    **dict.fromkeys(("qk_nope_head_dim",), _most(HEAD)),
    **dict.fromkeys(("qk_rope_head_dim",), _most(HEAD // 2)),
    **dict.fromkeys(("v_head_dim",), _most(HEAD)),
    **dict.fromkeys(
        ("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads", "mamba_n_heads"),
        _most(HEADS),
    ),
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "mamba_head_dim",
         "mamba_d_head", "state_size", "ssm_state_size", "mamba_d_state"),
        _most(HEAD),
    ),
    **dict.fromkeys(("index_n_heads",), _most(HEADS)),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "index_topk"), _most(WINDOW)),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
        _most(LENGTH),
    ),
    **dict.fromkeys(("original_max_position_embeddings",), _most(LENGTH // 2)),
    **dict.fromkeys(("first_k_dense_replace", "num_nextn_predict_layers"), _most(1)),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), lambda i: 0),
    **dict.fromkeys(("image_token_id", "image_token_index", "video_token_id"), _most(255)),
}  # fmt: skip
NUMBERS = ("mlp_only_layers", "moe_layers")  # lists of layers' numbers
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def cut(
    config: Mapping[str, Any],
    layers: int,
    changes: Mapping[str, str],
    where: str,
    heads: int = HEADS,
) -> Any:
    """The configuration of a twin with that many layers and attention heads; changes: keys set by
    hand, as `--arg`.

    Raises PlanError where transformers refuses what the table makes of it.
    """
    raw = hf._changed(config, {}, where)
    with hf._quiet():
        cls = hf._model_class(raw, where)
        whole = hf._configuration(cls, raw, where).to_dict()
    small = _cut(whole, layers, heads)
    small.update({key: raw[key] for key in ("architectures", "model_type") if key in raw})
    small["dtype"] = "float32"
    for key in ("torch_dtype", "transformers_version"):
        small.pop(key, None)
    return hf._changed(small, changes, where)


def _cut(whole: dict[str, Any], layers: int, heads: int) -> dict[str, Any]:
    """One configuration, and those inside it."""
    small = copy.deepcopy(whole)
    depth = next((whole[key] for key in DEPTHS if isinstance(whole.get(key), int)), 0)
    by_layer = [k for k, v in whole.items()
                if isinstance(v, list) and len(v) == depth > 1 and k not in NUMBERS]  # fmt: skip
    chosen = _kinds(whole, by_layer, depth, layers)
    for key, value in whole.items():
        if isinstance(value, dict):
            small[key] = _cut(value, layers, heads)
        elif key in by_layer:
            small[key] = [value[i] for i in chosen]
        elif key in NUMBERS and isinstance(value, list):
            small[key] = [new for new, i in enumerate(chosen) if i in value]
        elif key in DEPTHS and isinstance(value, int):
            small[key] = layers
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[key] = SIZES[key](value)
        elif isinstance(value, float) and "drop" in key:
            small[key] = 0.0
        elif key == "eos_token_id" and isinstance(value, list):
            small[key] = [i for i in value if i < layers]
    _cut_heads(whole, small, heads)
    _cut_rotations(whole, small)
    return small


def _kinds(whole: dict[str, Any], by_layer: list[str], depth: int, count: int) -> list[int]:
    """The layers that the twin has: the first ones; kinds of which the first is later replace the
    last. A kind is what all lists say of a layer, but for those that say more than there is room
    for: no kinds."""
    lists = [[repr(x) for x in whole[key]] for key in by_layer]
    lists += [[repr(i in whole[key]) for i in range(depth)]
              for key in NUMBERS if isinstance(whole.get(key), list)]  # fmt: skip
    kinds = [*zip(*(x for x in lists if len({*x}) <= count))] or [()] * depth
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    later = [i for i in first if i >= count]
    return [*range(min(count - len(later), depth)), *later][:count]


def _cut_heads(whole: dict[str, Any], small: dict[str, Any], most: int) -> None:
    """Key and value heads as many, fewer or one; a head's size tied to the width or not."""
    name = next((k for k in ("num_attention_heads", "n_head") if whole.get(k)), None)
    if name is None:
        return
    count = small[name] = min(whole[name], most)
    for key in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"):
        kv = whole.get(key)
        if isinstance(kv, int):
            small[key] = count if kv == whole[name] else 1 if kv == 1 else max(1, count // 2)
    width, size = whole.get("hidden_size"), whole.get("head_dim")
    if width and isinstance(size, int):
        usual = size * whole[name] == width or "qk_rope_head_dim" in whole
        small["head_dim"] = small["hidden_size"] // count if usual else 2 * HEAD
        if "qk_rope_head_dim" in whole and size == whole["qk_rope_head_dim"]:
            small["head_dim"] = small["qk_rope_head_dim"]


def _cut_rotations(whole: dict[str, Any], small: dict[str, Any]) -> None:
    """Rotary factors, one for each pair of a head's elements, in the smaller head."""

    def pairs(config: dict[str, Any]) -> int:
        heads = config.get("num_attention_heads") or config.get("n_head") or 1
        size = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
        size = config.get("qk_rope_head_dim") or size
        return int(size * (config.get("partial_rotary_factor") or 1)) // 2

    for name in ("rope_scaling", "rope_parameters"):
        table, old, new = small.get(name), pairs(whole), pairs(small)
        for inner in [table, *(table or {}).values()] if isinstance(table, dict) else []:
            for key, value in inner.items() if isinstance(inner, dict) else ():
                if isinstance(value, list) and len(value) == old:
                    inner[key] = value[:new]
                if key == "mrope_section" and sum(value) == old:
                    shares = [max(1, n * new // old) for n in value]
                    inner[key] = [new - sum(shares[1:]), *shares[1:]]
