"""The letters of every rule, proved: an op on shards of a factor gives the whole result.

A result that has the split factor is the concatenation of its shards; one that has not is their
sum. Operands without it are whole on each shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.errors import PlanError
from ir.graph import Dim, Node
from ir.graph import Tensor as Value
from ir.ops import OPS, rule

TYPES = {torch.float32: "f32", torch.int64: "i64", torch.bool: "bool", torch.int32: "i32"}
SHARDS = 2


@dataclass
class Case:
    """An op, its operands, and torch's version of it.

    run(operands, shapes of the results, factor split, shard) -> results.
    """

    op: str
    given: list[Tensor]
    run: Callable[[list[Tensor], list[tuple[int, ...]], str, int], list[Tensor]]
    attrs: dict[str, Any] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def node(self) -> Node:
        self.shapes = self.shapes or [
            tuple(x.shape) for x in self.run(self.given, self.shapes, "", 0)
        ]
        outs = self.run(self.given, self.shapes, "", 0)
        return Node(
            name="n", op=self.op, inputs=tuple(f"x{i}" for i in range(len(self.given))),
            outputs=tuple(map(value, outs)), attrs=tuple(sorted(self.attrs.items())),
        )  # fmt: skip


def value(x: Tensor) -> Value:
    return Value(shape=tuple(Dim(numerator=d) for d in x.shape), dtype=TYPES[x.dtype])


def shard(x: Tensor, letters: tuple[str, ...], letter: str, index: int) -> Tensor:
    for dim, name in enumerate(letters):
        if name == letter:
            x = x.chunk(SHARDS, dim)[index]
    return x


def prove(case: Case) -> set[str]:
    """Split every factor that may be split; returns those tried."""
    node = case.node()
    spec = rule(node).spec(node, tuple(map(value, case.given)))
    whole = case.run(case.given, case.shapes, "", 0)
    operands = [*zip(spec.inputs, case.given), *zip(spec.outputs, whole)]
    assert [len(letters) for letters, _ in operands] == [x.dim() for _, x in operands]
    factors = {name for letters, _ in operands for name in letters if not name.startswith("!")}
    tried = set()
    for letter in sorted(factors):
        sizes = [x.shape[i] for at, x in operands for i, name in enumerate(at) if name == letter]
        if any(size % SHARDS for size in sizes):
            continue
        tried.add(letter)
        parts = []
        for index in range(SHARDS):
            local = [shard(x, at, letter, index) for at, x in zip(spec.inputs, case.given)]
            shapes = [
                tuple(d // SHARDS if name == letter else d for name, d in zip(at, shape))
                for at, shape in zip(spec.outputs, case.shapes)
            ]
            parts.append(case.run(local, shapes, letter, index))
        for at, expected, pieces in zip(spec.outputs, whole, zip(*parts)):
            found = torch.cat(pieces, at.index(letter)) if letter in at else sum(pieces)
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-5, msg=str((case.op, letter))
            )
    return tried


size = st.sampled_from((2, 4, 6))
few = st.sampled_from((1, 2, 4))


def plain(fn: Callable[..., Any]) -> Any:
    """A torch function that does the same on a shard as on the whole."""

    def run(xs: list[Tensor], shapes: Any, letter: str, index: int) -> list[Tensor]:
        out = fn(*xs)
        return list(out) if isinstance(out, (tuple, list)) else [out]

    return run


@given(b=few, m=size, k=size, n=size, bias=st.booleans())
@settings(max_examples=20, deadline=None)
def test_linear(b: int, m: int, k: int, n: int, bias: bool) -> None:
    def run(xs: list[Tensor], shapes: Any, letter: str, index: int) -> list[Tensor]:
        once = letter != "k" or index == 0  # a bias is added to one partial sum
        return [F.linear(xs[0], xs[1], xs[2] if bias and once else None)]

    xs = [torch.randn(b, m, k), torch.randn(n, k)] + ([torch.randn(n)] if bias else [])
    assert {"t1", "k", "n"} <= prove(Case("linear", xs, run))


@given(lead=few, m=size, k=size, n=size, shared=st.booleans())
@settings(max_examples=20, deadline=None)
def test_matmul(lead: int, m: int, k: int, n: int, shared: bool) -> None:
    right = torch.randn(k, n) if shared else torch.randn(2, lead, k, n)
    tried = prove(Case("matmul", [torch.randn(2, lead, m, k), right], plain(torch.matmul)))
    assert {"b0", "m", "k", "n"} <= tried


@pytest.mark.parametrize(
    ("left", "right"), [((6,), (6,)), ((4, 6), (6,)), ((6,), (6, 4)), ((2, 4, 6), (6,))]
)
def test_matmul_of_vectors(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    assert "k" in prove(
        Case("matmul", [torch.randn(left), torch.randn(right)], plain(torch.matmul))
    )


EQUATIONS = ("bhqk,bkhd->bqhd", "bse,ebsd->bsd", "ij,jk->ik", "bij,bij->b", "i,j->ij")


@given(equation=st.sampled_from(EQUATIONS), data=st.data())
@settings(max_examples=30, deadline=None)
def test_einsum(equation: str, data: st.DataObject) -> None:
    words = equation.partition("->")[0].split(",")
    sizes = {letter: data.draw(size) for word in words for letter in word}
    xs = [torch.randn([sizes[letter] for letter in word]) for word in words]
    case = Case("einsum", xs, plain(lambda *x: torch.einsum(equation, *x)), {"equation": equation})
    assert prove(case) == set(sizes)


@given(heads=st.sampled_from((4, 8)), groups=st.sampled_from((1, 2)), s=size, causal=st.booleans())
@settings(max_examples=20, deadline=None)
def test_attention_with_grouped_heads(heads: int, groups: int, s: int, causal: bool) -> None:
    def run(xs: list[Tensor], shapes: Any, letter: str, index: int) -> list[Tensor]:
        q, k, v = xs
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), float("-inf"))
        return [scores.softmax(-1) @ v, scores.logsumexp(-1)]

    kv = heads // groups
    xs = [torch.randn(2, heads, s, 4), torch.randn(2, kv, s, 4), torch.randn(2, kv, s, 6)]
    torch.testing.assert_close(
        run(xs, None, "", 0)[0],
        F.scaled_dot_product_attention(*xs, is_causal=causal, enable_gqa=True),
    )
    assert prove(Case("attention", xs, run, {"causal": causal})) == {"b", "h"}


@given(b=size, s=size, h=size)
@settings(max_examples=10, deadline=None)
def test_norms_keep_what_they_normalise_whole(b: int, s: int, h: int) -> None:
    def layer_norm(x: Tensor, w: Tensor, c: Tensor) -> list[Tensor]:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return [F.layer_norm(x, (h,), w, c), mean, (var + 1e-5).rsqrt()]

    xs = [torch.randn(b, s, h), torch.randn(h), torch.randn(h)]
    assert prove(Case("layer_norm", xs, plain(layer_norm), {"dims": 1})) == {"d0", "d1"}

    def rms_norm(x: Tensor, w: Tensor) -> list[Tensor]:
        return [F.rms_norm(x, (h,), w), (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()]

    assert prove(Case("rms_norm", xs[:2], plain(rms_norm), {"dims": 1})) == {"d0", "d1"}


@given(b=size, s=size, h=size, dim=st.sampled_from((-1, 1)))
@settings(max_examples=10, deadline=None)
def test_softmax_and_its_kin_keep_their_dimension_whole(b: int, s: int, h: int, dim: int) -> None:
    x = torch.randn(b, s, h)
    rest = {f"d{i}" for i in range(3)} - {f"d{dim % 3}"}
    for op in ("softmax", "log_softmax", "cumsum", "sort", "topk", "diff"):
        fn = {"topk": lambda x: x.topk(2, dim), "diff": lambda x: x.diff(dim=dim)}.get(
            op, lambda x, op=op: getattr(torch, op)(x, dim)
        )
        assert prove(Case(op, [x], plain(fn), {"dim": dim})) == rest


UNARY = {
    **{name: getattr(F, name) for name in ("silu", "gelu", "relu")},
    **{name: getattr(torch, name) for name in ("exp", "neg", "tanh", "sigmoid", "abs", "cos")},
}
BINARY = {
    name: getattr(torch, name) for name in ("add", "mul", "sub", "maximum", "minimum", "atan2")
}


@given(op=st.sampled_from(sorted(UNARY)), b=size, h=size)
@settings(max_examples=20, deadline=None)
def test_unary(op: str, b: int, h: int) -> None:
    assert prove(Case(op, [torch.randn(b, h)], plain(UNARY[op]))) == {"d0", "d1"}


@given(
    op=st.sampled_from(sorted(BINARY)), b=size, s=size, h=size,
    other=st.sampled_from(("bsh", "1sh", "h", "s1", "b11", "")),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_binary_ops_broadcast(op: str, b: int, s: int, h: int, other: str) -> None:
    sizes = {"b": b, "s": s, "h": h, "1": 1}
    xs = [torch.randn(b, s, h), torch.randn([sizes[c] for c in other])]
    assert prove(Case(op, xs, plain(BINARY[op]))) == {"d0", "d1", "d2"}
    if other:
        assert prove(Case(op, xs[::-1], plain(BINARY[op]))) == {"d0", "d1", "d2"}


RESHAPES = [
    ((4, 6, 8), (24, 8)), ((4, 6, 8), (4, 6, 2, 4)), ((4, 6, 2, 4), (4, 6, 8)),
    ((4, 6), (4, 1, 6)), ((4, 1, 6), (4, 6)), ((2, 3, 4, 5), (6, 20)), ((24,), (4, 6)),
    ((4, 6, 8), (192,)), ((2, 6, 4), (2, 4, 6)),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), RESHAPES)
def test_views_keep_their_carriers(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    def run(xs: list[Tensor], shapes: list[tuple[int, ...]], letter: str, i: int) -> list[Tensor]:
        return [xs[0].reshape(shapes[0])]

    x = torch.arange(prod(old)).float().reshape(old)
    for op in ("view", "reshape_copy"):
        prove(Case(op, [x], run, shapes=[new]))


def test_a_view_that_merges_batch_and_sequence_is_split_by_either() -> None:
    """Token by token: a shard of the sequence is a shard of the flattened tokens, in another
    order, which no op on tokens minds; the carrier is the sequence."""
    b, s = Dim(numerator=1, batch=1), Dim(numerator=1, seq=1)
    both, h = Dim(numerator=1, batch=1, seq=1), Dim(numerator=8)
    old, new = Value(shape=(b, s, h), dtype="f32"), Value(shape=(both, h), dtype="f32")
    spec = rule(n := Node(name="n", op="view", inputs=("x",), outputs=(new,))).spec(n, (old,))
    assert spec.inputs[0][1] == spec.outputs[0][0] == "g0" and spec.inputs[0][2] == "g1"


@given(b=size, s=size, h=size)
@settings(max_examples=10, deadline=None)
def test_movement(b: int, s: int, h: int) -> None:
    x = torch.randn(b, s, h)
    permute = Case("permute", [x], plain(lambda x: x.permute(2, 0, 1)), {"dims": (2, 0, 1)})
    assert prove(permute) == {"d0", "d1", "d2"}
    cuts: dict[str, tuple[Any, list[Tensor]]] = {
        "slice": (lambda x: x[:, :, 1:], [x]),
        "split": (lambda x: x.split([1, h - 1], 2), [x]),
        "select": (lambda x: x.select(2, 0), [x]),
        "concat": (lambda *x: torch.cat(x, 2), [x, x]),
        "pad": (lambda x: F.pad(x, (1, 0)), [x]),
        "roll": (lambda x: x.roll(1, 2), [x]),
    }
    for op, (fn, xs) in cuts.items():
        assert prove(Case(op, xs, plain(fn), {"dim": 2})) == {"d0", "d1"}
    stack = Case("stack", [x, x], plain(lambda *x: torch.stack(x, 1)), {"dim": 1})
    assert prove(stack) == {"d0", "d1", "d2"}

    def expand(xs: list[Tensor], shapes: list[tuple[int, ...]], *_: Any) -> list[Tensor]:
        return [xs[0].expand(shapes[0])]

    one = torch.randn(b, 1, h)
    assert {"d1", "d3"} <= prove(Case("expand", [one], expand, shapes=[(2, b, s, h)]))


def test_an_equal_split_of_a_fused_projection_stays_split() -> None:
    """Where the rows are laid out shard by shard: [q0 k0 v0 q1 k1 v1] is [qkv]0, [qkv]1."""
    spec = rule(
        n := Node(
            name="n", op="split", inputs=("x",), attrs=(("dim", -1), ("equal", True)),
            outputs=(value(torch.zeros(2, 4)),) * 3,
        )
    ).spec(n, (value(torch.zeros(2, 12)),))  # fmt: skip
    assert spec.inputs == (("d0", "d1"),) and spec.outputs == (("d0", "d1"),) * 3
    shards = torch.arange(12.0).reshape(2, 3, 2).transpose(0, 1).reshape(3, 2, 2)
    for part, expected in zip(torch.arange(12.0).reshape(2, 6).chunk(3, 1), shards):
        assert torch.equal(part.reshape(2, 2), expected)


@given(b=size, s=size, v=size, h=size)
@settings(max_examples=10, deadline=None)
def test_embedding_by_vocabulary_is_a_masked_partial_sum(b: int, s: int, v: int, h: int) -> None:
    def run(xs: list[Tensor], shapes: Any, letter: str, index: int) -> list[Tensor]:
        table, ids = xs
        local = ids - (index * table.shape[0] if letter == "v" else 0)
        inside = (local >= 0) & (local < table.shape[0])
        rows = F.embedding(local.clamp(0, table.shape[0] - 1), table)
        return [rows * inside.unsqueeze(-1)]

    xs = [torch.randn(v, h), torch.randint(v, (b, s))]
    assert prove(Case("embedding", xs, run)) == {"v", "h", "t0", "t1"}


@given(rows=size, v=size)
@settings(max_examples=10, deadline=None)
def test_cross_entropy_by_rows_is_a_partial_sum(rows: int, v: int) -> None:
    """The mean is over all rows: a shard adds its rows' share. Over a split vocabulary the
    statistics are reduced first: the maximum, then the sum of exponentials."""
    logits, target = torch.randn(rows, v), torch.randint(v, (rows,))
    high = logits.max(-1, keepdim=True).values  # all-reduced
    total = (logits - high).exp().sum(-1, keepdim=True)  # all-reduced

    def run(xs: list[Tensor], shapes: Any, letter: str, index: int) -> list[Tensor]:
        x, y = xs
        of = {"t0": index * x.shape[0]}.get(letter, 0)
        top, sums = (t[of : of + x.shape[0]] for t in (high, total))
        logp = x - top - sums.log()
        local = y - (index * x.shape[1] if letter == "v" else 0)
        mine = (local >= 0) & (local < x.shape[1])
        picked = logp.gather(-1, local.clamp(0, x.shape[1] - 1)[:, None])[:, 0] * mine
        return [-picked.sum() / rows, logp]

    torch.testing.assert_close(
        run([logits, target], None, "", 0)[0], F.cross_entropy(logits, target)
    )
    assert prove(Case("cross_entropy", [logits, target], run)) == {"t0", "v"}


@given(b=size, s=size, h=size, keep=st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_sum_over_a_split_dimension_is_partial(b: int, s: int, h: int, keep: bool) -> None:
    x = torch.randn(b, s, h)
    case = Case("sum", [x], plain(lambda x: x.sum(-1, keepdim=keep)), {"dims": (-1,)})
    assert prove(case) == {"d0", "d1", "d2"}
    for op, fn in (("mean", torch.mean), ("amax", torch.amax), ("logsumexp", torch.logsumexp)):
        case = Case(op, [x], plain(lambda x, fn=fn: fn(x, -1, keepdim=keep)), {"dims": (-1,)})
        assert prove(case) == {"d0", "d1"}


@given(b=size, s=size, h=size)
@settings(max_examples=10, deadline=None)
def test_gather_along_a_whole_dimension(b: int, s: int, h: int) -> None:
    xs = [torch.randn(b, s, h), torch.randint(h, (b, s, 2))]
    assert prove(Case("gather", xs, plain(lambda x, i: x.gather(2, i)), {"dim": 2})) == {"d0", "d1"}


def test_convolution_by_image() -> None:
    xs = [torch.randn(4, 6, 5, 5), torch.randn(8, 6, 3, 3), torch.randn(8)]
    assert prove(Case("conv", xs, plain(F.conv2d))) == {"n"}


@given(rows=st.sampled_from((4, 8)), k=size, n=size)
@settings(max_examples=10, deadline=None)
def test_grouped_matmul_by_features(rows: int, k: int, n: int) -> None:
    """Two experts, half of the rows each. Rows of a shard are a batch of their own."""
    ends = torch.tensor([rows // 2, rows], dtype=torch.int32)

    def run(xs: list[Tensor], shapes: Any, letter: str, index: int) -> list[Tensor]:
        if letter == "r":  # a shard of the rows comes with offsets of its own
            return [xs[0] @ xs[1][index]]
        x, w, _ = xs
        return [torch.cat([x[: rows // 2] @ w[0], x[rows // 2 :] @ w[1]])]

    xs = [torch.randn(rows, k), torch.randn(2, k, n), ends]
    assert prove(Case("grouped_matmul", xs, run)) == {"r", "k", "n"}


def test_every_row_has_a_kind_and_a_miss_says_how_to_add_one() -> None:
    assert len(OPS) > 40 and all(op.name == name for name, op in OPS.items())
    with pytest.raises(PlanError) as caught:
        rule(Node(name="layers.0/fft", op="fft", inputs=(), outputs=(), source="model.py:7"))
    assert "layers.0/fft model.py:7" in caught.value.where
    assert "docs/add-an-op.md" in caught.value.hints[0]
