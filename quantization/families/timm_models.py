"""timm's Transformers, by the import paths of their classes: nothing here imports timm."""

from __future__ import annotations

from torch import nn

from .base import BLOCK_LINEARS, Family, Reader, register_family, register_reader

_MERGING = ("downsample.reduction",)
SWIN_LINEARS = (*BLOCK_LINEARS, *_MERGING)
"""The four of every block and the one other linear of the stages, the reduction of each patch merging."""

_GATED = ("mlp.fc1_g", "mlp.fc1_x", "mlp.w0", "mlp.w1", "mlp.w2")
_SPLIT = ("attn.q", "attn.k", "attn.v", "attn.kv")
_PARALLEL = ("in_proj", "attn_out_proj", "mlp_out_proj", "out_proj")
_MIXER = ("token_mixer.qkv", "token_mixer.proj")
_MORE = {  # beside BLOCK_LINEARS
    "vision_transformer.VisionTransformer": (*_GATED, *_PARALLEL),
    "eva.Eva": (*_GATED, "attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "swin_transformer.SwinTransformer": _MERGING,
    "swin_transformer_v2.SwinTransformerV2": _MERGING,
    "swin_transformer_v2_cr.SwinTransformerV2Cr": _MERGING,
    "cait.Cait": _SPLIT,
    "xcit.Xcit": _SPLIT,
    "pvt_v2.PyramidVisionTransformerV2": _SPLIT,
    "twins.Twins": _SPLIT,
    "volo.VOLO": _SPLIT,
    "convit.ConVit": ("attn.qk", "attn.v"),
    "crossvit.CrossVit": ("attn.wq", "attn.wk", "attn.wv"),
    "edgenext.EdgeNeXt": ("xca.qkv", "xca.proj"),
    "efficientformer.EfficientFormer": _MIXER,
    "metaformer.MetaFormer": _MIXER,
    "coat.CoaT": tuple(f"factoratt_crpe{i}.{n}" for i in ("", 2, 3, 4) for n in ("qkv", "proj"))
    + ("mlp2.fc1", "mlp2.fc2"),
    "levit.Levit": ("qkv.linear", "q.ln.linear", "kv.linear", "proj.ln.linear", "mlp.ln1.linear", "mlp.ln2.linear"),
    "maxxvit.MaxxVit": tuple(f"{where}.{name}" for where in ("attn_block", "attn_grid") for name in ("qkv", "proj")),
    "mlp_mixer.MlpMixer": tuple(f"mlp_{of}.{name}" for of in ("tokens", "channels") for name in ("fc1", "fc2"))
    + ("mlp_channels.gate.proj", "linear_tokens"),
    "fastvit.FastVit": _MIXER,
    "gemma4_vit.Gemma4VitClassifier": tuple(
        f"{name}.linear"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ),
    "swiftformer.SwiftFormer": ("attn.to_query", "attn.to_key", "attn.final"),
    "tnt.TNT": tuple(f"attn_{where}.{name}" for where in ("in", "out") for name in ("qk", "v", "proj"))
    + ("mlp_in.fc1", "mlp_in.fc2"),
    "nextvit.NextViT": ("e_mhsa.q", "e_mhsa.k", "e_mhsa.v", "e_mhsa.proj"),
}
for _path, _linears in _MORE.items():
    register_family(f"timm.models.{_path}", Family((*BLOCK_LINEARS, *_linears)))


def _add_the_bias_after(attention: nn.Module) -> None:
    """Make the module call `qkv` and add its bias afterwards, instead of passing both to a function."""
    attention.qkv_bias_separate = True


def _why_it_cannot(attention: nn.Module) -> str | None:
    return None if hasattr(attention, "qkv_bias_separate") else "it has no qkv_bias_separate; timm 1.0.20 has"


for _path in ("beit.Attention", "eva.EvaAttention", "swin_transformer_v2.WindowAttention"):
    register_reader(f"timm.models.{_path}", Reader(_add_the_bias_after, refusal=_why_it_cannot))
