"""Views and copies: which factors survive a change of shape."""

from __future__ import annotations

from math import gcd

from ir.graph import Dim, Node, Tensor
from ir.ops.base import Op, Spec, saves_nothing


def _is_one(size: Dim) -> bool:
    return str(size) == "1"


def _key(size: Dim) -> tuple[int, int, int, int]:
    """(numerator, denominator, batch, seq) of a size as a factor of a product."""
    if size.is_constant:
        return (size.numerator + size.offset, 1, 0, 0)
    return (size.numerator, size.denominator, size.batch, size.seq)


def _times(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    n, d = a[0] * b[0], a[1] * b[1]
    g = gcd(n, d) or 1
    return (n // g, d // g, a[2] + b[2], a[3] + b[3])


def groups(old: tuple[Dim, ...], new: tuple[Dim, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of old and new dimensions with equal products, sizes of one left out."""
    a = [i for i, d in enumerate(old) if not _is_one(d)]
    b = [i for i, d in enumerate(new) if not _is_one(d)]
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        x, y = _key(old[a[i]]), _key(new[b[j]])
        i, j = i + 1, j + 1
        while x != y:
            small_left = (x[2] + x[3], x[0] * y[1]) <= (y[2] + y[3], y[0] * x[1])
            if small_left and i < len(a):
                x, i = _times(x, _key(old[a[i]])), i + 1
                left.append(a[i - 1])
            elif j < len(b):
                y, j = _times(y, _key(new[b[j]])), j + 1
                right.append(b[j - 1])
            elif i < len(a):
                x, i = _times(x, _key(old[a[i]])), i + 1
                left.append(a[i - 1])
            else:
                break
        found.append((left, right))
    return found


def _carrier(run: list[int], shape: tuple[Dim, ...]) -> int:
    """The dimension of a run that a shard travels on: the first that is not purely the batch.

    Tokens are independent, so a shard of [b, s] on s stays a shard of the flattened b*s.
    """
    plain = [i for i in run if not (shape[i].batch and not shape[i].seq)]
    return (plain or run)[0]


def _view_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """Splits and merges keep one factor a run, on its carrier; the others must be whole."""
    old, new = ins[0].shape, node.outputs[0].shape
    left, right = ["!1"] * len(old), ["!1"] * len(new)
    for number, (a, b) in enumerate(groups(old, new)):
        for i in a:
            left[i] = f"!g{number}.{i}"
        for j in b:
            right[j] = f"!g{number}.{j}"
        left[_carrier(a, old)] = right[_carrier(b, new)] = f"g{number}"
    return Spec(inputs=(tuple(left),), outputs=(tuple(right),))


def _permute_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    rank = len(ins[0].shape)
    dims = node.attr("dims")
    if not isinstance(dims, tuple) or sorted(d % rank for d in dims) != [*range(rank)]:
        raise ValueError(f"dims of {dims} are no order of {rank} dimensions")
    letters = tuple(f"d{i}" for i in range(rank))
    return Spec(inputs=(letters,), outputs=(tuple(letters[d % rank] for d in dims),))


def _expand_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    new, old = node.outputs[0].shape, ins[0].shape
    offset = len(new) - len(old)
    right = [f"d{i}" for i in range(len(new))]
    left = [
        f"d{i + offset}" if str(d) == str(new[i + offset]) and not _is_one(d) else "!1"
        for i, d in enumerate(old)
    ]
    return Spec(inputs=(tuple(left),), outputs=(tuple(right),))


def _cut_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """slice, split, concat, pad, roll, flip: the cut dimension must be whole, unless it is kept.

    A split of a fused projection (qkv, gate and up) in equal shares may stay split when the
    parameter's rows are laid out shard by shard; attr `equal` says the shares are equal.
    """
    rank = len(node.outputs[0].shape) if node.op in ("split", "slice") else len(ins[0].shape)
    held = node.attr("dim")
    dims = held if isinstance(held, tuple) else (held,)
    cut = {int(d) % rank for d in dims if isinstance(d, int)} if rank else set()
    keep = node.op == "split" and node.attr("equal")
    letters = tuple(f"d{i}" if i not in cut or keep else f"!d{i}" for i in range(rank))
    return Spec(inputs=tuple(letters for _ in ins), outputs=tuple(letters for _ in node.outputs))


def _select_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """select, unbind: the dimension goes."""
    rank = len(ins[0].shape)
    held = node.number("dim") % rank
    letters = tuple(f"!d{i}" if i == held else f"d{i}" for i in range(rank))
    out = tuple(x for i, x in enumerate(letters) if i != held)
    return Spec(inputs=(letters,), outputs=tuple(out for _ in node.outputs))


def _stack_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    rank = len(ins[0].shape)
    held = node.number("dim") % (rank + 1)
    letters = [f"d{i}" for i in range(rank)]
    out = (*letters[:held], "!new", *letters[held:])
    return Spec(inputs=tuple(tuple(letters) for _ in ins), outputs=(out,))


def _stack_view_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """Experts' weights [n, k] (or biases [n]) beside each other: [e, k, n], read by pointers."""
    one = ("n", "k")[: len(ins[0].shape)]
    return Spec(inputs=(one,) * len(ins), outputs=(("!e", *reversed(one)),))


def _create_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    outs = tuple(tuple(f"d{i}" for i in range(len(t.shape))) for t in node.outputs)
    return Spec(inputs=tuple(tuple("!x" for _ in t.shape) for t in ins), outputs=outs)


def _whole_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """Complex views and triangles: nothing is split."""
    return Spec(
        inputs=tuple(tuple("!x" for _ in t.shape) for t in ins),
        outputs=tuple(tuple("!x" for _ in t.shape) for t in node.outputs),
    )


OPS = (
    Op(name="view", kind="free", spec=_view_spec, view=True, fusible=True),
    Op(name="reshape_copy", kind="memory", spec=_view_spec, fusible=True),
    Op(name="permute", kind="free", spec=_permute_spec, view=True, fusible=True),
    Op(name="complex", kind="free", spec=_whole_spec, view=True, fusible=True),
    Op(name="repeat", kind="memory", spec=_expand_spec, fusible=True),
    Op(name="triangle", kind="memory", spec=_whole_spec, fusible=True),
    Op(name="expand", kind="free", spec=_expand_spec, view=True, fusible=True),
    Op(name="slice", kind="free", spec=_cut_spec, view=True, fusible=True),
    Op(name="split", kind="free", spec=_cut_spec, view=True, fusible=True),
    Op(name="select", kind="free", spec=_select_spec, view=True, fusible=True),
    Op(name="concat", kind="memory", spec=_cut_spec, fusible=True),
    Op(name="pad", kind="memory", spec=_cut_spec, fusible=True),
    Op(name="roll", kind="memory", spec=_cut_spec, fusible=True),
    Op(name="stack", kind="memory", spec=_stack_spec, fusible=True),
    Op(name="stack_view", kind="free", spec=_stack_view_spec, view=True),
    Op(name="create", kind="memory", spec=_create_spec, saved=saves_nothing, fusible=True),
)
