"""The host beside a GPU, or in its place: what its CPU multiplies at, and what calls cost it.

`plan calibrate` measures it and writes `[constants.host]` of the hardware file:

    host.DTYPE.row_bytes_per_s    weights that a product of one row reads
    host.DTYPE.read_bytes_per_s   weights that a product of more rows reads, and packs
    host.DTYPE.flop_per_s         products of many rows
    host.DTYPE.column_s           a column of a product: its weights lie by themselves, and nothing
                                  fetches them ahead of their first bytes
    host.DTYPE.smoothness         how one limit gives way to the other: 1 is one after the other
    host.DTYPE.cached_bytes_per_s weights that a product of one row reads in the last-level cache
    host.disk_bytes_per_s         a piece of a file that is fetched on demand: not read ahead
    host.fetch_s                  a piece that is fetched on demand, before its first byte
    host.piece_s                  a unit's streamed weights: asked for, waited for, put in place
    host.op_s                     an op of a layer, run eagerly: Python, dispatch, allocation
    host.token_s                  a token of `generate` beside the model's own ops
    host.request_s                a call of `generate` before its first step

What a file lacks is assumed, as `serving_host.toml` says, and named in `assumed`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.checked_toml import read_toml
from cost_models.constants_table import Constant, load_constants
from cost_models.hardware import Device

FloatArray: TypeAlias = NDArray[np.float64]

FITTED_KEYS = ("row_bytes_per_s", "read_bytes_per_s", "column_s", "flop_per_s", "smoothness")
PRODUCT_KEYS = (*FITTED_KEYS, "cached_bytes_per_s")
_LATER_KEYS = {"column_s", "cached_bytes_per_s"}  # files lack them that are older
DESKTOP_BYTES_PER_S = 1.1e11  # two channels of DDR5: what few cores of one socket can draw
_TABLE = Path(__file__).with_name("serving_host.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Matrix products of a CPU, all of its cores: reading weights and multiplying, which overlap
    wholly at a smoothness of inf and not at all at 1. One row has a kernel of its own, that reads
    weights as they lie; of more rows weights are packed first."""

    row_bytes_per_s: float
    read_bytes_per_s: float
    column_s: float = 0.0
    flop_per_s: float
    smoothness: float
    cached_bytes_per_s: float | None = None

    def seconds(
        self, moved_bytes: FloatArray | float, flop: FloatArray | float,
        rows: FloatArray | float = np.inf, columns: FloatArray | float = 0.0,
    ) -> FloatArray:  # fmt: skip
        """Of a product of so many rows and columns that reads so many bytes once."""
        rate = np.where(np.asarray(rows) <= 1, self.row_bytes_per_s, self.read_bytes_per_s)
        read_s = np.asarray(moved_bytes, dtype=np.float64) / rate + columns * self.column_s
        multiply_s = np.asarray(flop, dtype=np.float64) / self.flop_per_s
        if np.isinf(self.smoothness):
            return np.asarray(np.maximum(read_s, multiply_s))
        p = self.smoothness
        return np.asarray((read_s**p + multiply_s**p) ** (1 / p))

    def saved_s(self, weight_bytes: float, columns: float) -> float:
        """What a product does not take whose weights were copied just before, and lie in a cache;
        0 where that was not measured."""
        if self.cached_bytes_per_s is None:
            return 0.0
        read_s = weight_bytes / self.row_bytes_per_s + columns * self.column_s
        return max(0.0, read_s - weight_bytes / self.cached_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host. products: by dtype, those that were measured. disk_bytes_per_s: None where that was
    not. piece_s, op_s, token_s, request_s: None where an engine's own numbers stand. assumed: what
    was not measured, and its source."""

    products: tuple[tuple[str, Products], ...]
    fetch_s: float
    disk_bytes_per_s: float | None
    piece_s: float | None
    op_s: float | None
    token_s: float | None
    request_s: float | None
    assumed: tuple[Constant, ...]

    def measured(self, dtype: str) -> Products | None:
        """Products in a dtype, None where they were not measured."""
        return dict(self.products).get(dtype)

    def products_of(self, dtype: str, dram_bytes_per_s: float) -> Products:
        """As measured, else what is assumed of a CPU with memory of that bandwidth."""
        return self.measured(dtype) or assumed_products(dram_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assumed:
    number: float
    source: str


@functools.cache
def _table() -> dict[str, _Assumed]:
    raw = read_toml(_TABLE, "table of what is assumed of hosts")
    return {name: _Assumed(number=float(row["value"]), source=" ".join(row["source"].split()))
            for name, row in raw.items()}  # fmt: skip


def _assumed(name: str) -> _Assumed:
    return _table()[name]


def assumed_products(dram_bytes_per_s: float) -> Products:
    """Of a CPU with memory of that bandwidth, where it was not measured."""
    desktop = dram_bytes_per_s <= DESKTOP_BYTES_PER_S
    share = _assumed("read_share_desktop" if desktop else "read_share").number
    read = share * dram_bytes_per_s
    return Products(
        row_bytes_per_s=read, read_bytes_per_s=read,
        flop_per_s=_assumed("flop_per_byte").number * dram_bytes_per_s, smoothness=np.inf,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def host_of(device: Device) -> Host:
    """The host of a device, as its hardware file was calibrated."""
    table = load_constants(device.constants)
    products = []
    for dtype in ("fp32", "bf16"):
        names = {key: f"host.{dtype}.{key}" for key in PRODUCT_KEYS}
        numbers = {key: table.number(name) for key, name in names.items() if table.has(name)}
        if numbers.keys() >= {*PRODUCT_KEYS} - _LATER_KEYS:
            products.append((dtype, Products(**numbers)))
    keys = ("fetch_s", "disk_bytes_per_s", "piece_s", "op_s", "token_s", "request_s")
    measured = {k: table.number(f"host.{k}") for k in keys if table.has(f"host.{k}")}
    unmeasured = ("read_share", "read_share_desktop", "flop_per_byte") if not products else ()
    lacking = [*unmeasured, *(() if "fetch_s" in measured else ("fetch_s",))]
    return Host(
        products=tuple(products), fetch_s=measured.get("fetch_s", _assumed("fetch_s").number),
        disk_bytes_per_s=measured.get("disk_bytes_per_s"), piece_s=measured.get("piece_s"),
        op_s=measured.get("op_s"), token_s=measured.get("token_s"),
        request_s=measured.get("request_s"),
        assumed=tuple(
            Constant(name=f"host.{name}", value=_assumed(name).number, source=_assumed(name).source)
            for name in lacking
        ),
    )  # fmt: skip
