"""The operators of a compiled graph give the backend's numbers and tell the compiler the right shapes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantization import Quantizer, operators, quantize_mx
from quantization.formats import Fp8, Rounding
from quantization.mx import backend_for
from quantization.reference import Packed

NEAREST, STOCHASTIC = Quantizer(), Quantizer(rounding="stochastic")
SHAPES = [(0, 64), (1, 1), (33, 75), (64, 96), (5, 1100)]


def tensors(results: object) -> list[torch.Tensor]:
    """All tensors of nested tuples, in order."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for part in results if part is not None for t in tensors(part)] if isinstance(results, tuple) else []


def assert_alike(call, arguments: tuple, backend, assert_same_bits) -> None:
    """`call(module, *arguments)` by the operators, by the backend, and by the compiler's idea of the operators.

    Arguments of int64 [1] are counters: each call gets its own, and they must end alike.
    """
    copies = [[a.clone() if isinstance(a, torch.Tensor) else a for a in arguments] for _ in range(2)]
    real, expected = (tensors(call(module, *copy)) for module, copy in zip((operators, backend), copies))
    for a, b in zip(*copies):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(), b.nan_to_num())
    with FakeTensorMode() as mode:
        fake = tensors(call(operators, *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)))
    assert len(real) == len(expected) == len(fake) > 0
    for a, b, c in zip(real, expected, fake):
        assert_same_bits(a.float(), b.float())
        assert (a.shape, a.dtype) == (c.shape, c.dtype) and a.is_contiguous() and c.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("fp8", [None, Fp8.E5M2])
def test_quantize(shape, rounding, pack, fp8, randn, device, assert_same_bits):
    x = randn(*shape).bfloat16()
    x[:1] *= 2**-40  # lost in FP8 where other rows are not
    backend, lost = backend_for(x), torch.zeros(1, dtype=torch.int64, device=device)
    key, ema, active = torch.arange(1, 2, device=device), randn(*shape), torch.ones((), device=device, dtype=torch.bool)

    def call(module, x, key, ema, active, largest, lost):
        how = {"values_dtype": torch.bfloat16} if fp8 is None else {"fp8": fp8, "largest": largest, "lost": lost}
        if rounding is Rounding.STOCHASTIC:
            how["key"] = key
        if rounding is Rounding.EMA:
            how |= {"ema_RL": ema, "ema_active": active}
        return module.quantize(x, Quantizer(rounding=rounding), pack=pack, **how)

    arguments = (x, key, ema, active, backend.largest_magnitude(x), lost)
    assert_alike(call, arguments, backend, assert_same_bits)


@pytest.mark.parametrize("active", [False, True])
def test_an_average_decides_once_it_is_in_use(active, randn, device, assert_same_bits):
    """Before its tenth update Q2 rounds to nearest; the switch is a tensor on the device."""
    x, ema = randn(33, 75), randn(33, 75)
    q, switch = Quantizer(rounding=Rounding.EMA), torch.tensor(active, device=device)
    got = operators.quantize(x, q, ema_RL=ema, ema_active=switch, values_dtype=torch.float32)
    wanted = quantize_mx(x, rounding="ema", ema=ema) if active else quantize_mx(x)
    assert_same_bits(got.values_RL, wanted.dequantize())
    assert_same_bits(got.codes_RB, wanted.codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("which", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("fp8", [None, Fp8.E4M3])
def test_quantize_both(shape, packed, which, fp8, randn, device, assert_same_bits):
    x = randn(*shape).bfloat16()
    x[:1] *= 2**-40
    backend, lost = backend_for(x), torch.zeros(1, dtype=torch.int64, device=device)
    _, codes, scales, _ = backend.quantize(x, NEAREST)
    key = torch.tensor([2], device=device)

    def call(module, x, codes, scales, key, largest, lost):
        source = Packed(codes, scales, shape[1], NEAREST) if packed else x
        how = {"dtype": torch.bfloat16} if fp8 is None else {"fp8": fp8, "largest": largest, "lost": lost}
        quantizers = (STOCHASTIC if wanted else None for wanted in which)
        return module.quantize_both(source, *quantizers, key=key, with_sum=not packed, **how)

    arguments = (x, codes, scales, key, backend.largest_magnitude(x), lost)
    assert_alike(call, arguments, backend, assert_same_bits)


def test_what_is_packed_is_read_in_its_own_element(randn, device, assert_same_bits):
    made_by = Quantizer(element="e3m0")
    x = randn(33, 75)
    backend = backend_for(x)
    _, codes, scales, _ = backend.quantize(x, made_by)
    source = Packed(codes, scales, 75, made_by)
    rows, columns, _ = operators.quantize_both(source, NEAREST, NEAREST, dtype=torch.float32)
    values = quantize_mx(x, element="e3m0").dequantize()
    assert_same_bits(rows.values_RL, quantize_mx(values).dequantize())
    assert_same_bits(columns.values_RL, quantize_mx(values, axis=0).dequantize().T.contiguous())


@pytest.mark.parametrize("shape", [(0, 4), *SHAPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_magnitude(shape, dtype, randn, assert_same_bits):
    x = randn(*shape).to(dtype)
    if x.numel():
        x[0, 0] = torch.inf
    assert_alike(lambda module, x: module.largest_magnitude(x), (x,), backend_for(x), assert_same_bits)


def test_the_largest_magnitude_of_what_is_yet_to_be_rounded(device):
    """The bits of 3.999 and of 4, its bf16: floor scaling tells them apart."""
    bits = torch.tensor([[3.999]], device=device).view(torch.int32)
    assert operators.rounded_to_bf16(bits).view(torch.float32).item() == 4.0
    most = torch.tensor([torch.finfo(torch.float32).max], device=device).view(torch.int32)
    assert operators.rounded_to_bf16(most).view(torch.float32).isfinite()


def test_dequantize(randn, assert_same_bits):
    x = randn(33, 75)
    backend = backend_for(x)
    _, codes, scales, _ = backend.quantize(x, NEAREST)

    def call(module, codes, scales):
        return module.dequantize(codes, scales, 75, NEAREST.element, torch.float32)

    assert_alike(call, (codes, scales), backend, assert_same_bits)
