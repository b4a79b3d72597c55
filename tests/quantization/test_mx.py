"""`quantize_mx`: what a user sees. Grid, ties, scales, corner cases, packing, layout, stochastic rounding, errors."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch._weights_only_unpickler import _get_user_allowed_globals

from quantization import Element, MXTensor, Rounding, Scaling, load_mx, quantize_mx, save_mx
from quantization.reference import _stochastic_code

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E3M0 = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
GRIDS = {"e2m1": E2M1, "e3m0": E3M0}

ELEMENTS = pytest.mark.parametrize("element", list(Element))
SCALINGS = pytest.mark.parametrize("scaling", list(Scaling))


def unpack(codes: torch.Tensor, length: int) -> list[int]:
    return torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten()[:length].tolist()


def scale_bytes(t) -> list[int]:
    return t.scales.view(torch.uint8).flatten().tolist()


def slow_scale_exponent(largest: float, element: str, scaling: str) -> int:
    """Section 3.2 in exact rational arithmetic, for a positive `largest`."""
    top, emax = GRIDS[element][-1], {"e2m1": 2, "e3m0": 4}[element]
    mantissa, exponent = math.frexp(largest)  # largest = mantissa * 2**exponent, mantissa in [0.5, 1)
    if scaling == "floor":
        return max(exponent - 1 - emax, -127)
    s = -200
    while largest / 2.0**s > top:  # exact: division by a power of two in double precision
        s += 1
    return max(s, -127)


def slow_quantize(values: list[float], element: str, scaling: str) -> list[float]:
    """Nearest rounding of one group by search over the grid."""
    grid = GRIDS[element]
    largest = max(map(abs, values)) or float(torch.tensor(1e-8))
    scale = 2.0 ** slow_scale_exponent(largest, element, scaling)
    result = []
    for value in values:
        y = abs(value) / scale
        nearest = min(range(8), key=lambda code: (abs(grid[code] - y), code % 2))
        result.append(math.copysign(grid[nearest] * scale, value))
    return result


@ELEMENTS
def test_every_code_is_decoded_and_encoded_as_itself(element, device):
    grid = GRIDS[element.value]
    x = torch.tensor(grid + [-g for g in grid], device=device)
    t = quantize_mx(x, element=element)
    assert scale_bytes(t) == [127]
    assert unpack(t.codes, 16) == list(range(16))
    values = t.dequantize()
    assert torch.equal(values, x) and torch.equal(values.signbit(), x.signbit())


def test_codes_are_ocp_storage(device):
    t = quantize_mx(torch.tensor([0.5, -6.0, 4.0], device=device))
    assert t.codes.tolist() == [0xF1, 0x06]  # the first element in the low nibble, an odd end padded with zero
    assert t.codes.dtype == torch.uint8 and t.scales.dtype == torch.float8_e8m0fnu
    assert t.codes.view(torch.float4_e2m1fn_x2).shape == (2,)


TIES = {
    "e2m1": {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4},
    "e3m0": {0.125: 0, 0.375: 0.5, 0.75: 0.5, 1.5: 2, 3.0: 2, 6.0: 8, 12.0: 8},
}
BESIDE = [0.1, 0.4, 0.6, 0.9, 1.1, 1.4, 1.6, 1.9, 2.1, 2.9, 3.1, 3.9, 4.1, 5.9]


@ELEMENTS
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_go_to_the_even_code_and_their_neighbours_to_the_nearer_one(element, sign, device):
    ties, top = TIES[element.value], GRIDS[element.value][-1]
    x = torch.tensor([*ties, top], device=device) * sign
    assert torch.equal(quantize_mx(x, element=element).dequantize()[:-1], x.new_tensor(list(ties.values())) * sign)
    for direction, pick in ((-torch.inf, 0), (torch.inf, 1)):
        beside = torch.nextafter(x[:-1].abs(), torch.full_like(x[:-1], direction))
        below_above = [sorted(GRIDS[element.value], key=lambda g: abs(g - tie))[:2] for tie in ties]
        expected = torch.tensor([sorted(pair)[pick] for pair in below_above], device=device) * sign
        got = quantize_mx(torch.cat((beside * sign, x[-1:])), element=element).dequantize()[:-1]
        assert torch.equal(got, expected)


def test_values_between_the_ties(device):
    x = torch.tensor([*BESIDE, 6.0], device=device)
    expected = [0, 0.5, 0.5, 1, 1, 1.5, 1.5, 2, 2, 3, 3, 4, 4, 6, 6]
    assert quantize_mx(x).dequantize().tolist() == expected


def test_the_worked_example_of_the_scale(device):
    x = torch.tensor([31.0], device=device)
    floor, free = quantize_mx(x, scaling="floor"), quantize_mx(x)
    assert scale_bytes(floor) == [127 + 2] and floor.dequantize().item() == 6 * 4  # 7.75 saturates
    assert scale_bytes(free) == [127 + 3] and free.dequantize().item() == 4 * 8


@ELEMENTS
@SCALINGS
def test_scale_of_every_bf16_magnitude_and_of_its_fp32_neighbours(element, scaling, device):
    bits = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = bits.float()
    x = torch.cat((x, torch.nextafter(x, x.new_tensor(0.0)), torch.nextafter(x, x.new_tensor(torch.inf))))
    x = x[(x > 0) & x.isfinite()].double()
    top, emax = GRIDS[element.value][-1], element.format.max_exponent
    exponent = torch.frexp(x).exponent - 1
    expected = exponent - emax
    if scaling is Scaling.TRUNCATION_FREE:  # the least s with x <= top * 2**s, tried in exact double arithmetic
        expected = expected + (x > top * torch.exp2(expected.double()))
    expected = expected.clamp(min=-127) + 127
    t = quantize_mx(x.float().unsqueeze(1).to(device), element=element, scaling=scaling)
    assert torch.equal(t.scales.view(torch.uint8).squeeze(1).cpu().int(), expected.int())
    if scaling is Scaling.TRUNCATION_FREE:
        assert (x / torch.exp2(expected.double() - 127) <= top).all()


@ELEMENTS
@SCALINGS
def test_nearest_rounding_equals_a_search_over_the_grid(element, scaling, randn, device):
    x = randn(40, 32) * torch.exp2(torch.randint(-30, 30, (40, 1), device=device).float())
    values = quantize_mx(x, element=element, scaling=scaling).dequantize()
    for row, got in zip(x.double().tolist(), values.double().tolist()):
        assert got == slow_quantize(row, element.value, scaling.value)


@SCALINGS
@ELEMENTS
def test_a_zero_group_stays_zero_with_the_scale_of_1e_8(element, scaling, device):
    x = torch.zeros(2, 32, device=device)
    x[1] = -0.0
    t = quantize_mx(x, element=element, scaling=scaling)
    assert torch.equal(t.dequantize(), x) and torch.equal(t.dequantize().signbit(), x.signbit())
    assert scale_bytes(t) == [127 + slow_scale_exponent(float(torch.tensor(1e-8)), element.value, scaling.value)] * 2


@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_nan_or_inf_makes_its_group_nan_and_nothing_else(poison, rounding, randn):
    x = randn(3, 100)
    clean = x.clone()
    x[1, 40] = poison
    key = torch.tensor([1], device=x.device)
    t, reference = quantize_mx(x, rounding=rounding, key=key), quantize_mx(clean, rounding=rounding, key=key)
    values, expected = t.dequantize(), reference.dequantize()
    assert values[1, 32:64].isnan().all()
    assert t.scales.view(torch.uint8)[1, 1] == 0xFF and (t.codes[1, 16:32] == 0).all()
    keep = torch.ones_like(x, dtype=torch.bool)
    keep[1, 32:64] = False
    assert torch.equal(values[keep], expected[keep])


def test_extremes_stay_finite_and_subnormals_are_kept(device):
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, 1e-45], [3e38, -3e38], [2.0**-126, 2.0**-127], [2.0**-149, 0.0]], device=device)
    values = quantize_mx(x).dequantize()
    assert values.isfinite().all()
    assert values[0, 0] == largest  # 4 * 2**126 is beyond fp32 and saturates there
    assert quantize_mx(x).dequantize(torch.float64)[0, 0] == 2.0**128
    assert torch.equal(values[2], x[2])
    assert quantize_mx(torch.tensor([2.0**-127, 2.0**-128], device=device)).dequantize().tolist() == [2**-127, 2**-128]


def test_the_sign_of_a_flushed_value_survives(device):
    values = quantize_mx(torch.tensor([6.0, -1e-3], device=device)).dequantize()
    assert values[1] == 0 and values[1].signbit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_input_dtypes_agree_where_they_hold_the_same_numbers(dtype, randn, assert_same_bits):
    x = randn(5, 70).to(torch.float8_e5m2).float()  # numbers that every dtype holds
    t, expected = quantize_mx(x.to(dtype)), quantize_mx(x)
    assert_same_bits(t.codes, expected.codes)
    assert scale_bytes(t) == scale_bytes(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dequantize_is_exact_in_every_dtype_with_the_range(dtype, randn):
    t = quantize_mx(randn(4, 64) * 1e-5)
    assert torch.equal(t.dequantize(dtype).double(), t.dequantize().double())


@pytest.mark.parametrize("shape", [(1,), (7,), (31,), (32,), (33,), (3, 9), (2, 197), (2, 3, 64), (2, 3, 5, 33)])
def test_any_shape_along_any_axis(shape, randn, assert_same_bits):
    x = randn(*shape)
    for axis in range(-len(shape), len(shape)):
        t = quantize_mx(x, axis=axis)
        length = shape[axis]
        for part, size in ((t.codes, math.ceil(length / 2)), (t.scales, math.ceil(length / 32))):
            expected = list(shape)
            expected[axis] = size
            assert list(part.shape) == expected
        rows = x.movedim(axis, -1).reshape(-1, length)
        by_rows = torch.stack([quantize_mx(row).dequantize() for row in rows])
        expected = by_rows.reshape(*x.movedim(axis, -1).shape).movedim(-1, axis)
        assert_same_bits(t.dequantize(), expected, f"axis {axis}")


def test_scalars_and_empty_tensors(device):
    t = quantize_mx(torch.tensor(-3.1, device=device))
    assert t.dequantize().shape == () and t.dequantize().item() == -3
    for shape, axis in (((0,), 0), ((0, 40), 1), ((0, 40), 0), ((4, 0), 1), ((2, 0, 3), 2)):
        for rounding in ("nearest", "stochastic"):
            t = quantize_mx(torch.empty(shape, device=device), axis=axis, rounding=rounding)
            assert t.dequantize().shape == shape
            assert t.codes.shape[axis] == math.ceil(shape[axis] / 2)


def test_strides_do_not_matter(randn, assert_same_bits):
    x = randn(6, 8, 70)
    views = [x.transpose(0, 2), x[:, ::2, 3:67], x[:, :1].expand(-1, 5, -1), x.permute(1, 2, 0)]
    for view in views:
        for axis in range(3):
            a, b = quantize_mx(view, axis=axis), quantize_mx(view.contiguous(), axis=axis)
            assert_same_bits(a.codes, b.codes)
            assert torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))


def test_storage_is_4_25_bits_a_value(randn):
    t = quantize_mx(randn(64, 96))
    assert 8 * (t.codes.nbytes + t.scales.nbytes) / (64 * 96) == 4.25


def test_a_gradient_is_not_tracked(device):
    x = torch.ones(4, device=device, requires_grad=True)
    assert not quantize_mx(x).dequantize().requires_grad


class TestStochasticRounding:
    def test_is_unbiased(self, device):
        """100,000 draws of one value: the mean is within five standard errors, plus the 2**-23 of a 22-bit draw."""
        draws = 100_000
        for y in (0.001, 0.01, 0.1, 0.3, 0.7, 1.25, 2.2, 2.5, 3.7, 4.5, 5.9, -0.3, -5.5):
            x = torch.full((draws, 2), y, device=device)
            x[:, 1] = 6.0  # fixes the scale at 1
            torch.manual_seed(0)
            got = quantize_mx(x, rounding="stochastic").dequantize()[:, 0].double()
            low, high = sorted(sorted(E2M1, key=lambda g: abs(g - abs(y)))[:2])
            below = [g for g in E2M1 if g <= abs(y)][-1]
            above = [g for g in E2M1 if g > abs(y)][0]
            assert set(got.abs().unique().tolist()) <= {below, above}
            width = above - below
            fraction = (abs(y) - below) / width
            error = width * math.sqrt(fraction * (1 - fraction) / draws)
            assert abs(got.mean().item() - y) <= 5 * error + width * 2**-23, y

    @ELEMENTS
    def test_is_unbiased_over_all_draws(self, element, device, positions_to_round):
        """Of all 2**b draws, rint(2**b * position) round up, which is 2**b * position where that is a whole number."""
        fmt = element.format
        draws = torch.arange(2**fmt.random_bits, dtype=torch.int32, device=device)
        cases = list(positions_to_round(fmt))
        for y, lower_code, ups in cases if device.type == "cuda" else cases[::4]:
            codes = _stochastic_code(torch.tensor([y], device=device), fmt, draws)
            assert ((codes == lower_code) | (codes == lower_code + 1)).all()
            assert int((codes - lower_code).sum()) == ups, y

    def test_grid_values_never_move(self, device):
        x = torch.tensor(E2M1 + [-g for g in E2M1], device=device).repeat(20_000, 1)
        got = quantize_mx(x, rounding="stochastic").dequantize()
        assert torch.equal(got, x) and torch.equal(got.signbit(), x.signbit())

    @SCALINGS
    @ELEMENTS
    def test_result_is_one_of_the_two_neighbours(self, element, scaling, randn):
        x = randn(64, 96)
        scale = quantize_mx(x, element=element, scaling=scaling).scales.float().repeat_interleave(32, dim=1)
        y = (x / scale).clamp(-element.format.max, element.format.max)
        got = quantize_mx(x, element=element, scaling=scaling, rounding="stochastic").dequantize() / scale
        grid = torch.tensor(sorted(element.format.values), device=x.device)
        below = grid[torch.searchsorted(grid, y.contiguous(), right=True) - 1]
        above = grid[torch.searchsorted(grid, y.contiguous()).clamp(max=15)]
        assert ((got == below) | (got == above)).all()

    def test_same_key_same_bits_other_key_other_bits(self, randn):
        x = randn(40, 50)
        keys = [torch.tensor([k], device=x.device) for k in (0, 0, 1, -1)]
        codes = [quantize_mx(x, rounding="stochastic", key=key).codes for key in keys]
        assert torch.equal(codes[0], codes[1])
        assert not torch.equal(codes[0], codes[2]) and not torch.equal(codes[2], codes[3])

    def test_generator_and_default_generator_decide(self, randn, device):
        x = randn(40, 50)
        generator = torch.Generator(device).manual_seed(1)
        a = quantize_mx(x, rounding="stochastic", generator=generator).codes
        b = quantize_mx(x, rounding="stochastic", generator=generator).codes
        assert not torch.equal(a, b)
        assert torch.equal(a, quantize_mx(x, rounding="stochastic", generator=generator.manual_seed(1)).codes)
        torch.manual_seed(4)
        c = quantize_mx(x, rounding="stochastic").codes
        torch.manual_seed(4)
        assert torch.equal(c, quantize_mx(x, rounding="stochastic").codes)

    def test_nearest_rounding_draws_nothing(self, randn):
        state = torch.get_rng_state()
        quantize_mx(randn(3, 40))
        assert torch.equal(state, torch.get_rng_state())


class TestEmaRounding:
    """The literal rule of paper Algorithm 1: q1 if |ema/S - q1| < |ema/S - q2|, else q2, with q1 < q2 around w/S."""

    def test_against_a_search_over_the_signed_grid(self, randn):
        w, ema = randn(50, 32), None
        ema = w + 0.4 * randn(50, 32)
        t = quantize_mx(w, rounding="ema", ema=ema)
        scale = quantize_mx(w).scales.float().repeat_interleave(32, dim=1).double()
        grid = sorted(set(Element.E2M1.format.values))
        got = (t.dequantize().double() / scale).flatten().tolist()
        for y, e, q in zip((w / scale).flatten().tolist(), (ema.double() / scale).flatten().tolist(), got):
            q1, q2 = max(g for g in grid if g <= y), min(g for g in grid if g >= y)
            assert q == (q1 if abs(e - q1) < abs(e - q2) else q2)

    def test_scale_is_that_of_the_weight_and_ties_go_up(self, device):
        w = torch.tensor([6.0, 2.2, -2.2, 2.9, -2.9, 3.0], device=device)
        ema = torch.tensor([90.0, 2.5, -2.5, 0.0, 0.0, 100.0], device=device)
        t = quantize_mx(w, rounding=Rounding.EMA, ema=ema)
        assert scale_bytes(t) == [127]
        assert t.dequantize().tolist() == [6.0, 3.0, -2.0, 2.0, -2.0, 3.0]

    @pytest.mark.parametrize("axis", [0, 1])
    def test_the_average_is_that_of_the_element_along_any_axis(self, axis, randn, assert_same_bits):
        w = randn(40, 6, 7)
        ema = w + 0.4 * randn(40, 6, 7)
        got = quantize_mx(w, axis, rounding="ema", ema=ema).dequantize().movedim(axis, -1).flatten(0, 1)
        rows = zip(w.movedim(axis, -1).flatten(0, 1), ema.movedim(axis, -1).flatten(0, 1))
        wanted = torch.stack([quantize_mx(row, rounding="ema", ema=row_ema).dequantize() for row, row_ema in rows])
        assert_same_bits(got, wanted)

    def test_a_broken_average_makes_the_group_nan(self, randn):
        w, ema = randn(2, 64), randn(2, 64)
        ema[0, 3] = torch.nan
        values = quantize_mx(w, rounding="ema", ema=ema).dequantize()
        assert values[0, :32].isnan().all() and values[0, 32:].isfinite().all() and values[1].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.arange(4)}, TypeError, "floating-point tensor, got torch.int64"),
        ({"axis": 2}, IndexError, r"axis must lie in \[-2, 1\]"),
        ({"element": "e5m2"}, ValueError, "e5m2"),
        ({"scaling": "ceil"}, ValueError, "ceil"),
        ({"rounding": "up"}, ValueError, "up"),
        ({"rounding": "ema"}, ValueError, "ema must be given if and only if rounding is 'ema'"),
        ({"ema": torch.ones(2, 4)}, ValueError, "ema must be given if and only if rounding is 'ema'"),
        ({"rounding": "ema", "ema": torch.ones(3)}, ValueError, "ema must have the shape of x"),
        ({"rounding": "stochastic", "key": torch.ones(2)}, ValueError, "key must be one int64"),
    ],
)
def test_errors_name_the_rule_and_what_was_received(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_mx(**{"x": torch.ones(2, 4), **arguments})


class TestOneTensor:
    """What else an `MXTensor` can do, compared with its parts."""

    @pytest.fixture(params=[((3, 70), 1), ((70, 3), 0), ((2, 33, 4), 1), ((), 0)], ids=str)
    def tensor(self, request, randn) -> MXTensor:
        shape, axis = request.param
        return quantize_mx(randn(*shape) if shape else randn(1)[0], axis=axis if shape else -1, element="e3m0")

    def test_it_knows_its_size_and_device(self, device):
        t = quantize_mx(torch.ones(4, 100, device=device))
        assert t.nbytes == 4 * 50 + 4 * 4 and t.device == t.codes.device
        assert repr(t) == f"MXTensor(shape=(4, 100), axis=1, element=e2m1, device={t.device}, 216 bytes)"

    def test_equality_is_that_of_every_part(self, randn):
        x = randn(4, 64)
        t = quantize_mx(x)
        assert t == quantize_mx(x.clone()) and t != x and t != quantize_mx(x, axis=0) and t != quantize_mx(x[:2])
        assert t != quantize_mx(x, element="e3m0") and t != quantize_mx(-x) and t != quantize_mx(2 * x)
        assert torch.equal(quantize_mx(2 * x).codes, t.codes)  # so scales are compared, too
        with pytest.raises(TypeError, match="unhashable"):
            hash(t)

    def test_it_goes_to_a_device_and_not_to_a_dtype(self, device, randn):
        t = quantize_mx(randn(4, 64))
        assert t.to(device) is t
        there = t.to("meta")
        assert there.device.type == "meta" and there.shape == t.shape and there.scales.is_meta
        with pytest.raises(TypeError, match=r"takes a device, got torch.bfloat16; dequantize\(torch.bfloat16\)"):
            t.to(torch.bfloat16)

    def test_it_survives_pickle_copy_and_torch_save(self, tensor):
        file = io.BytesIO()
        torch.save({"w": tensor}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["w"]
        for again in (pickle.loads(pickle.dumps(tensor)), copy.deepcopy(tensor), loaded):
            assert again == tensor and type(again.shape) is torch.Size and again.element is tensor.element
            assert again.codes.stride() == tensor.codes.stride() and again.codes is not tensor.codes

    def test_a_file_of_the_installed_package_loads_here(self, randn):
        """The name of the class in the file is that of the package which wrote it."""
        t = quantize_mx(randn(2, 40))
        stored = pickle.dumps(t, protocol=2).replace(b"cquantization.mx\n", b"ctetrajet.mx\n")
        assert b"tetrajet" in stored and pickle.loads(stored) == t
        assert {"quantization.mx.rebuild_mx", "tetrajet.mx.rebuild_mx"} <= set(_get_user_allowed_globals())

    def test_a_safetensors_file_keeps_it_beside_other_tensors(self, tensor, randn, tmp_path):
        bias = randn(5)
        save_mx(tmp_path / "w.safetensors", {"w": tensor, "bias": bias})
        loaded = load_mx(tmp_path / "w.safetensors", tensor.device)
        assert loaded.keys() == {"w", "bias"} and torch.equal(loaded["bias"], bias)
        assert loaded["w"] == tensor and loaded["w"].codes.stride() == tensor.codes.stride()

    def test_a_file_of_something_else_is_refused(self, randn, tmp_path):
        path = tmp_path / "w.safetensors"
        save_file({"w": randn(3)}, path)
        with pytest.raises(ValueError, match="must be a file of save_mx"):
            load_mx(path)
        path.write_bytes(b"no file")
        with pytest.raises(ValueError, match="must be a file of save_mx"):
            load_mx(path)
        with pytest.raises(ValueError, match="names in a file must differ, got w.codes twice"):
            save_mx(path, {"w": quantize_mx(randn(3)), "w.codes": randn(3)})

    def test_parts_that_do_not_fit_are_refused(self, device):
        t = quantize_mx(torch.ones(2, 40, device=device))
        with pytest.raises(ValueError, match=r"codes must have the shape \(2, 32\).* got \(2, 20\)"):
            MXTensor(t.codes, t.scales, (2, 64), 1, "e2m1")
        with pytest.raises(ValueError, match=r"scales must have the shape \(2, 2\).* got \(2, 1\)"):
            MXTensor(t.codes, t.scales[:, :1], (2, 40), 1, "e2m1")
        with pytest.raises(TypeError, match="scales must be torch.float8_e8m0fnu, got torch.uint8"):
            MXTensor(t.codes, t.scales.view(torch.uint8), (2, 40), 1, "e2m1")
        with pytest.raises(ValueError, match="axis must lie in"):
            MXTensor(t.codes, t.scales, (2, 40), 2, "e2m1")
