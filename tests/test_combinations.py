"""Options away from the usual path, alone and together: each against a training loop of a few plain lines."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import timm
from engine import TrainStep
from main import main
from quantization import (
    RECIPES,
    Int4Recipe,
    QEma,
    Quantizer,
    RampingAdamW,
    Recipe,
    detect_oscillation,
    linear,
    quant_linears,
    quantize_mx,
)
from tracking.oscillation_csv import read
from training.losses import OutputLoss

CROSS_ENTROPY = OutputLoss(nn.CrossEntropyLoss())

METHODS = {
    "none": RECIPES["none"],
    "tetrajet": Recipe(),
    "q-ema": Recipe().with_q_ema(0.9),
    "q-ramping": Recipe(),
    "both": Recipe().with_q_ema(0.9),
    "int4": Int4Recipe(),
}
SIZES = (6, 6, 1)  # images of the batches: the last one is what an epoch leaves over


def build(recipe: Recipe | Int4Recipe, input_size: int = 8, drop_path: float = 0.2, checkpointed: bool = False):
    torch.manual_seed(0)
    small = {"img_size": input_size, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 10}
    model = timm.create_model("deit_micro_patch4_32", **small, drop_path_rate=drop_path, quant=recipe)
    model.set_grad_checkpointing(checkpointed)
    return model.train()


def batches(*sizes: int, input_size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, input_size, input_size)
    return [(torch.randn(n, *shape, generator=generator), torch.randint(10, (n,), generator=generator)) for n in sizes]


def optimizer_of(method: str, model: nn.Module) -> torch.optim.Optimizer:
    if method not in ("q-ramping", "both"):
        return torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = RampingAdamW(model.parameters(), lr=1e-2)
    optimizer.set_periods({layer.weight: 1.0 + (layer.weight > 0) for layer in quant_linears(model).values()})
    return optimizer


def same_state(a: nn.Module, b: nn.Module) -> None:
    for (name, value), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def in_plain_lines(model: nn.Module, method: str, micro_batches: int, clip_grad: float) -> list[float]:
    """Training in plain lines, without the engine: one micro-batch after the other, then one update of everything."""
    optimizer, losses = optimizer_of(method, model), []
    for images, labels in batches(*SIZES):
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(images.tensor_split(micro_batches), labels.tensor_split(micro_batches)):
            if len(x):
                loss = F.cross_entropy(model(x), y) * (len(x) / len(images))
                loss.backward()
                total += loss.item()
        if clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        optimizer.step()
        for layer in quant_linears(model).values():
            if layer.recipe.q_ema_beta is not None:
                layer.weight_ema += (layer.weight.detach() - layer.weight_ema) * (1 - layer.recipe.q_ema_beta)
                layer.ema_updates += 1
        losses.append(total)
    return losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("micro_batches", "clip_grad", "checkpointed"), list(product((1, 3), (0.0, 0.5), (False, True)))
)
def test_every_combination_trains_as_in_plain_lines(method, micro_batches, clip_grad, checkpointed):
    """Bit for bit, stochastic rounding and dropped paths included; the last batch is a single image."""
    plain, model = build(METHODS[method]), build(METHODS[method], checkpointed=checkpointed)
    if METHODS[method].quantizes and method in ("q-ema", "both"):
        for layer in [*quant_linears(plain).values(), *quant_linears(model).values()]:
            layer.ema_updates.fill_(20)  # past the first ten, so that averages decide
    torch.manual_seed(5)
    wanted = in_plain_lines(plain, method, micro_batches, clip_grad)
    step = TrainStep(
        model,
        CROSS_ENTROPY,
        optimizer_of(method, model),
        torch.device("cpu"),
        clip_grad=clip_grad,
        accumulate_steps=micro_batches,
    )
    q_ema = QEma(model) if method in ("q-ema", "both") else None
    torch.manual_seed(5)
    losses = []
    for batch in batches(*SIZES):
        losses.append(step(batch)[0].item())
        if q_ema:
            q_ema.after_step()
    assert losses == pytest.approx(wanted, rel=1e-6) and np.isfinite(losses).all()
    same_state(model, plain)


class TestAccumulation:
    def gradients(self, recipe: Recipe, micro_batches: int, count: int) -> tuple[float, Tensor]:
        model = build(recipe, drop_path=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = TrainStep(model, CROSS_ENTROPY, optimizer, torch.device("cpu"), accumulate_steps=micro_batches)
        loss, correct = step(*batches(count))
        with torch.no_grad():
            images, labels = batches(count)[0]
            assert correct == (model(images).argmax(dim=1) == labels).sum()
        return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters()])

    @pytest.mark.parametrize("name", ["none", "microscaling"])
    @pytest.mark.parametrize("micro_batches", [2, 4])
    def test_is_the_whole_batch_up_to_the_order_of_sums(self, name, micro_batches):
        """With nearest rounding, and 32 images of 5 tokens at the least, so that both ways have the same groups."""
        loss, whole = self.gradients(RECIPES[name], 1, 128)
        other_loss, parts = self.gradients(RECIPES[name], micro_batches, 128)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (parts - whole).norm() <= 1e-5 * whole.norm() and whole.norm() > 0.1

    @pytest.mark.parametrize(("micro_batches", "count"), [(4, 7), (4, 1), (8, 5)])
    def test_of_unequal_parts_is_the_mean_over_images_too(self, micro_batches, count):
        loss, whole = self.gradients(RECIPES["none"], 1, count)
        other_loss, parts = self.gradients(RECIPES["none"], micro_batches, count)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (parts - whole).norm() <= 1e-5 * whole.norm()

    def test_a_batch_is_mixed_before_it_is_cut(self):
        """Pairs are the first image and the last, the second and the last but one: of the batch, not of a part."""
        losses = []
        for micro_batches in (1, 3):
            model = build(RECIPES["none"], drop_path=0.0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            options = {"mixup": Mixup(0.8, 0.0, num_classes=10), "accumulate_steps": micro_batches}
            step = TrainStep(model, OutputLoss(SoftTargetCrossEntropy()), optimizer, torch.device("cpu"), **options)
            np.random.seed(0)
            losses.append(step(*batches(6))[0].item())
        images, labels = batches(6)[0]
        np.random.seed(0)
        assert np.random.rand() < 1  # the probability with which timm mixes
        share = np.random.beta(0.8, 0.8)
        soft = torch.full((6, 10), 0.01).scatter_(1, labels[:, None], 0.91)
        mixed, targets = (share * t + (1 - share) * t.flip(0) for t in (images, soft))
        wanted = -(targets * F.log_softmax(model(mixed), dim=1)).sum(dim=1).mean().item()
        assert losses == pytest.approx([wanted] * 2, rel=1e-5)

    @pytest.mark.parametrize("stochastic", [False, True])
    def test_quantizes_weights_once_and_gradients_anew(self, stochastic, monkeypatch):
        """Two equal micro-batches: one quantization of each weight, where none is random, but two of the gradients."""
        recipe = Recipe(q2=Quantizer(rounding="stochastic")) if stochastic else Recipe()
        model = build(recipe, drop_path=0.0)
        weights = [layer.weight for layer in quant_linears(model).values()]
        quantized, original = [], linear._forward_operand

        def counted(x, *rest):
            quantized.extend(weight for weight in weights if weight is x)
            return original(x, *rest)

        monkeypatch.setattr(linear, "_forward_operand", counted)
        gradients = []
        weights[0].register_hook(lambda gradient: gradients.append(gradient.clone()))
        (images, labels), *_ = batches(4)
        batch = torch.cat((images, images)), torch.cat((labels, labels))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = TrainStep(model, CROSS_ENTROPY, optimizer, torch.device("cpu"), accumulate_steps=2)
        for done in (1, 2):
            step(batch)
            assert len(quantized) == len(weights) * done * (2 if stochastic else 1)
        assert not torch.equal(gradients[0], gradients[1])
        assert all(layer.weight_cache is None for layer in quant_linears(model).values())

    def test_ranks_average_after_the_last_micro_batch(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = build(Recipe())
            parallel, calls = DistributedDataParallel(model), []

            def hook(state, bucket):
                calls.append(bucket.index())
                return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

            parallel.register_comm_hook(None, hook)
            alone = build(Recipe())
            for m, training in ((parallel, model), (alone, alone)):
                optimizer = torch.optim.AdamW(training.parameters())
                step = TrainStep(m, CROSS_ENTROPY, optimizer, torch.device("cpu"), accumulate_steps=3)
                torch.manual_seed(5)
                for i, batch in enumerate(batches(6, 6)):
                    step(batch)
                    assert m is alone or len(calls) == (i + 1) * len(set(calls))
            same_state(model, alone)
        finally:
            dist.destroy_process_group()

    def test_detection_leaves_no_trace(self):
        model = build(Recipe().with_q_ema(0.9), checkpointed=True)
        optimizer = optimizer_of("both", model)
        step = TrainStep(model, CROSS_ENTROPY, optimizer, torch.device("cpu"), accumulate_steps=2)
        step(*batches(4))
        before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        ratios = detect_oscillation(model, optimizer, step, batches(4, 3), steps=5)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(generator, torch.get_rng_state())
        assert len(ratios) == 8 and all(r.isfinite().all() and (r >= 0).all() for r in ratios.values())


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images).sum().backward()
    return sum(sizes)


@pytest.mark.parametrize(("recipe", "wanted"), [(RECIPES["none"], 36), (Recipe(), 27.7)], ids=["bf16", "TetraJet"])
def test_what_a_block_keeps_for_its_backward_pass(recipe, wanted):
    """Bytes a token and channel, the numbers of docs/performance.md; what has the size of the weights falls out."""
    block = timm.create_model("deit_small_patch16_224", quant=recipe).blocks[0]

    def kept(images: int) -> int:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                try:
                    block(torch.randn(images, 64, 384, requires_grad=True))
                except RuntimeError as error:
                    if "pack_vnni2" not in str(error):
                        raise
                    pytest.skip("PyTorch's bf16 attention needs AVX-512 here, which ATEN_CPU_CAPABILITY switches off")
        return sum(storage.nbytes() for storage in storages.values())

    assert (kept(4) - kept(2)) / (2 * 64 * 384) == pytest.approx(wanted, abs=0.2)


class TestRecomputedActivations:
    @pytest.mark.parametrize(
        "recipe",
        [Recipe(q1=Quantizer(rounding="stochastic"), q2=Quantizer(rounding="stochastic")), Recipe(double=False)],
        ids=["stochastic forward pass", "direct"],
    )
    def test_same_bits_whatever_is_random(self, recipe):
        results = []
        for checkpointed in (False, True):
            model = build(recipe, checkpointed=checkpointed)
            torch.manual_seed(3)
            F.cross_entropy(model(batches(5)[0][0]), batches(5)[0][1]).backward()
            results.append([p.grad for p in model.parameters()] + [torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*results))

    def test_blocks_keep_their_inputs_alone(self):
        images = batches(8)[0][0]
        plain, less = (saved_bytes(build(Recipe(), checkpointed=c), images) for c in (False, True))
        assert less < plain / 4

    def test_swin(self):
        options = {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2, 1), "num_heads": (1, 2)}
        results = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            model = timm.create_model("swin_tiny_patch4_window7_224", **options, num_classes=10, quant=Recipe())
            model.set_grad_checkpointing(checkpointed)
            images, labels = batches(3, input_size=32)[0]
            F.cross_entropy(model.train()(images), labels).backward()
            results.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(results[0]) > 30 and all(torch.equal(a, b) for a, b in zip(*results))

    def test_a_tracked_run_is_the_same(self, tmp_path):
        options = ["--quant", "mxfp4", "--epochs", "1", "--batch-size", "360", "--device", "cpu", "--drop-path", "0.2"]
        for name, extra in (("plain", []), ("less", ["--checkpoint-activations"])):
            assert main([*options, *extra, "--track-oscillation", "--output-dir", str(tmp_path / name)]) == 0
        plain, less = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True) for n in ("plain", "less"))
        assert all(torch.equal(less["model"][name], value) for name, value in plain["model"].items())
        assert torch.equal(less["rng"][0]["torch"], plain["rng"][0]["torch"])
        assert read(tmp_path / "plain/oscillation.csv") == read(tmp_path / "less/oscillation.csv")


class _Quantized(torch.autograd.Function):
    """Eq. 6-7 of the paper in their own words."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, q: Callable[[Tensor, int], Tensor]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.q = q
        return q(x, 1) @ q(w, 1).T

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x, w), q = ctx.saved_tensors, ctx.q
        return q(dy, 1) @ q(w, 0), q(dy, 0).T @ q(x, 0), None


@pytest.mark.parametrize(("input_size", "count"), [(56, 1), (56, 3), (12, 3), (4, 1), (8, 7)])
def test_any_number_of_tokens(input_size, count, monkeypatch):
    """197, 10, 2 and 5 tokens an image: groups of 32 tokens run over images and end short, and each part equals
    matrices quantized one by one."""

    def q(x: Tensor, axis: int) -> Tensor:
        return quantize_mx(x, axis=axis, scaling="floor").dequantize()

    def in_plain_lines(layer, x: Tensor) -> Tensor:
        return (_Quantized.apply(x.reshape(-1, x.shape[-1]), layer.weight, q) + layer.bias).view(*x.shape[:-1], -1)

    (images, labels), results = batches(count, input_size=input_size)[0], []
    for plain in (False, True):
        model = build(RECIPES["microscaling"], input_size, drop_path=0.0)
        assert model.pos_embed.shape[1] == (input_size // 4) ** 2 + 1
        if plain:
            monkeypatch.setattr(linear.QuantLinear, "forward", in_plain_lines)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradients), (wanted_loss, wanted) = results
    assert np.isfinite(loss) and loss == pytest.approx(wanted_loss, rel=1e-6)
    assert (gradients - wanted).norm() <= 1e-5 * wanted.norm()


class TestLastBatch:
    @pytest.mark.parametrize("count", [5, 1])
    def test_images_that_do_not_pair_off_are_not_mixed(self, count):
        """Their targets are smoothed one-hot vectors, as those of a mixture with itself; nothing is drawn."""
        images, labels = batches(count)[0]
        model = build(RECIPES["none"], drop_path=0.0)
        soft = 0.9 * F.one_hot(labels, 10) + 0.01
        wanted = (-soft * F.log_softmax(model(images), dim=1)).sum(dim=1).mean().item()
        mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = TrainStep(model, OutputLoss(SoftTargetCrossEntropy()), optimizer, torch.device("cpu"), mixup=mixup)
        np.random.seed(0)
        before = np.random.get_state()[1].copy()
        loss, _ = step((images, labels))
        assert loss.item() == pytest.approx(wanted, rel=1e-6)
        assert (np.random.get_state()[1] == before).all()
        step(batches(4)[0])
        assert (np.random.get_state()[1] != before).any()

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_every_image_of_a_folder_is_trained_on(self, workers, tmp_path):
        """Ten images in batches of three, the last one of one; Q-EMA counts the steps."""
        generator = np.random.default_rng(0)
        for half, label, i in product(("train", "val"), ("dark", "light"), range(5)):
            directory = tmp_path / "images" / half / label
            directory.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (9, 11, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / f"{i}.png")
        options = ["--data-set", "FOLDER", "--data-path", str(tmp_path / "images"), "--model", "deit_micro_patch4_32"]
        options += ["--input-size", "12", "--batch-size", "3", "--mixup", "0", "--cutmix", "0", "--repeats", "1"]
        options += ["--num-workers", workers, "--quant", "mxfp4", "--q-ema", "--epochs", "2", "--device", "cpu"]
        options += ["--accumulate-steps", "3", "--clip-grad", "1", "--q-ramping", "--q-ramping-steps", "2"]
        for name, extra, steps in (("kept", ["--keep-last-batch"], 8), ("left", [], 6)):
            assert main([*options, *extra, "--output-dir", str(tmp_path / name)]) == 0
            weights = torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"]
            assert {int(v) for k, v in weights.items() if k.endswith("ema_updates")} == {steps}
            assert all(value.isfinite().all() for value in weights.values())

    def test_workers_do_not_change_a_run_without_augmentation(self, tmp_path):
        options = ["--quant", "mxfp4", "--epochs", "1", "--batch-size", "700", "--keep-last-batch", "--device", "cpu"]
        states = []
        for workers in ("0", "2"):
            directory = tmp_path / workers
            assert main([*options, "--num-workers", workers, "--output-dir", str(directory)]) == 0
            states.append(torch.load(directory / "checkpoint.pth", weights_only=True))
        assert {float(s["step"]) for s in states[0]["optimizer"]["state"].values()} == {3.0}  # 700, 700 and 37 images
        assert all(torch.equal(states[1]["model"][name], value) for name, value in states[0]["model"].items())
