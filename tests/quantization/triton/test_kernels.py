"""The Triton kernels return the bits of the reference: compiled on a GPU, interpreted without one."""

from __future__ import annotations

import os

import pytest
import torch

from quantization import Element, Quantizer, Rounding, Scaling, quantize_mx
from quantization.formats import Fp8

triton = pytest.importorskip("triton", reason="Triton has no release for this platform")
import triton.language as tl  # noqa: E402

from quantization import reference  # noqa: E402
from quantization.reference import Packed  # noqa: E402
from quantization.triton import columns, kernels, tiles  # noqa: E402
from quantization.triton.rounding import Constants, round_stochastic  # noqa: E402
from quantization.triton.rows import _quantize_kernel  # noqa: E402

ELEMENTS = pytest.mark.parametrize("element", list(Element))
SCALINGS = pytest.mark.parametrize("scaling", list(Scaling))
ROUNDINGS = pytest.mark.parametrize("rounding", list(Rounding))
SHAPES = [(1, 1), (5, 97), (3, 32), (33, 1), (4, 64), (34, 197), (50, 300)]


@pytest.fixture
def compare(device, assert_same_bits):
    """Both backends on one input: values, packed codes and scales, and back again."""

    def check(x, element, scaling, rounding, dtypes=(torch.bfloat16,), active=None):
        key = torch.randint(-(2**62), 2**62, (1,), device=x.device)
        ema = x.float() + 0.3 * x.float().abs().mean() * torch.randn_like(x.float())
        options = {"key": key, "ema_RL": ema if rounding is Rounding.EMA else None, "ema_active": active}
        q = Quantizer(element=element, scaling=scaling, rounding=rounding)
        for dtype in dtypes:
            expected = reference.quantize(x, q, values_dtype=dtype, **options)
            got = kernels.quantize(x, q, values_dtype=dtype, **options)
            for name in ("values_RL", "codes_RB", "scales_RG"):
                assert_same_bits(getattr(got, name), getattr(expected, name), f"{name} in {dtype}")
            back = [
                backend.dequantize(expected.codes_RB, expected.scales_RG, x.shape[1], element, dtype)
                for backend in (kernels, reference)
            ]
            assert_same_bits(back[0], back[1], f"dequantize to {dtype}")
            assert_same_bits(back[1], expected.values_RL.contiguous(), f"codes and values in {dtype}")

    return check


def test_kernels_are_compiled_on_a_gpu_and_interpreted_without(device):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    assert interpreted == (device.type == "cpu")
    assert isinstance(_quantize_kernel, triton.runtime.JITFunction) != interpreted


@ELEMENTS
@SCALINGS
@ROUNDINGS
@pytest.mark.parametrize("transposed", [False, True])
def test_odd_shapes_both_ways(element, scaling, rounding, transposed, randn, compare):
    for rows, length in SHAPES:
        x = randn(length, rows).T if transposed else randn(rows, length)
        compare(x * 2.0 ** (10 * rows % 37 - 18), element, scaling, rounding)


@ELEMENTS
@SCALINGS
@ROUNDINGS
def test_every_bf16_pattern(element, scaling, rounding, device, compare):
    """All 65,536 patterns, first sorted so that groups are alike, then shuffled so that groups span all binades."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(device)
    compare(patterns.view(-1, 512), element, scaling, rounding)
    finite = patterns[patterns.isfinite()]
    shuffled = finite[torch.randperm(finite.numel(), device=device)]
    compare(shuffled[: shuffled.numel() // 488 * 488].view(-1, 488), element, scaling, rounding)


@ELEMENTS
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(element, source, randn, compare):
    x = (randn(60, 70) * torch.exp2(randn(60, 1) * 8)).to(source)
    compare(x, element, Scaling.FLOOR, Rounding.NEAREST, dtypes=(torch.float32, torch.bfloat16, torch.float16))


@pytest.mark.parametrize("transposed", [False, True])
@ROUNDINGS
def test_random_fp32_bit_patterns(rounding, transposed, device, compare):
    """10**7 on a GPU: any bits at all in one half, one exponent a group in the other. 2 * 10**4 where interpreted."""
    rows, length = (2500, 4000) if device.type == "cuda" else (50, 400)
    bits = torch.randint(-(2**31), 2**31 - 1, (rows, length), dtype=torch.int32, device=device)
    bits[::2] = bits[::2] & ~0x7F800000 | torch.randint(0, 255, (rows // 2, 1), dtype=torch.int32, device=device) << 23
    x = bits.view(torch.float32)
    for element in Element:
        for scaling in Scaling:
            compare(x.T if transposed else x, element, scaling, rounding, dtypes=(torch.float32,))


@ELEMENTS
@SCALINGS
@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
@pytest.mark.parametrize("fp8", list(Fp8))
def test_fp8_values(element, scaling, rounding, fp8, randn, device, assert_same_bits):
    """Rows far below others, an all-zero group, groups whose codes are zero, an Inf; no multiple of 16 columns."""
    x = randn(37, 75) * torch.exp2(8 * randn(37, 1))
    x[0, :32] = 0
    x[1, :32] = torch.tensor([0x00000001], dtype=torch.int32, device=device).view(torch.float32)
    x[3, 40] = torch.inf
    key, q = torch.tensor([5], device=device), Quantizer(element=element, scaling=scaling, rounding=rounding)
    largest = reference.largest_magnitude(x)
    assert_same_bits(kernels.largest_magnitude(x), largest)
    results, counts = [], []
    for backend in (kernels, reference):
        lost = torch.zeros(1, dtype=torch.int64, device=device)
        results.append(backend.quantize(x, q, key=key, fp8=fp8, largest=largest, lost=lost))
        counts.append(lost.item())
    for name, a, b in zip(results[0]._fields, *results):
        assert_same_bits(a.float() if name == "values_RL" else a, b.float() if name == "values_RL" else b, name)
    assert results[0].values_RL.shape == (37, 80) and counts[0] == counts[1] > 0


@pytest.fixture
def compare_both_ways(randn, device, assert_same_bits):
    """`quantize_both` of one matrix, dense or packed, by both backends: rows, columns, sums, counts."""

    def check(shape, quantizers, packed, fp8):
        x = (randn(*shape) * torch.exp2(4 * randn(shape[0], 1))).bfloat16()
        x[:, 3] = 0
        x[-1, -1] = torch.inf
        first = Quantizer()
        codes, scales = reference.quantize(x, first)[1:3]
        source = Packed(codes, scales, shape[1], first) if packed else x
        key = torch.tensor([3], device=device)
        results, counts = [], []
        for backend in (kernels, reference):
            lost = torch.zeros(1, dtype=torch.int64, device=device)
            options = {"dtype": torch.bfloat16, "with_sum": not packed}
            if fp8 is not None:
                options |= {"fp8": fp8, "largest": backend.largest_magnitude(x), "lost": lost}
            results.append(backend.quantize_both(source, *quantizers, key=key, **options))
            counts.append(lost.item())
        for got, expected in zip(results[0][:2], results[1][:2]):
            if expected is None:
                assert got is None
                continue
            assert_same_bits(got.values_RL.float(), expected.values_RL.float())
            if fp8 is not None:
                assert_same_bits(got.scale, expected.scale)
        assert counts[0] == counts[1]
        if not packed:
            wanted = x.double().sum(0)
            errors = (results[0][2] - wanted).abs()[:-1] <= 1e-6 * x.double().abs().sum(0)[:-1]
            assert errors.all() and results[0][2][-1] == torch.inf

    return check


@ELEMENTS
@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fp8", [None, *Fp8])
def test_both_ways(element, rounding, packed, fp8, device, compare_both_ways):
    q = Quantizer(element=element, scaling=Scaling.FLOOR if packed else Scaling.TRUNCATION_FREE, rounding=rounding)
    compare_both_ways((33, 70), (q, q), packed, fp8)
    if device.type == "cuda":
        compare_both_ways((1000, 3000), (q, q), packed, fp8)


PAIRS = {
    "rows alone": (Quantizer(rounding="stochastic"), None),
    "columns alone": (None, Quantizer(rounding="stochastic")),
    "different roundings": (Quantizer(), Quantizer(rounding="stochastic")),
    "different elements": (Quantizer(rounding="stochastic"), Quantizer(element="e3m0", rounding="stochastic")),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("packed", [False, True])
def test_two_quantizers_of_one_source(pair, packed, compare_both_ways):
    compare_both_ways((40, 66), PAIRS[pair], packed, Fp8.E5M2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(34, 130), (64, 128)])  # ragged tiles and whole ones
def test_both_ways_in_several_tiles(shape, packed, compare_both_ways):
    q = Quantizer(rounding="stochastic")
    compare_both_ways(shape, (q, q), packed, Fp8.E5M2)


@pytest.mark.parametrize("shape", [(34, 70), (32, 64)])
def test_wide_offsets_give_the_same_bits(shape, monkeypatch, compare, randn, compare_both_ways):
    """Every kernel in the form that tensors of 2**31 elements and more take, on small ones."""
    monkeypatch.setattr(tiles, "_FIRST_WIDE_OFFSET", 1)
    assert tiles.is_wide(torch.empty(2))
    q = Quantizer(rounding="stochastic")
    compare(randn(*shape), q.element, q.scaling, q.rounding)
    compare_both_ways(shape, (q, q), False, Fp8.E5M2)
    compare_both_ways(shape, (None, q), True, Fp8.E5M2)


def test_other_group_sizes_take_the_reference(randn, monkeypatch, assert_same_bits):
    """The tiles of the kernels hold one group of 32 tokens."""
    monkeypatch.setattr(columns, "GROUP_SIZE", 16)
    monkeypatch.setattr(columns, "_quantize_dense", None)
    monkeypatch.setattr(columns, "_quantize_packed", None)
    x, q = randn(40, 70), Quantizer()
    made = [backend.quantize_both(x, q, q, dtype=torch.float32, with_sum=True) for backend in (kernels, reference)]
    for got, wanted in zip(made[0][:2], made[1][:2]):
        assert_same_bits(got.values_RL.contiguous(), wanted.values_RL.contiguous())


def test_both_ways_of_an_empty_matrix(device):
    q = Quantizer()
    for shape in ((0, 40), (4, 0)):
        x = torch.empty(shape, device=device)
        rows, columns, total = kernels.quantize_both(x, q, q, dtype=torch.bfloat16, with_sum=True)
        assert rows.values_RL.shape == shape and columns.values_RL.shape == shape[::-1]
        assert torch.equal(total, torch.zeros(shape[1], device=device))


def test_the_fp8_scale_of_an_empty_matrix(device, assert_same_bits):
    q = Quantizer()
    torch.use_deterministic_algorithms(True)  # memory that nothing writes is NaN
    try:
        for shape in ((0, 40), (4, 0)):
            x = torch.empty(shape, device=device)
            found = []
            for backend in (kernels, reference):
                lost = torch.zeros(1, dtype=torch.int64, device=device)
                options = {"fp8": Fp8.E5M2, "largest": backend.largest_magnitude(x), "lost": lost}
                rows, columns, _ = backend.quantize_both(x, q, q, **options)
                alone = backend.quantize(x, q, **options)
                found.append(torch.stack([made.scale.view(()) for made in (rows, columns)] + [alone.operand_scale[0]]))
            assert_same_bits(*found)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("active", [False, True])
def test_q_ema_switch_on_the_device(active, randn, device, compare):
    switch = torch.tensor(active, device=device)
    compare(randn(40, 70), Element.E2M1, Scaling.TRUNCATION_FREE, Rounding.EMA, active=switch)


def test_every_scale_byte(device, assert_same_bits):
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat(256, 1)[:, :16].contiguous()
    scales = torch.arange(256, dtype=torch.uint8, device=device).view(256, 1)
    for element in Element:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a = kernels.dequantize(codes, scales, 32, element, dtype)
            b = reference.dequantize(codes, scales, 32, element, dtype)
            assert_same_bits(a, b, f"{element} to {dtype}")
            assert b[255].isnan().all() and b[:255].isfinite().all()


def test_stochastic_rounding_is_unbiased_over_all_draws(device, positions_to_round):
    """Of all 2**b draws, just as many round up as the element's position says (see `positions_to_round`)."""
    fmt = Element.E2M1.format
    cases = list(positions_to_round(fmt))
    for y, code, ups in cases if device.type == "cuda" else cases[1::7]:
        counts = torch.zeros(2, dtype=torch.int32, device=device)
        block = 2**18 if device.type == "cpu" else 2**10
        grid = (2**fmt.random_bits // block,)
        lower, upper = fmt.magnitudes[code : code + 2]
        _round_all_draws[grid](counts, y, lower, upper, Constants.of(Quantizer(rounding="stochastic")), block)
        assert counts.tolist() == [2**fmt.random_bits - ups, ups], y


@triton.jit
def _round_all_draws(counts_ptr, y, lower, upper, Q: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the numbers of draws that round `y` to `lower` and to `upper` to two counts."""
    draw = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = round_stochastic(tl.full((BLOCK,), y, tl.float32), draw, Q)
    tl.atomic_add(counts_ptr, tl.sum((value == lower).to(tl.int32), axis=0))
    tl.atomic_add(counts_ptr + 1, tl.sum((value == upper).to(tl.int32), axis=0))


def test_empty(device):
    for shape in ((0, 40), (4, 0)):
        got = kernels.quantize(
            torch.empty(shape, device=device),
            Quantizer(scaling=Scaling.FLOOR),
            values_dtype=torch.bfloat16,
        )
        assert got.values_RL.shape == shape and got.codes_RB.shape == (shape[0], (shape[1] + 1) // 2)


def test_quantize_mx_gives_the_same_bits_on_cpu_and_device(randn, device):
    x, key = randn(33, 197), torch.tensor([12345])
    for rounding in ("nearest", "stochastic"):
        for axis in (0, 1):
            on_device = quantize_mx(x, axis=axis, rounding=rounding, key=key.to(device))
            on_cpu = quantize_mx(x.cpu(), axis=axis, rounding=rounding, key=key)
            assert torch.equal(on_device.codes.cpu(), on_cpu.codes)
            assert torch.equal(on_device.scales.view(torch.uint8).cpu(), on_cpu.scales.view(torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2**31 elements take a GPU's memory")
def test_more_than_2_31_elements(device, assert_same_bits):
    x = torch.empty(2**16 + 7, 2**15 + 3, dtype=torch.bfloat16, device=device).normal_()
    key = torch.tensor([9], device=device)
    got = kernels.quantize(x, Quantizer(), key=key)
    expected = reference.quantize(x[-64:], Quantizer(), key=key)
    assert_same_bits(got.codes_RB[-64:], expected.codes_RB)
    assert_same_bits(got.scales_RG[-64:], expected.scales_RG)
