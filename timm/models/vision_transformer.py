"""The installed Vision Transformer, whose models take `quant=Recipe`; and two small DeiTs.

`quant` swaps the four linears of every transformer block (`BLOCK_LINEARS`: qkv, proj, fc1, fc2) for
`quantization.QuantLinear`, or for `Int4Linear` with an `Int4Recipe`. Every model that builds on the class takes it too,
the DeiT family (`timm/models/deit.py`, installed) among them.
"""

from timm._overlay import run_installed
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._quant import TakesQuant

run_installed(globals())

_installed = dict(globals())
_cfg, _create, _register = (_installed[n] for n in ("_cfg", "_create_vision_transformer", "register_model"))


class VisionTransformer(TakesQuant, _installed["VisionTransformer"]):
    """The installed class plus `quant`. Raises ValueError if no block has the four linears."""


_small = {
    name: _cfg(input_size=(3, 32, 32), num_classes=10, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    for name in ("deit_micro_patch4_32", "deit_nano_patch4_32")
}
_installed["default_cfgs"].update(_installed["generate_default_cfgs"](_small))


@_register
def deit_micro_patch4_32(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A DeiT of 0.4 M parameters that two CPU cores train in minutes: 32 px, patches of 4, 128 wide, 2 blocks."""
    args = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 4}
    return _create("deit_micro_patch4_32", pretrained=pretrained, **{**args, **kwargs})


@_register
def deit_nano_patch4_32(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A DeiT of 0.3 M parameters and 24 quantized linears for many runs on one GPU: 32 px, 64 wide, 6 blocks."""
    args = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 2}
    return _create("deit_nano_patch4_32", pretrained=pretrained, **{**args, **kwargs})
