"""Quantities printed and read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import units
from cost_models.units import format_rate, format_short_rate
from ir.errors import UsageError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (85.02e9, "85.0 GB"),
        (999_960_000_000, "1.0 TB"),
        (1536, "1.5 kB"),
    ],
)
def test_bytes_are_printed_with_si_prefixes(value: float, text: str) -> None:
    assert units.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (18.44, "18.4 s"),
        (3.2e-3, "3.20 ms"),
        (412e-6, "412 us"),
        (0.9996, "1.00 s"),
        (123.4, "123 s"),
        (3e-12, "0.003 ns"),
    ],
)
def test_seconds_keep_three_digits(value: float, text: str) -> None:
    assert units.format_seconds(value) == text


def test_few_a_second_keep_their_digits() -> None:
    rates = {9701.4: "9,701", 99.97: "100", 27.61: "27.6", 1: "1.00", 0.3107: "0.311", 0: "0",
             2.5e-6: "2.5e-06"}  # fmt: skip
    assert {value: format_rate(value) for value in rates} == rates
    assert [format_short_rate(v) for v in (0.3107, 9701.4)] == ["0.311", "9.70 k"]


def test_counts_and_rates_are_printed() -> None:
    assert units.format_count(8_030_261_248) == "8.03 B"
    assert units.format_count(512) == "512"
    assert units.format_flop_per_s(989.4e12) == "989.4 TFLOP/s"
    assert units.format_flop(54.2e12) == "54.2 TFLOP"
    assert units.format_bytes_per_s(450e9) == "450.0 GB/s"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("80GB", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("1.5 kB", 1500),
        ("7", 7),
        (7, 7),
        ("2e9", 2 * 10**9),
    ],
)
def test_sizes_are_read(text: str | int, value: int) -> None:
    assert units.parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3 XB", "3iB", -1, True, float("nan")])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(UsageError, match="no size"):
        units.parse_bytes(text)


@given(st.integers(0, 10**18))
def test_printed_bytes_read_back_within_their_digits(value: int) -> None:
    read = units.parse_bytes(units.format_bytes(value))
    assert abs(read - value) <= 0.05 * max(value, 1)
