"""Weights in fewer bits that the user's forward reads as if they were whole.

A `Packed` is a tensor subclass: a parameter keeps its name, shape and dtype, a product with it
runs the device's own kernel for the format where there is one, taking one of its first dimension
(an expert of a stack) gives a `Packed`, and any other operation sees the weight in its dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ir.errors import UsageError

aten = torch.ops.aten
Parts = tuple[Tensor, ...]
INT4_GROUPS = (128, 64, 32)  # elements that share a scale and a zero: the largest that divides
KEEP = "keep it in another format: --fix weights=int8, fp8 or bf16"
ELEMENTS_AT_ONCE = 1 << 20  # packed at a time, as a weight is loaded
FP4_GROUP = 16  # nvfp4: elements that share a scale, itself in fp8 (NVIDIA, 2025)
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a weight (.., n, k) is packed along k. pack: the weight -> its parts, each with the same
    leading dimensions; unpack: parts, dtype -> the weight; product: x (m, k), parts -> x @ w.T,
    or None where no kernel serves and the weight is unpacked for it. whole: the last of the parts
    that `pack` is then given with some of the rows, where a matrix has one that is of no row."""

    pack: Callable[..., Parts]
    unpack: Callable[[Parts, torch.dtype], Tensor]
    product: Callable[[Tensor, Parts], Tensor | None] = lambda x, parts: None
    whole: Callable[[Tensor], Tensor] | None = None


def _row_scale(wide: Tensor, most: float) -> Tensor:
    """What brings each row's largest to `most`."""
    return (wide.abs().amax(-1) / most).clamp(min=torch.finfo(torch.float32).tiny)


def _int8_pack(w: Tensor) -> Parts:
    wide = w.float()
    scale = _row_scale(wide, 127)
    return (wide / scale[..., None]).round().to(torch.int8), scale


def _fp8_pack(w: Tensor) -> Parts:
    wide = w.float()
    scale = _row_scale(wide, torch.finfo(torch.float8_e4m3fn).max)
    return (wide / scale[..., None]).to(torch.float8_e4m3fn), scale


def _scaled_unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    # fp8 takes part in no promotion; it is exact in each dtype that a forward computes in
    codes = parts[0] if parts[0].dtype == torch.int8 else parts[0].to(dtype)
    return _times(codes, parts[1][..., None], dtype)


def _times(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale, multiplied in fp32 and rounded once: no fp32 copy is written on a GPU."""
    return torch.mul(codes, scale, out=codes.new_empty(codes.shape, dtype=dtype))


def _int8_product(x: Tensor, parts: Parts) -> Tensor | None:
    if x.device.type != "cpu":
        return None
    return torch._weight_int8pack_mm(x.contiguous(), parts[0], parts[1].to(x.dtype))


def _halves(codes: Tensor) -> Tensor:
    """4-bit codes (.., k) two a byte, the first in the low half."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _codes(halves: Tensor) -> Tensor:
    return torch.stack([halves & 15, halves >> 4], -1).flatten(-2)


def int4_group(k: int) -> int:
    """Elements along k that share a scale. Raises UsageError where none divides."""
    group = next((g for g in INT4_GROUPS if k % g == 0), None)
    if group is None:
        least = INT4_GROUPS[-1]
        raise UsageError(f"int4 packs groups of {least} or more, a weight has {k} columns",
                         hints=(KEEP,))  # fmt: skip
    return group


def _int4_pack(w: Tensor) -> Parts:
    grouped = w.float().unflatten(-1, (-1, int4_group(w.shape[-1])))
    least, most = grouped.amin(-1), grouped.amax(-1)
    scale = ((most - least) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    scale, least = scale.to(torch.bfloat16), least.to(torch.bfloat16)
    codes = (grouped - least.float()[..., None]) / scale.float()[..., None]
    return _halves(codes.round().clamp(0, 15).flatten(-2)), scale, least


def _int4_unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    halves, scale, least = parts
    codes = _codes(halves).unflatten(-1, (scale.shape[-1], -1))
    found = codes.new_empty(codes.shape, dtype=dtype)
    torch.addcmul(least.float()[..., None], codes, scale.float()[..., None], out=found)
    return found.flatten(-2)


def _fp4_whole(w: Tensor) -> Tensor:
    """What brings the largest scale of each matrix to fp8's largest."""
    most = torch.maximum(w.amax((-1, -2)), -w.amin((-1, -2))).float()
    return (most / (6 * torch.finfo(torch.float8_e4m3fn).max)).clamp(min=1e-30)


def _fp4_pack(w: Tensor, whole: Tensor | None = None) -> Parts:
    if w.shape[-1] % FP4_GROUP:
        raise UsageError(f"fp4 packs groups of {FP4_GROUP}, a weight has {w.shape[-1]} columns",
                         hints=(KEEP,))  # fmt: skip
    grouped = w.float().unflatten(-1, (-1, FP4_GROUP))
    whole = _fp4_whole(w) if whole is None else whole
    scale = (grouped.abs().amax(-1) / (6 * whole[..., None, None])).to(torch.float8_e4m3fn)
    each = scale.float() * whole[..., None, None]
    steps = grouped / each.clamp(min=1e-30)[..., None]
    table = torch.tensor(_FP4, device=w.device)
    between = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(steps.abs(), between) + 8 * (steps < 0)
    return _halves(codes.flatten(-2)), scale, whole


def _fp4_unpack(parts: Parts, dtype: torch.dtype) -> Tensor:
    halves, scale, whole = parts
    each = torch.tensor((*_FP4, *(-x for x in _FP4)), device=halves.device, dtype=dtype)
    pairs = torch.stack([each.repeat(16), each.repeat_interleave(16)], -1)  # of a byte
    values = pairs[halves.int()].flatten(-2).unflatten(-1, (scale.shape[-1], -1))
    return _times(values, (scale.float() * whole[..., None, None])[..., None], dtype).flatten(-2)


FORMATS: Mapping[str, Format] = {
    "int8": Format(pack=_int8_pack, unpack=_scaled_unpack, product=_int8_product),
    "fp8": Format(pack=_fp8_pack, unpack=_scaled_unpack),
    "int4": Format(pack=_int4_pack, unpack=_int4_unpack),
    "fp4": Format(pack=_fp4_pack, unpack=_fp4_unpack, whole=_fp4_whole),
}


class Packed(torch.Tensor):
    """A weight (.., n, k) in a format. parts: its bits, which share its leading dimensions.

    Read without gradients. flipped: it stands for its transpose (k, n).
    """

    parts: Parts
    word: str
    flipped: bool

    @staticmethod
    def __new__(
        cls, parts: Parts, word: str, shape: Sequence[int], dtype: torch.dtype,
        flipped: bool = False,
    ) -> Packed:  # fmt: skip
        made: Packed = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=parts[0].device, requires_grad=False
        )
        made.parts, made.word, made.flipped = tuple(parts), word, flipped
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Packed({self.word}, {list(self.shape)}, {self.dtype})"

    def whole(self) -> Tensor:
        """The weight in its dtype."""
        found = FORMATS[self.word].unpack(self.parts, self.dtype)
        return found.mT if self.flipped else found

    def with_parts(self, parts: Parts) -> Packed:
        """The same weight with its bits elsewhere."""
        return Packed(parts, self.word, self.shape, self.dtype, self.flipped)

    def leads(self, dim: int) -> bool:
        """Whether a dimension is one that the parts share, of each element or of each row."""
        per_row = self.word in ("int8", "fp8", "int4")
        return not self.flipped and dim % self.dim() < self.dim() - (1 if per_row else 2)

    @property
    def held_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parts)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        rule = _RULES.get(func)
        found = rule(*args, **(kwargs or {})) if rule else NotImplemented
        if found is not NotImplemented:
            return found
        args, kwargs = pytree.tree_map_only(Packed, Packed.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def pack(w: Tensor, word: str) -> Packed:
    """A weight (.., n, k) in a format. Raises UsageError where its columns do not divide."""
    if word not in FORMATS:
        raise UsageError(f"unknown format {word!r} of weights", why=f"known: {', '.join(FORMATS)}")
    if w.dim() < 2:
        raise UsageError(f"a weight of {w.dim()} dimensions has no rows to pack")
    return Packed(FORMATS[word].pack(w.detach()), word, w.shape, w.dtype)


def pack_into(parts: Sequence[Tensor], w: Tensor, word: str) -> None:
    """Write the bits of a weight (.., n, k), some rows at a time: packing takes fp32 several times
    over, and of a whole matrix that would be more than the model."""
    if w.dim() > 2:
        for row in range(w.shape[0]):
            pack_into([p[row] for p in parts], w[row], word)
        return
    form, step = FORMATS[word], max(1, ELEMENTS_AT_ONCE // w.shape[1])
    given = () if form.whole is None else (form.whole(w),)
    for first in range(0, w.shape[0], step):
        some = form.pack(w[first : first + step], *given)
        for at, (into, part) in enumerate(zip(parts, some, strict=True)):
            (into if given and at == len(parts) - 1 else into[first : first + step]).copy_(part)


def _same(w: Packed, *_: Any, **__: Any) -> Packed:
    return w.with_parts(w.parts)


def _flip(w: Packed, *dims: int) -> Any:
    if dims and {d % w.dim() for d in dims} != {w.dim() - 2, w.dim() - 1}:
        return NotImplemented
    shape = (*w.shape[:-2], w.shape[-1], w.shape[-2])
    return Packed(w.parts, w.word, shape, w.dtype, not w.flipped)


def _one(w: Packed, dim: int, index: int) -> Any:
    if dim % w.dim() != 0 or w.dim() < 3:
        return NotImplemented
    parts = tuple(p[index] for p in w.parts)
    return Packed(parts, w.word, w.shape[1:], w.dtype, w.flipped)


def _rows(w: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if not isinstance(w, Packed) or step != 1 or not w.leads(dim):
        return NotImplemented
    parts = tuple(aten.slice.Tensor(p, dim % w.dim(), start, end) for p in w.parts)
    return Packed(parts, w.word, (*parts[0].shape[: w.dim() - 1], w.shape[-1]), w.dtype)


def _chosen(w: Any, dim: int, index: Tensor) -> Any:
    if not isinstance(w, Packed) or not w.leads(dim):
        return NotImplemented
    parts = tuple(p.index_select(dim % w.dim(), index) for p in w.parts)
    return Packed(parts, w.word, (*parts[0].shape[: w.dim() - 1], w.shape[-1]), w.dtype)


def _joined(tensors: Sequence[Any], dim: int = 0) -> Any:
    first = tensors[0]
    if not all(isinstance(w, Packed) and w.word == first.word and w.leads(dim) for w in tensors):
        return NotImplemented
    dim %= first.dim()
    parts = tuple(torch.cat(same, dim) for same in zip(*(w.parts for w in tensors)))
    return Packed(parts, first.word, (*parts[0].shape[: first.dim() - 1], first.shape[-1]),
                  first.dtype)  # fmt: skip


def _each(w: Packed, dim: int = 0) -> Any:
    return [_one(w, dim, i) for i in range(w.shape[0])] if dim == 0 and w.dim() > 2 else (
        NotImplemented
    )  # fmt: skip


def _product(x: Any, w: Any) -> Any:
    """x (m, k) @ a flipped weight (k, n)."""
    if not isinstance(w, Packed) or isinstance(x, Packed) or not w.flipped or w.dim() != 2:
        return NotImplemented
    found = FORMATS[w.word].product(x, w.parts)
    return x @ w.whole() if found is None else found


def _product_and(bias: Tensor, x: Any, w: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(bias, Packed) or beta != 1 or alpha != 1:
        return NotImplemented
    found = _product(x, w)
    return found if found is NotImplemented else found + bias


def _grouped(x: Any, w: Any, ends: Any = None, *rest: Any) -> Any:
    """Rows (m, k) of several weights, expert after expert, each by its own: one is unpacked at a
    time, if at all. ends: where each one's rows end."""
    if not isinstance(w, Packed) or isinstance(x, Packed) or ends is None or (
        (x.dim(), w.dim()) != (2, 3) or any(r is not None for r in rest)
    ):  # fmt: skip
        return NotImplemented
    edges = [0, *ends.tolist()]
    found = x.new_zeros(x.shape[0], w.shape[-1])
    for at, (start, end) in enumerate(itertools.pairwise(edges)):
        if start < end:
            found[start:end] = x[start:end] @ _one(w, 0, at)
    return found


def _linear(x: Any, w: Any, bias: Any = None) -> Any:
    if not isinstance(w, Packed) or isinstance(x, Packed) or w.flipped or w.dim() != 2:
        return NotImplemented
    found = _product(x.reshape(-1, x.shape[-1]), _flip(w)).view(*x.shape[:-1], w.shape[0])
    return found if bias is None else found + bias


def _looked_up(w: Any, ids: Tensor, *_: Any, **__: Any) -> Any:
    """Rows of an embedding: unpacked alone."""
    if not isinstance(w, Packed) or w.dim() != 2 or not w.leads(0):
        return NotImplemented
    parts = tuple(p[ids.flatten()] for p in w.parts)
    rows = FORMATS[w.word].unpack(parts, w.dtype)
    return rows.view(*ids.shape, w.shape[1])


_RULES: Mapping[Any, Callable[..., Any]] = {
    aten.detach.default: _same, aten.alias.default: _same,
    aten.t.default: _flip, aten.transpose.int: _flip,
    aten.select.int: _one, aten.slice.Tensor: _rows, aten.unbind.int: _each,
    aten.index_select.default: _chosen, aten.cat.default: _joined,
    aten.mm.default: _product, aten.addmm.default: _product_and, aten.linear.default: _linear,
    aten._grouped_mm.default: _grouped, aten.embedding.default: _looked_up,
}  # fmt: skip
