"""`weights_quantized_once`: quantize each weight once for several forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .formats import Rounding
from .linear import QuantLinear, WeightCache
from .shards import is_sharded
from .swap import quant_linears


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, each Q2(W) is computed once and used again until its weight changes.

    The block is meant for the micro-batches of a step, and for an evaluation. Every backward pass still draws a new Q4.

    Optimizer steps, in-place edits, `load_state_dict`, averages that move and parameters that are replaced are
    noticed; an edit through `.data`, which PyTorch does not count, is not noticed until the block ends. Layers whose
    Q2 is stochastic, and compiled ones, quantize in every forward pass; so do sharded ones, because a process must not
    keep their whole weights, and those made under `torch.inference_mode`, whose edits PyTorch does not count.
    """
    layers = [
        layer
        for layer in quant_linears(model).values()
        if layer.recipe.q2.rounding is not Rounding.STOCHASTIC
        and not is_sharded(layer.weight)
        and not any(tensor.is_inference() for tensor in (*layer.parameters(), *layer.buffers()))
    ]
    before = [layer.weight_cache for layer in layers]
    for layer in layers:
        if layer.weight_cache is None:
            layer.weight_cache = _VersionedCache(layer)
    try:
        yield
    finally:
        for layer, cache in zip(layers, before):
            layer.weight_cache = cache


class _VersionedCache(WeightCache):
    """Keeps Q2(W) of one layer until a tensor that it was computed from changes.

    Every in-place write to a tensor raises its version; a tensor put into another's place has another identity. Writes
    through `tensor.data` or by a CUDA graph change neither, so `weights_quantized_once` limits the cache's life.
    """

    def __init__(self, layer: QuantLinear) -> None:
        self._layer = layer
        self._made: tuple | None = None
        self._key: tuple | None = None

    def _key_of(self, *how) -> tuple:
        layer = self._layer
        tensors = [layer.weight, *((layer.weight_ema, layer.ema_updates) if layer.use_q_ema else ())]
        return (layer.recipe, *how, *((id(t), t.data_ptr(), t._version) for t in tensors))

    def get(self, *how):
        return self._made if self._made is not None and self._key == self._key_of(*how) else None

    def put(self, made, *how) -> None:
        self._made, self._key = made, self._key_of(*how)
