"""The lowering table: one row for each torch operator, by its schema name without overloads.

A row is the name of our op and a function from the call's arguments to attributes. Operators of
namespace `meshwright` have rows too. What is not here is an error that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ir.graph import Attr

Attrs = dict[str, Attr]
Maker = Callable[[dict[str, Any]], Attrs]  # the call's arguments by schema name -> attributes


def _none(args: dict[str, Any]) -> Attrs:
    return {}


def _dim(args: dict[str, Any]) -> Attrs:
    return {"dim": args.get("dim", 0)}


def _dims(args: dict[str, Any]) -> Attrs:
    given = args.get("dim")
    given = [given] if isinstance(given, int) else given
    return {"dims": tuple(given)} if given else {}


def _fn(name: str) -> Maker:
    return lambda args: {"fn": name}


def _attention(args: dict[str, Any]) -> Attrs:
    return {
        "causal": bool(args.get("is_causal")), "mask": args.get("attn_mask") is not None,
        "dropout": float(args.get("dropout_p") or 0.0),
    }  # fmt: skip


def _own_attention(args: dict[str, Any]) -> Attrs:
    window = args.get("window") or args.get("chunk")
    found: Attrs = {
        "causal": bool(args["causal"]), "mask": args.get("mask") is not None,
        "sinks": args.get("sinks") is not None, "layout": "bshd",
        "dropout": float(args.get("dropout") or 0.0),
    }  # fmt: skip
    if window:
        found["window"] = int(window)
    if args.get("chunk"):
        found["chunk"] = int(args["chunk"])
    if args.get("softcap"):
        found["softcap"] = float(args["softcap"])
    return found


def _norm_dims(args: dict[str, Any]) -> Attrs:
    return {"dims": len(args["normalized_shape"])}


def _split(args: dict[str, Any]) -> Attrs:
    sizes = args.get("split_sizes", args.get("split_size"))
    equal = not isinstance(sizes, (list, tuple)) or len(set(sizes)) == 1
    return {"dim": args.get("dim", 0), "equal": equal}


def _pad(args: dict[str, Any]) -> Attrs:
    pad = args["pad"]
    return {"dim": tuple(-1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1])}


def _roll(args: dict[str, Any]) -> Attrs:
    return {"dim": tuple(args.get("dims") or ())}


def _conv(args: dict[str, Any]) -> Attrs:
    return {"groups": args.get("groups", 1), "transposed": bool(args.get("transposed", False))}


def _permute(args: dict[str, Any]) -> Attrs:
    return {"dims": tuple(args["dims"])}


def _scan(args: dict[str, Any]) -> Attrs:
    """Sizes come from operands when the node is made; the chunk is the kernel's."""
    return {"chunk": int(args.get("chunk") or 64)}


def _rows(op: str, maker: Maker, names: str) -> dict[str, tuple[str, Maker]]:
    return dict.fromkeys(names.split(), (op, maker))


def _same(names: str) -> dict[str, tuple[str, Maker]]:
    return {name: (name, _none) for name in names.split()}


TABLE: Mapping[str, tuple[str, Maker]] = MappingProxyType(
    {
        **_same("linear matmul add sub mul div neg pow abs log log1p exp expm1 sqrt rsqrt cos sin"),
        **_same("tanh sigmoid relu silu gelu softplus erf clamp where masked_fill lerp reciprocal"),
        **_same("minimum maximum elu leaky_relu mish atan2 index index_add index_put one_hot"),
        **_same("relu6 hardswish embedding sign"),
        **_rows("matmul", _none, "mm bmm mv dot"),
        **_rows("add", _none, "__add__ add_relu"),
        **_rows("sub", _none, "rsub"),
        **_rows("div", _none, "true_divide divide"),
        **_rows("mul", _none, "multiply"),
        **_rows("remainder", _none, "remainder fmod floor_divide"),
        **_rows("pow", _none, "square"),
        **_rows("logsigmoid", _none, "log_sigmoid"),
        **_rows("clamp", _none, "clamp_min clamp_max hardtanh hardsigmoid"),
        **_rows("round", _none, "round floor ceil trunc"),
        **_rows("isfinite", _none, "isnan isinf isfinite"),
        **_rows("compare", _none, "eq ne lt le gt ge isclose"),
        **_rows("logical", _none, "logical_and logical_or logical_not logical_xor"),
        **_rows("bitwise", _none, "bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__"),
        **_rows("bitwise", _none, "bitwise_left_shift bitwise_right_shift"),
        **_rows("fill", _none, "fill zero"),
        **_rows("create", _none, "zeros_like ones_like full_like empty_like rand_like randn_like"),
        **_rows("create", _none, "zeros ones full empty rand randn arange scalar_tensor eye"),
        **_rows("create", _none, "new_zeros new_ones new_full new_empty linspace tensor randint"),
        **_rows("create", _none, "_efficientzerotensor bernoulli normal tril_indices exponential"),
        **_rows("create", _none, "uniform random triu_indices log_normal cauchy geometric"),
        **_rows("mean", _dims, "mean"),
        **_rows("sum", _dims, "sum"),
        **_rows("amax", _dims, "amax amin max min"),
        **_rows("any", _dims, "any all"),
        **_rows("var", _dims, "var std var_mean"),
        **_rows("logsumexp", _dims, "logsumexp"),
        **_rows("prod", _dims, "prod"),
        **_rows("vector_norm", _dims, "linalg_vector_norm norm"),
        **_rows("argmax", _dims, "argmax argmin"),
        **_rows("topk", _dim, "topk"),
        **_rows("sort", _dim, "sort argsort"),
        **_rows("cumsum", _dim, "cumsum cumprod"),
        **_rows("diff", _dim, "diff"),
        **_rows("histogram", _none, "bincount histc"),
        **_rows("histogram", _none, "searchsorted bucketize"),
        **_rows("softmax", _dim, "softmax _softmax _safe_softmax"),
        **_rows("log_softmax", _dim, "log_softmax _log_softmax"),
        **_rows("glu", _dim, "glu"),
        **_rows("triangle", _none, "tril triu"),
        **_rows("layer_norm", _norm_dims, "layer_norm native_layer_norm"),
        **_rows("rms_norm", _norm_dims, "rms_norm _fused_rms_norm"),
        **_rows("batch_norm", _none, "batch_norm native_batch_norm"),
        **_rows("group_norm", _none, "group_norm native_group_norm instance_norm"),
        **_rows("conv", _conv, "conv1d conv2d conv3d convolution conv_transpose2d"),
        **_rows("max_pool", _none, "max_pool1d max_pool2d max_pool2d_with_indices max_pool3d"),
        **_rows("avg_pool", _none, "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d"),
        **_rows("avg_pool", _none, "adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d"),
        **_rows("resize", _none, "upsample_nearest2d upsample_bilinear2d _upsample_bicubic2d_aa"),
        **_rows("resize", _none, "upsample_bicubic2d pixel_shuffle pixel_unshuffle"),
        **_rows("view", _none, "view reshape flatten unflatten unsqueeze squeeze _unsafe_view"),
        **_rows("view", _none, "view_as reshape_as"),
        **_rows("permute", _permute, "permute"),
        **_rows("permute", _none, "transpose t swapaxes movedim numpy_T mT swapdims"),
        **_rows("expand", _none, "expand expand_as broadcast_to"),
        **_rows("repeat", _none, "repeat repeat_interleave tile"),
        **_rows("slice", _dim, "slice narrow diagonal unfold"),
        **_rows("split", _split, "split split_with_sizes chunk tensor_split"),
        **_rows("select", _dim, "select unbind"),
        **_rows("concat", _dim, "cat concat concatenate"),
        **_rows("stack", _dim, "stack"),
        **_rows("pad", _pad, "pad constant_pad_nd"),
        **_rows("roll", _roll, "roll flip"),
        **_rows("copy", _none, "clone contiguous copy"),
        **_rows("cast", _none, "to _to_copy type_as float half bfloat16 double int long bool"),
        **_rows("gather", _dim, "gather take_along_dim"),
        **_rows("index", _none, "index_select masked_select take"),
        **_rows("scatter", _dim, "scatter scatter_add scatter_reduce"),
        **_rows("index_add", _none, "index_copy"),
        **_rows("index_put", _none, "masked_scatter slice_scatter select_scatter"),
        **_rows("dropout", lambda a: {"p": float(a["p"])}, "dropout native_dropout"),
        **_rows("attention", _attention, "scaled_dot_product_attention"),
        **_rows("cross_entropy", _none, "cross_entropy_loss"),
        **_rows("nll_loss", _none, "nll_loss nll_loss_nd"),
        **_rows("mse", _none, "mse_loss l1_loss smooth_l1_loss huber_loss"),
        **_rows("mse", _none, "binary_cross_entropy_with_logits binary_cross_entropy kl_div"),
        **_rows("einsum", lambda a: {"equation": a["equation"].replace(" ", "")}, "einsum"),
        **_rows("addmm", _none, "addmm baddbmm addmv"),
        **_rows("grouped_matmul", _none, "_grouped_mm grouped_mm"),
        **_rows("complex", _none, "view_as_complex view_as_real polar real imag complex"),
        **_rows("meshwright.attention", _own_attention, "meshwright.attention"),
        **_rows("dispatch", _none, "meshwright.moe_experts_dispatch"),
        **_rows("combine", _none, "meshwright.moe_experts_combine"),
        **_rows("expert_bias", _none, "meshwright.moe_experts_bias"),
        **_rows("scan", _scan, "meshwright.selective_scan meshwright.ssd_scan meshwright.wkv"),
        **_rows("scan", _scan, "meshwright.linear_scan"),
        **_rows("delta_rule", _scan, "meshwright.delta_rule"),
        **_rows("linear_attention", _scan, "meshwright.linear_attention"),
        **_rows("causal_conv1d", _none, "meshwright.causal_conv1d"),
    }
)

# Checks, which compute nothing; and calls whose result is their argument.
FORGOTTEN = frozenset(
    (
        "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
        "sym_constrain_range_for_size",
    )
)  # fmt: skip
SAME_VALUE = frozenset(
    ("lift_fresh_copy", "lift_fresh", "detach", "alias", "detach_copy", "requires_grad")
)
