"""PyTorch's own attention and Transformer layers.

`nn.MultiheadAttention` passes its weights to a function. `nn.TransformerEncoderLayer` calls its linears while it
trains, and passes all weights to one fused function, the fast path, when it is evaluated without gradients.

Shape suffixes: B images or sequences, T tokens of the queries, S tokens of the keys, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Family, Reader, register_family, register_reader

ENCODER_LINEARS = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")


class CallingAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` that calls its projections, the linears `in_proj` and `out_proj`.

    The parameters `in_proj_weight` and `in_proj_bias` are now `in_proj.weight` and `in_proj.bias`; checkpoints with the
    old names load. Inputs, outputs, masks and dropout are those of `nn.MultiheadAttention`.
    """

    @property
    def in_proj_weight(self) -> Tensor:
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
        batched = query.dim() == 3
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q_BHTD, k_BHSD, v_BHSD = self._project(query, key, value, batched)
        _check_masks(attn_mask, key_padding_mask, q_BHTD, k_BHSD)
        mask = self._additive_mask(attn_mask, key_padding_mask, q_BHTD)
        dropout, weights_BHTS = self.dropout if self.training else 0.0, None
        if need_weights:
            scores_BHTS = q_BHTD @ k_BHSD.mT * self.head_dim**-0.5
            weights_BHTS = (scores_BHTS if mask is None else scores_BHTS + mask).softmax(dim=-1)
            weights_BHTS = F.dropout(weights_BHTS, dropout)
            mixed_BHTD = weights_BHTS @ v_BHSD
            if average_attn_weights:
                weights_BHTS = weights_BHTS.mean(dim=1)
        else:
            mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, mask, dropout)
        y = self.out_proj(mixed_BHTD.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights_BHTS is None else weights_BHTS.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights_BHTS

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> list[Tensor]:
        """Queries, keys and values, [B, H, T or S, D] each. One matmul for inputs that are the same tensor."""
        projected: dict[int, Tensor] = {}
        found = []
        for part, x in enumerate((query, key, value)):
            if id(x) not in projected:
                rows = x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)
                projected[id(x)] = self.in_proj(rows).chunk(3, dim=-1)
            found.append(projected[id(x)][part].unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        return found

    def _additive_mask(self, attn_mask: Tensor | None, padding_BS: Tensor | None, q_BHTD: Tensor) -> Tensor | None:
        """The sum of both masks in a shape that broadcasts to [B, H, T, S], or None. True means: do not attend."""
        masks = []
        if attn_mask is not None:  # [T, S] or [B * H, T, S]
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, q_BHTD.shape[:2]))
        if padding_BS is not None:
            masks.append(padding_BS[:, None, None, :])
        floats = [
            torch.zeros_like(mask, dtype=q_BHTD.dtype).masked_fill_(mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask
            for mask in masks
        ]
        return sum(floats[1:], start=floats[0]) if floats else None

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in ("weight", "bias"):
            if prefix + f"in_proj_{name}" in state_dict:
                state_dict[prefix + f"in_proj.{name}"] = state_dict.pop(prefix + f"in_proj_{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_masks(attn_mask: Tensor | None, padding: Tensor | None, q_BHTD: Tensor, k_BHSD: Tensor) -> None:
    """Raise ValueError for masks that PyTorch's attention refuses. Integers would be added to the scores."""
    (batch, heads, queries, _), keys = q_BHTD.shape, k_BHSD.shape[2]
    for name, mask, shapes in (
        ("attn_mask", attn_mask, [(queries, keys), (batch * heads, queries, keys)]),
        ("key_padding_mask", padding, [(batch, keys)]),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"{name} must be of bool or floating-point numbers, got {mask.dtype}; convert it to bool")
        if tuple(mask.shape) not in shapes:
            raise ValueError(f"{name} must have the shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")


def _call_projections(attention: nn.MultiheadAttention) -> None:
    if isinstance(attention, CallingAttention):
        return
    weight, bias = (attention._parameters.pop(f"in_proj_{name}") for name in ("weight", "bias"))
    attention.__class__ = CallingAttention
    in_proj = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    in_proj.weight, in_proj.bias = weight, bias
    attention.in_proj = in_proj.train(attention.training)


def _why_attention_stays(attention: nn.MultiheadAttention) -> str | None:
    if type(attention) not in (nn.MultiheadAttention, CallingAttention):
        return f"{type(attention).__name__} is a subclass of nn.MultiheadAttention with a forward pass of its own"
    if not attention._qkv_same_embed_dim:
        return "its keys or values have another width than its queries"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it adds a key to those that it is given"
    return None


def _leave_the_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    layer.activation_relu_or_gelu = 0  # it has no other use than to admit the fast path


def _leave_nested_tensors(encoder: nn.TransformerEncoder) -> None:
    encoder.use_nested_tensor = False  # made for the fast path


_ACTIVATION, _TRANSFORMER = "torch.nn.modules.activation", "torch.nn.modules.transformer"
register_reader(
    f"{_ACTIVATION}.MultiheadAttention", Reader(_call_projections, makes=("in_proj",), refusal=_why_attention_stays)
)
register_reader(f"{_TRANSFORMER}.TransformerEncoderLayer", Reader(_leave_the_fast_path))
register_reader(f"{_TRANSFORMER}.TransformerEncoder", Reader(_leave_nested_tensors))
for _name in ("TransformerEncoder", "TransformerEncoderLayer"):
    register_family(f"{_TRANSFORMER}.{_name}", Family(ENCODER_LINEARS))
