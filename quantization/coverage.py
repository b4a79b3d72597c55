"""`coverage`: which linears of a model are really quantized, seen from what a forward pass reads.

A layer that prints as quantized may be computed around: a module can pass its weight to a function instead of calling
it. So every matmul that reads a parameter is watched below PyTorch's dispatcher, and a read of a quantized layer's
weight that does not come from the layer's own forward pass is a bypass.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .matmul import underflow_counters
from .recipe import is_quantized_layer


class Status(str, Enum):
    """The way in which a linear computes."""

    QUANTIZED = "quantized"
    FULL_PRECISION = "full precision"
    BYPASSED = "bypassed"
    """A quantized layer whose weight was read by something else, in training or in evaluation mode."""
    UNUSED = "unused"
    """A quantized layer that neither pass called."""


@dataclass(frozen=True)
class Linear:
    """A linear layer, or a parameter that is multiplied like the weight of one."""

    name: str
    status: Status
    parameters: int
    """Elements of weight and bias."""
    flops: int
    """Floating-point operations of its matmul in one forward pass over the inputs, two per product."""


@dataclass(frozen=True)
class Coverage:
    """The linears of a model. Printed, it is a table with one line for each ending of names that are alike."""

    linears: tuple[Linear, ...]

    def having(self, status: Status) -> list[Linear]:
        return [linear for linear in self.linears if linear.status is status]

    def flops_share(self, status: Status) -> float:
        """The share in percent of all linears' FLOPs."""
        total = sum(linear.flops for linear in self.linears)
        return 100 * sum(linear.flops for linear in self.having(status)) / total if total else 0.0

    def summary(self) -> str:
        """One line: how many linears are quantized, their share of parameters and FLOPs, and what the others are."""
        quantized = self.having(Status.QUANTIZED)
        total = sum(linear.parameters for linear in self.linears)
        parameters = 100 * sum(linear.parameters for linear in quantized) / total if total else 0.0
        line = f"{len(quantized)} of {len(self.linears)} linears quantized: {parameters:.1f} % of their parameters, "
        line += f"{self.flops_share(Status.QUANTIZED):.1f} % of their FLOPs"
        for status in (Status.FULL_PRECISION, Status.BYPASSED, Status.UNUSED):
            if found := self.having(status):
                names = [linear.name for linear in found]
                line += f"; {status.value}: {', '.join(names[:3])}" + (", ..." if len(names) > 3 else "")
        return line

    def __str__(self) -> str:
        groups: dict[tuple[str, Status], list[Linear]] = defaultdict(list)
        for linear in self.linears:
            pattern = re.sub(r"(?<![^._])\d+(?=\.|$)", "*", linear.name)
            groups[pattern, linear.status].append(linear)
        total = max(1, sum(linear.flops for linear in self.linears))
        width = max([7, *(len(pattern) for pattern, _ in groups)])
        lines = [f"{'linears':{width}}  {'number':>6}  {'status':14}  {'parameters':>12}  {'FLOPs':>7}"]
        for (pattern, status), found in groups.items():
            share = 100 * sum(linear.flops for linear in found) / total
            parameters = sum(linear.parameters for linear in found)
            lines.append(f"{pattern:{width}}  {len(found):>6}  {status.value:14}  {parameters:>12,}  {share:>5.1f} %")
        return "\n".join([*lines, self.summary()])


def coverage(model: nn.Module, *inputs: object) -> Coverage:
    """Run `model(*inputs)` in training mode and in evaluation mode, and tell which linears were quantized.

    Give small inputs, of at least two images if the model has batch norms. Random generators, buffers and modes are as
    before afterwards. Call it before `model.compile()` and before the model is sharded.
    """
    watch = _Watch(model)
    modes = {module: module.training for module in model.modules()}
    try:
        with _undone(model), watch.calls_observed():
            for training, gradients in ((True, True), (False, False)):
                model.train(training)
                with torch.set_grad_enabled(gradients), watch:
                    model(*inputs)
                watch.end_of_pass()
    finally:
        model.train(model.training)  # modules that cache something between evaluations drop it here
        for module, training in modes.items():
            module.training = training
    return Coverage(tuple(watch.linears()))


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Put back what forward passes change: random generators, buffers and the counters of underflowed groups."""
    buffers = [
        (module, name, buffer, None if buffer is None or buffer.is_inference() else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    counts = {device: underflow_counters(device).forward.clone() for device in devices}
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer  # a forward pass may have put another tensor in its place
                if before is not None:
                    buffer.copy_(before)
        for device, before in counts.items():
            underflow_counters(device).forward.copy_(before)


@dataclass(eq=False)
class _Weight:
    """A parameter with at least two axes, and what was seen of it."""

    name: str
    """The layer's name, or the parameter's own if no linear has it."""
    layer: nn.Linear | None
    parameters: int
    bypassed: bool = False
    """Something else than the layer read it."""
    called: bool = False
    flops: int = 0
    """The most of any pass."""
    flops_of_pass: int = 0


@dataclass
class _Place:
    """The elements of a storage that belong to a weight, or to several layers that share it."""

    start: int
    stop: int
    weights: list[_Weight] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    """Sees every operator, with the tensors that it reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights: list[_Weight] = []
        self._places: dict[int, list[_Place]] = defaultdict(list)
        self._copies: list[Tensor] = []
        """Copies of weights, such as autocast's in bf16. They stay alive, so that no other tensor takes their place."""
        self._active: list[_Weight] = []
        """The linears whose forward passes are under way, the innermost last."""
        in_layers = set()
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                size = sum(p.numel() for p in (layer.weight, layer.bias) if p is not None)
                self._add(_Weight(name, layer, size), layer.weight)
                in_layers.add(id(layer.weight))
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and id(parameter) not in in_layers:
                self._add(_Weight(name, None, parameter.numel()), parameter)

    def _add(self, weight: _Weight, tensor: Tensor) -> None:
        self._weights.append(weight)
        self._place(weight, tensor)

    def _place(self, weight: _Weight, tensor: Tensor) -> None:
        start = tensor.storage_offset()
        places = self._places[tensor.untyped_storage()._cdata]
        place = next((place for place in places if place.start == start), None)
        if place is None:
            place = _Place(start, start + tensor.numel())
            places.append(place)
        place.weights.append(weight)

    def _weights_in(self, tensor: Tensor) -> list[_Weight]:
        """The weights that `tensor`, perhaps a view of a part of one, belongs to."""
        offset = tensor.storage_offset()
        places = self._places.get(tensor.untyped_storage()._cdata, ())
        return next((place.weights for place in places if place.start <= offset < place.stop), [])

    @contextmanager
    def calls_observed(self) -> Iterator[None]:
        """Record the calls of the linears. Hooks would do, but PyTorch's fast paths are off where there are hooks."""
        replaced = []
        for weight in self._weights:
            if weight.layer is not None and "forward" not in vars(weight.layer):
                weight.layer.forward = self._observed(weight, weight.layer.forward)
                replaced.append(weight.layer)
        try:
            yield
        finally:
            for layer in replaced:
                del layer.forward

    def _observed(self, weight: _Weight, forward: Callable) -> Callable:
        def call(*args, **kwargs) -> object:
            self._active.append(weight)
            try:
                y = forward(*args, **kwargs)
            finally:
                self._active.pop()
            weight.called = True
            result = tree_leaves(y)[0]  # a subclass may return more, such as Megatron's, which return the bias, too
            weight.flops_of_pass += 2 * result.numel() * weight.layer.in_features
            return y

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _is_view(func):
            for tensor in (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
                weights = self._weights_in(tensor)
                if not any(active in weights for active in self._active):
                    for weight in weights:
                        weight.bypassed = True
                        weight.flops_of_pass += _flops(func, args, kwargs, result, weight)
                        if func._overloadpacket in _COPYING:
                            self._copies.append(result)
                            self._place(weight, result)
        return result

    def end_of_pass(self) -> None:
        for weight in self._weights:
            weight.flops, weight.flops_of_pass = max(weight.flops, weight.flops_of_pass), 0

    def linears(self) -> Iterator[Linear]:
        for weight in self._weights:
            quantized = weight.layer is not None and is_quantized_layer(weight.layer)
            if quantized and weight.bypassed:
                status = Status.BYPASSED
            elif quantized:
                status = Status.QUANTIZED if weight.called else Status.UNUSED
            elif weight.layer is None and not weight.flops:  # an embedding, a convolution, a bias of attention
                continue
            else:
                status = Status.FULL_PRECISION
            yield Linear(weight.name, status, weight.parameters, weight.flops)


def _is_view(func) -> bool:
    """Tell if an operator only looks at its input in another shape."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


_COPYING = {torch.ops.aten._to_copy, torch.ops.aten.clone}
_CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten._convolution, torch.ops.aten.cudnn_convolution}
_FUSED = {torch.ops.aten._transformer_encoder_layer_fwd, torch.ops.aten._native_multi_head_attention}


def _flops(func, args: tuple, kwargs: dict, result: object, weight: _Weight) -> int:
    """FLOPs of a matmul, or of the share of `weight` in an operator that is fused of several; else 0."""
    packet = func._overloadpacket
    if packet in _FUSED:  # the first argument has the tokens
        elements = weight.parameters if weight.layer is None else weight.layer.weight.numel()
        return 2 * args[0].shape[:-1].numel() * elements
    if packet in flop_registry and packet not in _CONVOLUTIONS:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    return 0
