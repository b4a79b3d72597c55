"""Each export, read by the library that the format belongs to, and by `load`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import timm
from quantization import MXTensor, load, quantize_mx, restore_linears

Q_EMA = ("--quant", "mxfp4", "--q-ema", "--keep-blocks", "1")
FLOOR = ("--quant", "microscaling")
LAYERS = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def stock_model() -> nn.Module:
    return timm.create_model("deit_micro_patch4_32", num_classes=10, img_size=8).eval()


def with_weights(directory: Path, weights: dict[str, Tensor]) -> nn.Module:
    """The stock model with the export's tensors in high precision, and these weights."""
    others = load_file(directory / "model.safetensors")
    others = {name: value for name, value in others.items() if not name.endswith(("_packed", "_scale"))}
    model = stock_model()
    model.load_state_dict(others | {f"{name}.weight": value for name, value in weights.items()})
    return model


@pytest.mark.parametrize(("options", "weights"), [(Q_EMA, "model"), (Q_EMA, "ema"), (FLOOR, "model")])
def test_load_gives_the_logits_of_eval_bit_for_bit(
    options, weights, exported, evaluated, trained, images, assert_same_bits
):
    logits, used = evaluated(trained(*options), "--weights", weights)
    directory = exported("compressed-tensors", *options, weights=weights)
    model = load(directory)
    with torch.no_grad():
        assert_same_bits(model(images), logits)
    for name, weight in used.items():
        assert_same_bits(model.get_submodule(name).weight, weight, name)
        assert_same_bits(model.get_submodule(name).quantized_weight(), weight, name)
    assert not torch.equal(with_weights(directory, used)(images), logits)  # Q1 matters
    state = torch.load(trained(*options), weights_only=True)
    masters = state["model"] if weights == "model" else {n[7:]: v for n, v in state["model_ema"].items()}
    nearest = {name: quantize_mx(masters[f"{name}.weight"]).dequantize() for name in used}
    assert any(not torch.equal(nearest[name], used[name]) for name in used)  # neither Q-EMA nor floor scales are that
    assert sorted(used) == sorted(LAYERS if options is Q_EMA else [*LAYERS, *(n.replace("0", "1") for n in LAYERS)])


def test_what_a_loaded_model_is(exported, images, assert_same_bits):
    """A gradient passes; another dtype, a copy and the state's names are those of any model."""
    model = load(exported("compressed-tensors", *FLOOR))
    logits = model(images)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == stock_model().state_dict().keys()
    given = images.clone().requires_grad_()
    assert_same_bits(model(given), logits)
    model(given).sum().backward()
    assert given.grad.abs().sum() > 0
    layer = model.blocks[0].mlp.fc1
    before = layer.weight_cache.packed
    assert layer.bfloat16().weight_cache.packed == before
    assert layer(torch.ones(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_compressed_tensors_decompresses_to_our_bits(exported, evaluated, trained, assert_same_bits):
    package = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    directory = exported("compressed-tensors", *Q_EMA)
    config = QuantizationConfig.model_validate(
        json.loads((directory / "config.json").read_text())["quantization_config"]
    )
    (scheme,) = config.config_groups.values()
    assert sorted(scheme.targets) == sorted(LAYERS) and package
    compressor = BaseCompressor.get_value_from_registry(config.format)
    assert compressor.can_compress(nn.Linear, scheme)
    stored, (_, used) = load_file(directory / "model.safetensors"), evaluated(trained(*Q_EMA))
    for name in LAYERS:
        own = {part: stored[f"{name}.{part}"] for part in compressor.compression_param_names(scheme)}
        assert_same_bits(compressor.decompress(own, scheme)["weight"].float(), used[name], name)


def test_compressed_tensors_reads_every_scale_as_we_do(assert_same_bits):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import MXFP4A16

    codes = torch.arange(256).to(torch.uint8).repeat(253, 1)
    scales = torch.arange(1, 254).to(torch.uint8).unsqueeze(1).repeat(1, 16)  # 2**-126 to 2**126: bf16's normal numbers
    ours = MXTensor(codes, scales.view(torch.float8_e8m0fnu), (253, 512), 1, "e2m1")
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], **MXFP4A16)
    theirs = compressor.decompress({"weight_packed": codes, "weight_scale": scales}, scheme)["weight"]
    inside = ours.dequantize(torch.float64).abs() <= torch.finfo(torch.bfloat16).max
    assert_same_bits(theirs.double()[inside], ours.dequantize(torch.float64)[inside])


@pytest.mark.parametrize("options", [Q_EMA, FLOOR], ids=["q-ema", "floor"])
def test_torchao_has_our_bits_and_computes_our_forward_pass(
    options, exported, evaluated, trained, images, assert_same_bits
):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor as Theirs

    logits, used = evaluated(trained(*options))
    directory = exported("torchao", *options)
    state = torch.load(directory / "model.pth", weights_only=True)
    for name, weight in used.items():
        assert isinstance(state[f"{name}.weight"], Theirs)
        assert_same_bits(state[f"{name}.weight"].dequantize(torch.float32), weight, name)
    stock = stock_model()
    stock.load_state_dict(state, assign=True)
    with torch.no_grad():
        assert_same_bits(load(directory)(images), logits)
        # Both quantize activations and multiply in fp32, but sum in another order: a value near a tie may round
        # otherwise then, by a step of the grid.
        torch.testing.assert_close(stock(images), logits, rtol=0, atol=2e-2)


class TestOnnx:
    @pytest.fixture
    def directory(self, exported) -> Path:
        pytest.importorskip("onnx", reason="onnx is not installed")
        return exported("onnx", *Q_EMA)

    @pytest.fixture
    def logits(self, trained, evaluated, images) -> Tensor:
        """PyTorch's, with the weights that --eval uses and activations that are not quantized."""
        _, used = evaluated(trained(*Q_EMA))
        state = torch.load(trained(*Q_EMA), weights_only=True)["model"]
        model = stock_model()
        others = {name: value for name, value in state.items() if name in model.state_dict()}
        model.load_state_dict(others | {f"{name}.weight": weight for name, weight in used.items()})
        with torch.no_grad():
            return model(images)

    def test_4_bit_weights_pass_the_checker_and_the_reference_evaluator(
        self, directory, logits, evaluated, trained, images
    ):
        import onnx
        from onnx.reference import ReferenceEvaluator

        graph = onnx.load(directory / "model.onnx")
        onnx.checker.check_model(graph, full_check=True)
        kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
        for name in LAYERS:
            assert kinds[f"{name}.weight.codes"] == onnx.TensorProto.FLOAT4E2M1
            assert kinds[f"{name}.weight.scales"] == onnx.TensorProto.FLOAT8E8M0
        result = ReferenceEvaluator(graph).run(None, {"images": images.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(result), logits, rtol=0, atol=1e-5)
        used = evaluated(trained(*Q_EMA))[1]["blocks.0.mlp.fc1"]
        del graph.graph.output[:]
        graph.graph.output.append(onnx.helper.make_tensor_value_info("blocks.0.mlp.fc1.weight", 1, used.shape))
        weight = ReferenceEvaluator(graph).run(None, {"images": images.numpy()})[0]
        assert torch.equal(torch.from_numpy(weight), used)

    def test_the_twin_runs_in_onnxruntime_for_any_batch(self, directory, logits, images):
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = runtime.InferenceSession(directory / "model_fp32.onnx", providers=["CPUExecutionProvider"])
        for count in (5, 1):
            result = session.run(["logits"], {"images": images[:count].numpy()})[0]
            torch.testing.assert_close(torch.from_numpy(result), logits[:count], rtol=0, atol=1e-5)

    def test_load_leaves_it_to_others(self, directory):
        with pytest.raises(ValueError, match="load reads compressed-tensors and torchao, .* is in onnx; run"):
            load(directory)


def test_restoring_ordinary_linears_gives_the_stock_model(exported, images):
    model = load(exported("compressed-tensors", *Q_EMA))
    stock = restore_linears(model, LAYERS)
    assert type(stock.blocks[0].mlp.fc1) is nn.Linear and stock(images).isfinite().all()
