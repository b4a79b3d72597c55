"""torchvision's models: ViT calls `nn.MultiheadAttention`, and Swin passes the weights to a function.

torchvision is imported when one of its classes is met, not before.

Shape suffixes: B images, W windows, T tokens in a window, H heads, D channels of a head, C channels.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import swin_transformer
from torchvision.models.video import swin_transformer as video

from .base import Family, Reader, register_family, register_reader


class _CallsProjections:
    """Attention within shifted windows (Liu et al. 2021) of maps with any number of axes, by the linears qkv and proj.

    It goes before torchvision's class, whose parameters, position bias and numbers it keeps.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, *sizes, C] to the same shape; the sizes are height and width, or frames, height and width."""
        sizes = x.shape[1:-1]
        window, shift, bias = self._window_shift_and_bias(sizes)
        missing = [-size % length for size, length in zip(sizes, window)]
        x = F.pad(x, (0, 0, *(n for after in reversed(missing) for n in (0, after))))
        padded, axes = x.shape[1:-1], tuple(range(1, x.dim() - 1))
        if any(shift):
            x = x.roll([-s for s in shift], axes)
        y = self._attend(_windows(x, window), bias, _shift_mask(padded, window, shift, x))
        y = _map(y, padded, window)
        if any(shift):
            y = y.roll(shift, axes)
        return y[(slice(None), *map(slice, sizes))].contiguous()

    def _window_shift_and_bias(self, sizes: torch.Size) -> tuple[list[int], list[int], Tensor]:
        """For a map of these sizes: a map as large as one window, or smaller, is not shifted."""
        window, shift = list(self.window_size), list(self.shift_size)
        covered = [length >= size for length, size in zip(window, sizes)]
        shift = [0 if alone else s for alone, s in zip(covered, shift)]
        return window, shift, self.get_relative_position_bias()

    def _attend(self, x_BWTC: Tensor, bias: Tensor, mask_WTT: Tensor | None) -> Tensor:
        q, k, v = self._qkv(x_BWTC).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        scores_BWHTT = self._scores(q, k) + bias  # [B, W, H, T, T] and [1, H, T, T]
        if mask_WTT is not None:
            scores_BWHTT = scores_BWHTT + mask_WTT.unsqueeze(1)
        weights_BWHTT = F.dropout(scores_BWHTT.softmax(dim=-1), self.attention_dropout, self.training)
        y_BWTC = (weights_BWHTT @ v).transpose(-2, -3).flatten(-2)
        return F.dropout(self.proj(y_BWTC), self.dropout, self.training)

    def _qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q * q.shape[-1] ** -0.5 @ k.mT


def _windows(x: Tensor, window: list[int]) -> Tensor:
    """[B, *sizes, C] to [B, W, T, C], windows and their tokens in row-major order."""
    for axis, length in enumerate(window):
        x = x.unflatten(1 + 2 * axis, (-1, length))
    outer, inner = range(1, 2 * len(window), 2), range(2, 2 * len(window) + 1, 2)
    x = x.permute(0, *outer, *inner, x.dim() - 1)
    return x.flatten(1, len(window)).flatten(2, -2)


def _map(x_BWTC: Tensor, sizes: torch.Size, window: list[int]) -> Tensor:
    """The inverse of `_windows`."""
    axes = len(window)
    x = x_BWTC.unflatten(2, window).unflatten(1, [size // length for size, length in zip(sizes, window)])
    x = x.permute(0, *(a for axis in range(1, axes + 1) for a in (axis, axis + axes)), x.dim() - 1)
    for axis in range(1, axes + 1):
        x = x.flatten(axis, axis + 1)
    return x


def _shift_mask(sizes: torch.Size, window: list[int], shift: list[int], like: Tensor) -> Tensor | None:
    """[W, T, T] with -100 where two tokens of a window were not neighbours before the map was rolled, else 0."""
    if not any(shift):
        return None
    region = like.new_zeros(1, *sizes, 1)
    parts = [((0, -w), (-w, -s), (-s, None)) if s else ((0, None),) for w, s in zip(window, shift)]
    for number, part in enumerate(product(*parts)):
        region[(0, *(slice(*ends) for ends in part))] = number
    region_WT = _windows(region, window)[0, :, :, 0]
    return -100.0 * (region_WT.unsqueeze(1) != region_WT.unsqueeze(2)).to(like.dtype)


class CallingWindowAttention(_CallsProjections, swin_transformer.ShiftedWindowAttention):
    """Swin's."""


class CallingWindowAttentionV2(_CallsProjections, swin_transformer.ShiftedWindowAttentionV2):
    """Swin V2's: scores are cosines times a learned scale, and keys have no bias."""

    def _qkv(self, x: Tensor) -> Tensor:
        if self.qkv.bias is None:
            return self.qkv(x)
        q_C, k_C, v_C = self.qkv.bias.chunk(3)
        return functional_call(self.qkv, {"bias": torch.cat((q_C, torch.zeros_like(k_C), v_C))}, (x,))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.logit_scale.clamp(max=math.log(100.0)).exp()


class CallingWindowAttention3d(_CallsProjections, video.ShiftedWindowAttention3d):
    """Video Swin's, whose windows are no larger than the map."""

    def _window_shift_and_bias(self, sizes):
        window = [min(length, size) for length, size in zip(self.window_size, sizes)]
        shift = [0 if length == size else s for length, size, s in zip(window, sizes, self.shift_size)]
        return window, shift, self.get_relative_position_bias(window)


_CALLING = {cls.__mro__[2]: cls for cls in (CallingWindowAttention, CallingWindowAttentionV2, CallingWindowAttention3d)}


def _call_projections(attention: nn.Module) -> None:
    attention.__class__ = _CALLING.get(type(attention), type(attention))


def _why_windows_stay(attention: nn.Module) -> str | None:
    if type(attention) in (*_CALLING, *_CALLING.values()):
        return None
    return f"{type(attention).__name__} is a subclass of torchvision's window attention with a forward pass of its own"


for _class in _CALLING:
    register_reader(f"{_class.__module__}.{_class.__qualname__}", Reader(_call_projections, refusal=_why_windows_stay))

_FAMILIES = {
    "vision_transformer.VisionTransformer": ("self_attention.in_proj", "self_attention.out_proj", "mlp.0", "mlp.3"),
    "swin_transformer.SwinTransformer": ("attn.qkv", "attn.proj", "mlp.0", "mlp.3", "reduction"),
    "video.swin_transformer.SwinTransformer3d": ("attn.qkv", "attn.proj", "mlp.0", "mlp.3", "reduction"),
    "convnext.ConvNeXt": ("block.3", "block.5"),
    "maxvit.MaxVit": ("to_qkv", "merge", "mlp_layer.1", "mlp_layer.3"),
    "video.mvit.MViT": ("attn.qkv", "attn.project.0", "mlp.0", "mlp.3"),
}
for _path, _linears in _FAMILIES.items():
    register_family(f"torchvision.models.{_path}", Family(_linears))
