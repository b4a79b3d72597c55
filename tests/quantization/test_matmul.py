"""FP8 matmuls: the numbers of the bf16 path, whatever the operands look like; what is lost is counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from quantization import Quantizer, QuantLinear, Recipe, has_fp8, quantize_mx, take_lost_groups
from quantization.formats import Element, Fp8, fp8_range
from quantization.matmul import multiply
from quantization.mx import backend_for
from quantization.reference import Operand

ALL_NEAREST = Recipe(*[Quantizer()] * 6)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def outlier_channels(randn, rows, length):
    x = randn(rows, length)
    x[:, ::17] *= 1000
    return x


def gelu_outputs(randn, rows, length):
    return F.gelu(3 * randn(rows, length))


def gradient_of_27_binades(randn, rows, length):
    exponents = torch.linspace(-40, -13, rows, device=randn(1).device).round()
    return randn(rows, length).sign() * torch.exp2(exponents)[:, None] * (1 + randn(rows, length).abs().clamp(max=0.4))


def weights(randn, rows, length):
    return randn(rows, length) * 0.02 * torch.exp2(randn(rows, 1))


def operands(x_RL: torch.Tensor, fp8: Fp8) -> tuple[Operand, Operand, int]:
    """The operand of `x_RL` in FP8 and in bf16, and the groups that FP8 has lost."""
    backend, q = backend_for(x_RL), Quantizer()
    lost = torch.zeros(1, dtype=torch.int64, device=x_RL.device)
    in_fp8 = backend.quantize(x_RL, q, fp8=fp8, largest=backend.largest_magnitude(x_RL), lost=lost, pack=False)
    in_bf16 = backend.quantize(x_RL, q, values_dtype=torch.bfloat16, pack=False)
    return Operand(in_fp8.values_RL, in_fp8.operand_scale), Operand(in_bf16.values_RL), int(lost)


@pytest.mark.parametrize("make", [outlier_channels, gelu_outputs, gradient_of_27_binades])
@pytest.mark.parametrize("shape", [(64, 128, 96), (197, 75, 45), (1, 1, 1)])
def test_fp8_and_bf16_products_agree_to_1e_5(make, shape, randn, device):
    """Before the output is rounded; against float64 as well."""
    rows, length, columns = shape
    a8, a16, lost_a = operands(make(randn, rows, length), Fp8.E5M2)
    b8, b16, lost_b = operands(weights(randn, columns, length), Fp8.E4M3)
    assert lost_a == lost_b == 0
    exact = a16.values_RL.double() @ b16.values_RL.double().T
    product = multiply(a8, b8, torch.float32)
    assert product.shape == (rows, columns) and product.dtype == torch.float32
    assert relative_error(product, exact) < 1e-5
    if device.type == "cuda":
        assert relative_error(product, multiply(a16, b16, torch.float32)) < 1e-5
    bias = randn(columns)
    with_bias = multiply(a8, b8, torch.bfloat16, bias)
    assert with_bias.dtype == torch.bfloat16
    assert relative_error(with_bias, exact + bias.bfloat16().double()) < 2**-8


@pytest.mark.parametrize("fp8", list(Fp8))
@pytest.mark.parametrize("element", list(Element))
def test_every_element_in_range_is_exact_and_none_below(fp8, element, device):
    """Groups at the largest scale, at the least that fits, and one below it."""
    bottom, top = fp8_range(fp8, element.format)
    magnitudes = torch.tensor(element.format.values, device=device).repeat(2)
    scales = torch.exp2(torch.tensor([0.0, bottom - top, bottom - top - 1], device=device))
    x = scales[:, None] * magnitudes
    backend, lost = backend_for(x), torch.zeros(1, dtype=torch.int64, device=device)
    got = backend.quantize(
        x,
        Quantizer(element=element),
        fp8=fp8,
        largest=backend.largest_magnitude(x),
        lost=lost,
    )
    values = got.values_RL.float() * got.operand_scale
    assert torch.equal(values[:2], x[:2]) and not values[2].any() and lost.item() == 1


def test_an_fp8_layer_trains_like_a_bf16_layer(randn, device):
    """The same operands: only the order of the sums and the last rounding to bf16 may differ."""
    torch.manual_seed(0)
    layer = QuantLinear(75, 45, device=device, recipe=ALL_NEAREST)
    x = outlier_channels(randn, 33, 75) * torch.linspace(1, 32, 33, device=device)[:, None]
    x.requires_grad_()
    dy = (randn(33, 45) * torch.exp2(3 * randn(33, 1))).bfloat16()
    results = []
    for layer.matmul in ("fp8", "bf16"):
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(x)
        results.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)))
    for a, b in zip(*results):
        assert a.dtype == b.dtype and relative_error(a, b) < 2**-8
    q1, q2 = quantize_mx(x).dequantize().double(), quantize_mx(layer.weight).dequantize().double()
    assert relative_error(results[0][0], q1 @ q2.T + layer.bias.double()) < 2**-7


def test_fp8_is_for_bf16_alone(randn, device):
    """Without autocast a layer multiplies in fp32, whatever it is set to."""
    layer, x, gradients = QuantLinear(64, 32, device=device, recipe=ALL_NEAREST), randn(40, 64), []
    for layer.matmul in ("fp8", "bf16"):
        gradients.append(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_an_empty_batch(device):
    layer = QuantLinear(64, 32, device=device)
    layer.matmul = "fp8"
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(torch.zeros(0, 64, device=device, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 32) and not layer.weight.grad.any()


def test_quantizers_that_are_off_leave_their_matmul_in_bf16(randn, device):
    layer = QuantLinear(64, 32, device=device, recipe=Recipe(q3=Quantizer(enabled=False)))
    layer.matmul = "fp8"
    x = randn(40, 64).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


def test_lost_groups_of_both_passes_are_counted(randn, device):
    layer = QuantLinear(64, 32, device=device, recipe=ALL_NEAREST)
    layer.matmul = "fp8"
    take_lost_groups(device)
    x = randn(64, 64)
    x[0] *= 2.0**40
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x.requires_grad_())
        assert take_lost_groups(device).item() == 63 * 2  # every group of the other rows
        y.backward(torch.ones_like(y))
    assert take_lost_groups(device).item() > 0
    assert take_lost_groups(device).item() == 0


def test_a_backward_pass_counts_every_underflowed_group_once(randn, device):
    """Row 0 of dY is 2^40 times the others, further than E5M2's 28 binades.

    Q3, whose groups lie along the rows: 63 of 64 groups underflow. Q5, whose groups of 32 lie along the 32 columns: the
    first group of a column holds row 0, the second one underflows, so 32 do. No group of W or of X does: the amax of a
    group is less than 14 binades below that of the tensor.
    """
    layer = QuantLinear(64, 32, device=device, recipe=ALL_NEAREST)
    layer.matmul = "fp8"
    x, dy = randn(64, 64).requires_grad_(), randn(64, 32)
    dy[0] *= 2.0**40
    for passes in (1, 2):
        take_lost_groups(device)
        for _ in range(passes):
            with torch.autocast(device.type, torch.bfloat16):
                y = layer(x)
            assert passes > 1 or take_lost_groups(device).item() == 0
            y.backward(dy.bfloat16())
        assert take_lost_groups(device).item() == (63 + 32) * passes


def test_the_output_of_a_frozen_fp8_layer_needs_no_gradient(randn, device):
    """The counter of the backward pass requires a gradient; it must not make the output require one."""
    layer = QuantLinear(64, 32, device=device).requires_grad_(False)
    layer.matmul = "fp8"
    with torch.autocast(device.type, torch.bfloat16):
        assert not layer(randn(8, 64)).requires_grad
        assert layer(randn(8, 64).requires_grad_()).requires_grad


def test_lost_groups_of_a_backward_pass_are_all_counted(randn, device):
    """One row of dY is so large that the groups of the 63 others are lost for dX, and for dW those of each of the 32
    columns that the row is not in; nothing is lost of X and W."""
    layer = QuantLinear(64, 32, device=device, recipe=ALL_NEAREST)
    layer.matmul = "fp8"
    take_lost_groups(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(randn(64, 64).requires_grad_())
    dy = torch.ones_like(y)
    dy[0] *= 2.0**40
    y.backward(dy)
    assert take_lost_groups(device).item() == 63 + 32


def test_fp8_needs_hardware_only_to_be_fast(device):
    assert has_fp8(torch.device("cpu")) is False
    if device.type == "cuda":
        assert has_fp8(device) == (torch.cuda.get_device_capability() >= (8, 9))
