"""The installed Swin Transformer, whose models (every `swin_*`) take `quant=Recipe`.

`quant` swaps the linears in `SWIN_LINEARS` for `quantization.QuantLinear`: the four of every block, with shifted
windows or without, and the reduction of every patch merging, the one other linear of the stages.
The patch embedding, norms, attention matmuls, relative position biases and the head are the installed ones.
"""

from quantization.families.timm_models import SWIN_LINEARS
from timm._overlay import run_installed
from timm.models._quant import TakesQuant

run_installed(globals())


class SwinTransformer(TakesQuant, globals()["SwinTransformer"]):
    """The installed class plus `quant`."""

    quant_names = SWIN_LINEARS
