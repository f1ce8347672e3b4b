"""What a served model is made of, read from its folded graph: the work a token asks of each layer.

Training keeps whole sequences; a server keeps a cache. So each layer class is read once for its
matrices (and how tensor parallelism splits them), its attention (and what a token leaves in the
cache), its experts, its recurrent state and its elementwise kernels; the loss is left out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

BLOCKS = (
    "attention", "mlp", "shared_experts", "routed_experts", "router", "embeddings", "head",
)  # fmt: skip
PARTS_OF = {"attention_out": "attention"}  # what may have a format that its block has not


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Matrices that read one input, as one kernel: [rows, k] x [k, n], n the sum of `parts`.

    parts: (columns, key-value heads, 0 for any other columns): where tp exceeds those heads they
    are repeated. split: column, row or whole (every rank has it). rows: a token's. expands: it
    makes heads' keys and values of a latent that the cache keeps (MLA).
    """

    block: str
    k: int
    parts: tuple[tuple[int, int], ...]
    split: str
    rows: int = 1
    expands: bool = False

    @property
    def part(self) -> str:
        """The finest class that may have a format of its own: what leaves attention, else its
        block."""
        leaves = self.block == "attention" and self.split == "row"
        return "attention_out" if leaves else self.block

    @property
    def n(self) -> int:
        return sum(n for n, _ in self.parts)

    @property
    def elements(self) -> int:
        return self.n * self.k

    def columns(self, tp: int) -> float:
        """Columns of one of tp ranks."""
        if self.split != "column":
            return float(self.n)
        return sum(n / min(tp, heads) if heads else n / tp for n, heads in self.parts)

    def inner(self, tp: int) -> float:
        return self.k / tp if self.split == "row" else float(self.k)

    def held(self, tp: int) -> float:
        """Elements on one of tp ranks."""
        return self.columns(tp) * self.inner(tp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend:
    """One attention. window: keys that a query sees, 0 is all; prompt_window: that one of a prompt
    sees, where it is another (None: the same). latent, rope: elements a token
    leaves in the cache for all heads together (MLA); else 0, and heads have their own.
    recent, block, top: what a lossy policy keeps of what it sees (`serving_kv.py`), 0 is all.
    """

    heads: int
    kv_heads: int
    dim_qk: int
    dim_v: int
    window: int = 0
    prompt_window: int | None = None
    latent: int = 0
    rope: int = 0
    recent: int = 0
    block: int = 0
    top: int = 0

    @property
    def read_window(self) -> int:
        """Keys that a query of a prompt sees, 0 is all."""
        return self.window if self.prompt_window is None else self.prompt_window

    def cached(self, tp: int = 1) -> float:
        """Elements a token leaves in the cache of one of tp ranks."""
        if self.latent:
            return float(self.latent + self.rope)
        return max(self.kv_heads / tp, 1.0) * (self.dim_qk + self.dim_v)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Routed experts: `inter` is a third of an expert's elements over hidden (gate, up, down)."""

    experts: int
    topk: int
    hidden: int
    inter: float

    @property
    def elements(self) -> float:
        return 3.0 * self.experts * self.hidden * self.inter


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """A scan or a short convolution: its state a sequence, FLOPs and bytes a token in chunks."""

    state_bytes: float
    flop: float
    moved_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Light:
    """Elementwise kernels of one layer, fused in chains: how many, and bytes a token, of values
    that every rank has (whole) and of values that tp splits. Run eagerly: ops of the layer of
    all kinds, views apart, and elements a token that the light ones read and write."""

    kernels: int
    whole_bytes: float
    split_bytes: float
    ops: int = 0
    eager_elements: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One class of layers. reductions: sums over the tp ranks that a token's pass needs, by the
    block that they follow; norm_reductions: of norms over split heads, a number a token each."""

    count: int
    matrices: tuple[Matrix, ...]
    attention: tuple[Attend, ...]
    experts: tuple[Experts, ...]
    recurrences: tuple[Recurrence, ...]
    light: Light
    reductions: tuple[str, ...]
    norm_reductions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as served: its layer classes, embedding and head. other_elements: norms, biases.
    order: the class of each layer, by its place in `layers`; without it classes are spread evenly.
    """

    name: str
    hidden: int
    vocab: int
    tied: bool
    layers: tuple[LayerShape, ...]
    head: tuple[Matrix, ...]
    embedding_elements: int
    other_elements: int
    order: tuple[int, ...] = ()

    @property
    def eager_ops(self) -> int:
        """Ops of a step that is run eagerly; each attention adds keys and values to its cache."""
        return sum(layer.count * (layer.light.ops + 2 * len(layer.attention))
                   for layer in self.layers)  # fmt: skip

    @property
    def layer_count(self) -> int:
        return sum(layer.count for layer in self.layers)

    def stages(self, pp: int) -> tuple[tuple[float, ...], ...]:
        """Of each pipeline stage how many layers of each class: as even as layers come, the first
        stages have more."""
        return _stages(tuple(layer.count for layer in self.layers), self.order, pp)

    @property
    def routed_ops(self) -> int:
        """Ops of the layers with routed experts, views apart."""
        return sum(layer.count * layer.light.ops for layer in self.layers if layer.experts)

    def block_elements(self) -> dict[str, float]:
        """Elements of the whole model's weights by block class, those there are."""
        found = dict.fromkeys(BLOCKS, 0.0)
        found["embeddings"] = float(self.embedding_elements)
        if not self.tied:
            found["head"] = float(sum(m.elements for m in self.head))
        for layer in self.layers:
            for m in layer.matrices:
                found[m.block] += float(layer.count * m.elements)
            found["routed_experts"] += sum(layer.count * e.elements for e in layer.experts)
        return {block: number for block, number in found.items() if number}


@functools.lru_cache(maxsize=256)
def _stages(
    counts: tuple[int, ...], order: tuple[int, ...], pp: int
) -> tuple[tuple[float, ...], ...]:
    layers = sum(counts)
    found, first = [], 0
    for stage in range(pp):
        size = layers // pp + (stage < layers % pp)
        here = order[first : first + size]
        first += size
        found.append(tuple(
            float(here.count(k)) if order else count * size / layers
            for k, count in enumerate(counts)
        ))  # fmt: skip
    return tuple(found)
