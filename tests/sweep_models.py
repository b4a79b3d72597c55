"""Quantizes a model of each module of timm.models, and torchvision's classifiers, and calls them.

    python tests/sweep_models.py        # prints the tables of docs/models.md

`result` is what the tests of the suite call, with models that are cut to fewer blocks or smaller images.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.video import mvit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
from quantization import Coverage, Recipe, Status, coverage, swap_linears

RECIPE = Recipe().with_only(("q2",))
"""Layers are called or not whatever the quantizers are. The quantizer of the weights alone is the fastest choice."""
PICKED = {  # of the other modules, whose models are no Transformers, the first model is taken
    "beit": ("beit_base_patch16_224", {"depth": 1, "img_size": 64}),
    "cait": ("cait_xxs24_224", {"depth": 2, "img_size": 64}),
    "coat": ("coat_tiny", {}),
    "convnext": ("test_convnext", {}),
    "convit": ("convit_tiny", {"img_size": 64}),
    "crossvit": ("crossvit_tiny_240", {}),
    "csatv2": ("csatv2", {}),
    "davit": ("davit_tiny", {"depths": (1, 1, 1, 1)}),
    "deepseek_vit": ("deepseek_vit_412m", {"depth": 1, "img_size": 56}),
    "deit": ("deit_tiny_patch16_224", {"depth": 2}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformer_v2": ("efficientformerv2_s0", {}),
    "eva": ("eva02_tiny_patch14_224", {"depth": 2}),
    "fastvit": ("fastvit_mci0", {}),
    "gcvit": ("gcvit_xxtiny", {}),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 1, "embed_dim": 192, "num_heads": 3}),
    "hiera": ("hiera_tiny_224", {}),
    "hieradet_sam2": ("sam2_hiera_tiny", {}),
    "levit": ("levit_128s", {}),
    "maxxvit": ("maxvit_pico_rw_256", {"img_size": 128}),
    "metaformer": ("caformer_s18", {}),
    "mlp_mixer": ("gmixer_12_224", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 1}),
    "nest": ("nest_tiny", {}),
    "nextvit": ("nextvit_small", {}),
    "pit": ("pit_ti_224", {}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 1, "img_size": 64}),
    "sequencer": ("sequencer2d_s", {"layers": (1, 1, 1, 1)}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1)}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {"depths": (1, 1, 1, 1)}),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "tnt": ("tnt_s_patch16_224", {"depth": 2}),
    "twins": ("twins_pcpvt_small", {"depths": (1, 1, 1, 1)}),
    "vision_transformer": ("deit3_small_patch16_224", {"depth": 2}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {"depth": 2}),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", {"depth": 2}),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"depth": 1, "img_size": 64}),
    "vitamin": ("vitamin_small_224", {}),
    "volo": ("volo_d1_224", {}),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 2}),
}


def small_mvit() -> nn.Module:
    """An MViT of two blocks: `mvit_v1_b` takes no other images than 16 of 224 pixels."""
    numbers = {"kernel_q": [], "stride_q": [], "kernel_kv": [3, 3, 3], "stride_kv": [1, 2, 2]}
    blocks = [mvit.MSBlockConfig(1, 32, 64, **numbers), mvit.MSBlockConfig(2, 64, 64, **numbers)]
    return mvit.MViT(
        (32, 32),
        4,
        blocks,
        residual_pool=False,
        residual_with_cls_embed=True,
        rel_pos_embed=False,
        proj_after_attn=False,
    )


TORCHVISION = {  # one model of each class, because the others differ in size alone, and how the tests make it smaller
    "vit_b_32": lambda: torchvision.models.VisionTransformer(
        32, 8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=64
    ),
    "swin_t": lambda: torchvision.models.SwinTransformer([4, 4], 96, [2, 1, 1, 1], [3, 6, 12, 24], [7, 7]),
    "swin_v2_t": torchvision.models.swin_v2_t,
    "maxvit_t": torchvision.models.maxvit_t,
    "convnext_tiny": torchvision.models.convnext_tiny,
    "swin3d_t": torchvision.models.video.swin3d_t,
    "mvit_v1_b": small_mvit,
}
SIZES = {  # of the image or video to call a model with, where its configuration does not say, or says more than needed
    "sam2_hiera_tiny": (3, 128, 128),
    "vit_b_32": (3, 32, 32),
    "swin_t": (3, 64, 64),
    "swin_v2_t": (3, 64, 64),
    "maxvit_t": (3, 224, 224),
    "convnext_tiny": (3, 64, 64),
    "swin3d_t": (3, 4, 64, 64),
    "mvit_v1_b": (3, 4, 32, 32),
}


@dataclass(frozen=True)
class Result:
    """A model with its coverage, or the reason why it was refused."""

    model: str
    coverage: Coverage | None = None
    refusal: str | None = None

    def left(self) -> list[str]:
        """Patterns of the names of what stays in full precision."""
        found = [] if self.coverage is None else self.coverage.having(Status.FULL_PRECISION)
        return list(dict.fromkeys(re.sub(r"(?<![^._])\d+(?=\.|$)", "*", linear.name) for linear in found))


def timm_result(module: str, cut: bool = True) -> Result | None:
    """The result for a module of timm.models, or None if its models have no linears."""
    if module in PICKED:
        name, options = PICKED[module]
        return _result(name, lambda: timm.create_model(name, **(options if cut else {})))
    name = timm.list_models(module=module)[0]
    model = on_meta(lambda: timm.create_model(name))
    if not any(isinstance(layer, nn.Linear) for layer in model.modules()):
        return None
    try:
        swap_linears(model, RECIPE)
    except ValueError as error:
        return Result(name, refusal=str(error))
    return _result(name, lambda: timm.create_model(name))


def torchvision_result(name: str, cut: bool = True) -> Result:
    if cut:
        return _result(name, TORCHVISION[name])
    return _result(
        name,
        lambda: torchvision.models.get_model(name),
        SIZES | {"vit_b_32": (3, 224, 224), "mvit_v1_b": (3, 16, 224, 224)},
    )


def torchvision_classifiers() -> list[str]:
    """The names of all that classify images or videos."""
    return [
        *torchvision.models.list_models(torchvision.models),
        *torchvision.models.list_models(torchvision.models.video),
    ]


def on_meta(create: Callable[[], nn.Module]) -> nn.Module:
    """A model without memory for its weights, if it can be made so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return create()
        except (NotImplementedError, RuntimeError):  # it reads values while it is made
            return create()


def _result(name: str, create: Callable[[], nn.Module], sizes: dict[str, tuple[int, ...]] = SIZES) -> Result:
    torch.manual_seed(0)
    try:
        model = swap_linears(create(), RECIPE)
    except ValueError as error:
        return Result(name, refusal=str(error))
    return Result(name, coverage=coverage(model, torch.randn(2, *(sizes.get(name) or input_size(model)))))


def input_size(model: nn.Module) -> tuple[int, ...]:
    """Channels, height and width: what the model was made for, after the options that cut it."""
    channels, height, width = model.pretrained_cfg["input_size"]
    embed = getattr(model, "patch_embed", None) or getattr(getattr(model, "encoder", None), "patch_embed", None)
    size = getattr(embed, "img_size", None) or getattr(model, "img_size", None) or (height, width)
    return (channels, *size) if isinstance(size, (tuple, list)) else (channels, size, size)


def main() -> None:
    refused = []
    print(f"timm {timm.__version__}, torchvision {torchvision.__version__}, PyTorch {torch.__version__}\n")
    print(
        "| module | model | linears quantized | % of their FLOPs | stay in full precision |\n| --- " * 1
        + "| --- " * 4
        + "|"
    )
    for module in timm.list_modules():
        result = timm_result(module, cut=False)
        if result is not None:
            refused += _print_row(module, result)
    for name in TORCHVISION:
        refused += _print_row("torchvision", torchvision_result(name, cut=False))
    others = [name for name in torchvision_classifiers() if name not in TORCHVISION]
    print("\nRefused:", ", ".join(refused), "\n\nNot called:", ", ".join(others))


def _print_row(module: str, result: Result) -> list[str]:
    if result.coverage is None:
        return [module]
    found = result.coverage
    quantized = f"{len(found.having(Status.QUANTIZED))} of {len(found.linears)}"
    left = ", ".join(f"`{name}`" for name in result.left())
    print(
        f"| {module} | {result.model} | {quantized} | {found.flops_share(Status.QUANTIZED):.1f} | {left} |", flush=True
    )
    return []


if __name__ == "__main__":
    main()
