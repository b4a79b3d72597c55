"""Properties of `quantize_mx` that hold for whatever a tensor holds, however it lies in memory; found by search.

Floats are compared with Python's own, which are exact here: every fp32 is a float, and so is its quotient by 2**s.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantization import Element, MXTensor, Quantizer, Rounding, Scaling, quantize_mx
from quantization.operators import HAS_TRITON

GROUP = 32
GRIDS = {
    Element.E2M1: [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    Element.E3M0: [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0],
}
LEAST, ZERO_STANDS_FOR = -127, Fraction(float(torch.tensor(1e-8)))
search = settings(max_examples=400, deadline=None, derandomize=True, database=None)

# Bit patterns of fp32: anything; near a power of two or a midpoint of the grid; and the special ones.
PATTERNS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.builds(
        lambda sign, exponent, mantissa, off: (sign << 31 | exponent << 23 | mantissa << 21) + off & 0xFFFFFFFF,
        *(st.integers(0, 1), st.integers(1, 253), st.integers(0, 3), st.integers(-2, 2)),
    ),
    st.builds(lambda sign, mantissa: sign << 31 | 127 << 23 | mantissa, st.integers(0, 1), st.integers(0, 2**23 - 1)),
    st.sampled_from([0, 1 << 31, 1, 0x007FFFFF, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x00800000]),
)
NOT_FINITE = st.sampled_from([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001])


@st.composite
def tensors(draw, finite: bool = False, max_elements: int = 200, dtypes=(torch.float32,)) -> torch.Tensor:
    """Up to three axes, permuted, sliced, expanded or as they come; in one of the dtypes."""
    lengths = st.one_of(st.integers(1, 5), st.integers(0, 70))
    shape = draw(st.lists(lengths, max_size=3).filter(lambda s: math.prod(s) <= max_elements))
    patterns = PATTERNS if finite else st.one_of(PATTERNS, PATTERNS, PATTERNS, NOT_FINITE)
    # A few patterns, dealt out: small examples, and groups that hold several alike.
    few = draw(st.lists(patterns, min_size=1, max_size=40))
    count = math.prod(shape)
    order = torch.randint(len(few), (count,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    x = torch.tensor(few, dtype=torch.int64).to(torch.int32).view(torch.float32)[order].reshape(shape)
    if finite:
        x = x.nan_to_num(1.0, 2.0, -2.0)
    x = x.to(draw(st.sampled_from(dtypes)))
    if finite:
        x = x.nan_to_num()
    how = draw(st.sampled_from(["as it is", "permuted", "sliced", "expanded"]))
    if how == "permuted":
        x = x.permute(draw(st.permutations(range(x.ndim))))
    elif how == "sliced" and x.ndim:
        x = torch.stack((x, -x), dim=-1).flatten(-2)[..., ::2]
    elif how == "expanded":
        x = x.unsqueeze(0).expand(2, *x.shape)
    return x


ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ELEMENTS, SCALINGS = st.sampled_from(Element), st.sampled_from(Scaling)
DRAWN = st.sampled_from([Rounding.NEAREST, Rounding.STOCHASTIC])
AXES = st.integers(-3, 2)


def quantized(x: torch.Tensor, axis: int, *how) -> MXTensor:
    element, scaling, rounding = how
    key = torch.tensor([7]) if rounding is Rounding.STOCHASTIC else None
    return quantize_mx(x, axis, element, scaling, rounding, key=key)


def fitting(axis: int, x: torch.Tensor) -> int:
    return axis % max(1, x.ndim)


def groups(x: torch.Tensor, t: MXTensor):
    """(values, quantized values, scale byte) of every group, as lists of Python's floats and an integer."""
    back = t.dequantize(torch.float64)
    if x.ndim == 0:
        x, back, scales = (v.reshape(1, 1) for v in (x, back, t.scales.view(torch.uint8)))
    else:
        scales = t.scales.view(torch.uint8).movedim(t.axis, -1)
        x, back = x.movedim(t.axis, -1), back.movedim(t.axis, -1)
    if x.numel() == 0:
        return
    length = x.shape[-1]
    rows = zip(x.to(torch.float32).double().reshape(-1, length).tolist(), back.reshape(-1, length))
    for (values, results), row_scales in zip(rows, scales.reshape(-1, scales.shape[-1]).tolist()):
        results = results.tolist()
        for i, byte in enumerate(row_scales):
            part = slice(GROUP * i, GROUP * (i + 1))
            yield values[part], results[part], byte


def exponent_by_definition(largest: Fraction, element: Element, scaling: Scaling) -> int:
    """s of paper section 3.2, in rational numbers: by trial, upwards from far below."""
    top = Fraction(GRIDS[element][-1])
    emax = {Element.E2M1: 2, Element.E3M0: 4}[element]
    s = math.frexp(float(largest))[1] - 8
    if scaling is Scaling.FLOOR:  # the greatest s with 2**(s + Emax) <= M
        while Fraction(2) ** (s + 1 + emax) <= largest:
            s += 1
    else:  # the least s with M <= Qp * 2**s
        while largest > top * Fraction(2) ** s:
            s += 1
    return max(s, LEAST)


@search
@given(tensors(dtypes=ALL_DTYPES), AXES, ELEMENTS, SCALINGS, DRAWN)
def test_scales_are_the_definitions_and_results_lie_on_the_grid(x, axis, element, scaling, rounding):
    t = quantized(x, fitting(axis, x), element, scaling, rounding)
    assert t.dequantize().shape == x.shape
    for values, results, byte in groups(x, t):
        if not all(map(math.isfinite, values)):
            assert byte == 0xFF and all(map(math.isnan, results))
            continue
        largest = Fraction(max(map(abs, values))) or ZERO_STANDS_FOR
        s = exponent_by_definition(largest, element, scaling)
        assert byte == s + 127
        for value, result in zip(values, results):
            assert abs(result) / 2.0**s in GRIDS[element]
            assert math.copysign(1, result) == math.copysign(1, value)


@search
@given(tensors(finite=True, dtypes=ALL_DTYPES), AXES, ELEMENTS, SCALINGS)
def test_nearest_is_no_further_than_half_a_step_and_ties_go_to_the_even_code(x, axis, element, scaling):
    t, grid = quantized(x, fitting(axis, x), element, scaling, Rounding.NEAREST), GRIDS[element]
    for values, results, byte in groups(x, t):
        for value, result in zip(values, results):
            y, q = (
                Fraction(abs(value)) / Fraction(2) ** (byte - 127),
                Fraction(abs(result)) / Fraction(2) ** (byte - 127),
            )
            assert scaling is Scaling.FLOOR or y <= grid[-1]  # truncation-free
            code = grid.index(q)
            distances = [abs(y - Fraction(g)) for g in grid]
            assert distances[code] == min(distances)
            assert distances.count(distances[code]) == 1 or code % 2 == 0


@search
@given(tensors(finite=True), AXES, ELEMENTS, SCALINGS)
def test_nearest_of_its_own_result_is_that_result(x, axis, element, scaling):
    """With the same scale or a finer one: bit for bit, whatever became of the largest magnitude."""
    axis = fitting(axis, x)
    once = quantized(x, axis, element, scaling, Rounding.NEAREST).dequantize()
    twice = quantized(once, axis, element, scaling, Rounding.NEAREST).dequantize()
    assert torch.equal(once, twice) and torch.equal(once.signbit(), twice.signbit())


@search
@given(tensors(finite=True), AXES, ELEMENTS, SCALINGS, st.integers(-(2**63), 2**63 - 1))
def test_stochastic_is_one_of_the_two_neighbours_and_the_grid_never_moves(x, axis, element, scaling, key):
    axis, grid = fitting(axis, x), GRIDS[element]
    t = quantize_mx(x, axis, element, scaling, Rounding.STOCHASTIC, key=torch.tensor([key]))
    for values, results, byte in groups(x, t):
        for value, result in zip(values, results):
            y = min(abs(value) / 2.0 ** (byte - 127), grid[-1])  # exact, but for what is far below the grid
            q = abs(result) / 2.0 ** (byte - 127)
            below, above = max(g for g in grid if g <= y), min(g for g in grid if g >= y)
            assert q in (below, above)
    again = quantize_mx(t.dequantize(), axis, element, scaling, Rounding.STOCHASTIC, key=torch.tensor([~key]))
    assert torch.equal(again.dequantize(), t.dequantize())


@search
@given(st.integers(0, 70), st.integers(0, 3), ELEMENTS, st.integers(0, 99))
def test_packing_and_unpacking_are_inverse(length, rows, element, seed):
    """Any code under any scale is the code of its value: all 16, scales that keep the values normal and not 0."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (rows, length), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(-100, 100, (rows, -(-length // GROUP)), generator=generator)
    codes[:, ::GROUP] = 7  # the group's largest: its scale stays
    grid = torch.tensor(GRIDS[element] + [-g for g in GRIDS[element]])
    x = grid[codes.long()] * torch.exp2(exponents.repeat_interleave(GROUP, 1)[:, :length].float())
    t = quantize_mx(x, element=element)
    assert torch.equal(t.scales.view(torch.uint8).long(), exponents + 127)
    unpacked = torch.stack((t.codes & 15, t.codes >> 4), dim=-1).flatten(1)
    assert torch.equal(unpacked[:, :length], codes) and not unpacked[:, length:].any()
    assert torch.equal(t.dequantize(), x) and torch.equal(t.dequantize().signbit(), x.signbit())


@search
@given(tensors(dtypes=ALL_DTYPES), AXES, ELEMENTS, SCALINGS, DRAWN)
def test_memory_layout_and_axis_do_not_matter(x, axis, element, scaling, rounding):
    axis = fitting(axis, x)
    a = quantized(x, axis, element, scaling, rounding)
    b = quantized(x.contiguous(), axis, element, scaling, rounding)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))
    if x.ndim:
        moved = quantized(x.movedim(axis, -1), -1, element, scaling, rounding).dequantize().movedim(-1, axis)
        assert torch.equal(moved.nan_to_num(1e30), a.dequantize().nan_to_num(1e30))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton has no release for this platform")
@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU kernels are compiled, and take no CPU tensors")
@settings(search, max_examples=60)
@given(tensors(max_elements=100, dtypes=(torch.float32, torch.bfloat16)), ELEMENTS, SCALINGS, st.sampled_from(Rounding))
def test_kernels_return_the_bits_of_the_reference(x, element, scaling, rounding):
    from quantization import reference
    from quantization.triton import kernels

    x_RL = x.reshape(-1, x.shape[-1]) if x.ndim and x.shape[-1] else x.reshape(1, -1)
    key = torch.tensor([3])
    ema = x_RL.float().flip(1).contiguous() if rounding is Rounding.EMA else None
    quantizer = Quantizer(element=element, scaling=scaling, rounding=rounding)
    options = {"key": key, "ema_RL": ema, "values_dtype": torch.float32}
    got, wanted = (b.quantize(x_RL, quantizer, **options) for b in (kernels, reference))
    assert torch.equal(got.codes_RB, wanted.codes_RB) and torch.equal(got.scales_RG, wanted.scales_RG)
    assert torch.equal(got.values_RL.isnan(), wanted.values_RL.isnan())
    bits = [v.values_RL.nan_to_num().contiguous().view(torch.int32) for v in (got, wanted)]
    assert torch.equal(*bits)
