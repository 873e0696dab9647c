"""A piece of a network for running frozen: the same function, without what training would need.

    conv -> BN       one convolution with folded weights          (`fold`)
    conv             gradient towards the input alone, keeps no input
    BN               an affine map of constants, keeps no input
    ReLU, ReLU6      keeps one bit an element
    Dropout          gone

Eager autograd keeps the input of every convolution and BatchNorm and the output of every ReLU,
though their parameters ask for no gradient; here a stage keeps the bits and what other layers need.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...kernels import frozen_conv2d, frozen_relu
from ...kernels.backend import autocast_dtype
from ..files import first_line
from .external import plain_layers
from .parts import eval_mode
from .trace import RELU_MODULES, RELUS, LeafTracer

_DROPOUTS = (nn.Dropout, nn.Dropout2d, F.dropout)
_log = logging.getLogger(__name__)


def freeze(module: nn.Module, *, fold: bool) -> nn.Module:
    """The function that `module` computes in eval mode, for a frozen network.

    Args:
        module: A piece that torch.fx can trace, [B, C, H, W] in. It is not altered, and its
            convolutions and BatchNorms live on as constants of the result.
        fold: Multiply a BatchNorm into the convolution whose only reader it is (in fp64, rounded
            once) and make an affine map of any other. Otherwise the constants share memory with
            the module's parameters, and fp32 results have the bits of the module's own.

    Returns:
        A module without parameters for what it replaced. Operations in place on activations are
        made out of place. A module that cannot be traced is returned as it is, with a warning.
    """
    module = plain_layers(module)
    try:
        with eval_mode(module):
            graph = LeafTracer(set()).trace(module)
    except Exception as error:  # tracing runs foreign code on proxies: it can raise anything
        _log.warning(
            "%s cannot be traced and stays as it is: its activations are kept (%s)",
            type(module).__name__,
            first_line(error),
        )
        return module
    frozen = fx.GraphModule(module, graph, type(module).__name__)
    layers = dict(frozen.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    if fold:
        for node in calls:
            _fold_into_convolution(frozen, node, layers)
    for name in {str(node.target) for node in calls}:
        layer = layers[name]
        if _is_convolution(layer):
            frozen.set_submodule(
                name, FrozenConv2d(layer, layer.weight, layer.bias, exact=not fold)
            )
        elif _is_batch_norm(layer):
            frozen.set_submodule(name, FrozenAffine(layer) if fold else FrozenBatchNorm2d(layer))
    for node in list(graph.nodes):
        _replace_activation(node, layers)
    frozen.delete_all_unused_submodules()
    frozen.recompile()
    # What was not replaced is still the module's own: a copy of it, around the same constants.
    constants = {id(b): b for m in frozen.modules() if isinstance(m, _FROZEN) for b in m.buffers()}
    return copy.deepcopy(frozen, constants).eval().requires_grad_(False)


class _Constants(nn.Module):
    """Buffers for frozen values, and their copies in the dtype of mixed precision, made once."""

    def __init__(self, **values: Tensor | None) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, None if value is None else value.detach())
        self.copies: dict[torch.dtype, list[Tensor | None]] = {}

    def values(self, dtype: torch.dtype) -> list[Tensor | None]:
        own = list(self._buffers.values())
        if own[0] is None or own[0].dtype == dtype:
            return own
        if dtype in self.copies:
            return self.copies[dtype]
        copies = [None if value is None else value.to(dtype) for value in own]
        # A tensor made inside a compiled graph may live in memory that its next replay overwrites.
        if not torch.compiler.is_compiling():
            self.copies[dtype] = copies
        return copies

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.copies = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.copies = {}
        super()._load_from_state_dict(*args)


class FrozenConv2d(_Constants):
    """`frozen_conv2d` with constants [C_out, C / groups, kh, kw] and [C_out] or None."""

    def __init__(
        self, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, *, exact: bool
    ) -> None:
        super().__init__(weight=weight, bias=bias)
        self.exact = exact  # the bits of torch's own convolution
        self.options = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C_out, H_out, W_out]
        weight, bias = self.values(autocast_dtype(x) or self.weight.dtype)
        return frozen_conv2d(x, weight, bias, *self.options, exact=self.exact)


class FrozenAffine(_Constants):
    """BatchNorm of fixed statistics as y = scale x + shift. Autograd keeps the scale alone."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        scale, shift = _affine(norm)
        dtype = norm.running_mean.dtype
        super().__init__(scale=scale.to(dtype)[:, None, None], shift=shift.to(dtype)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> same
        scale, shift = self.values(x.dtype)
        return torch.addcmul(shift, x, scale)


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm of fixed statistics, with the bits of torch's own."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("running_mean", "running_var", "weight", "bias"):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.detach())
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> same
        return _EvalBatchNorm.apply(  # type: ignore[no-any-return]
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
        )


_FROZEN = (FrozenConv2d, FrozenAffine, FrozenBatchNorm2d)


class _EvalBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mean, var, weight = ctx.saved_tensors
        # The map is affine: its gradient is the same map without the shift.
        grad_x = F.batch_norm(grad_y, torch.zeros_like(mean), var, weight, eps=ctx.eps)
        return grad_x, None, None, None, None, None


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """scale and shift [C] of a BatchNorm of fixed statistics, in fp64."""
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _fold_into_convolution(
    frozen: fx.GraphModule, node: fx.Node, layers: dict[str, nn.Module]
) -> None:
    """Makes one convolution of a BatchNorm and the convolution before it, where they allow it."""
    source, norm = node.args[0], layers[str(node.target)]
    if not (_is_batch_norm(norm) and isinstance(source, fx.Node) and source.op == "call_module"):
        return
    name, conv = str(source.target), layers[str(source.target)]
    called_once = sum(other.target == source.target for other in frozen.graph.nodes) == 1
    if not (_is_convolution(conv) and called_once and len(source.users) == 1):
        return
    scale, shift = _affine(norm)
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    bias = shift if conv.bias is None else shift + conv.bias.detach().double() * scale
    dtype = conv.weight.dtype
    frozen.set_submodule(name, FrozenConv2d(conv, weight.to(dtype), bias.to(dtype), exact=False))
    layers[name] = frozen.get_submodule(name)
    node.replace_all_uses_with(source)
    frozen.graph.erase_node(node)


def _replace_activation(node: fx.Node, layers: dict[str, nn.Module]) -> None:
    """Makes a ReLU or ReLU6 a `frozen_relu` out of place; takes a Dropout out."""
    is_module = node.op == "call_module"
    kind = type(layers[str(node.target)]) if is_module else node.target
    if kind in _DROPOUTS:
        node.replace_all_uses_with(node.args[0])
        node.graph.erase_node(node)
    elif node.op.startswith("call_") and kind in (RELU_MODULES if is_module else RELUS):
        x, *flags = node.args
        if is_module:
            flags = [layers[str(node.target)].inplace]
        if any(flags) or any(node.kwargs.values()) or kind in (torch.relu_, "relu_"):
            # Whoever read x afterwards read the activation.
            x.replace_all_uses_with(node, delete_user_cb=lambda user: user > node)
        with node.graph.inserting_before(node):
            limit = 6.0 if kind in (nn.ReLU6, F.relu6) else None
            relu = node.graph.call_function(frozen_relu, (x, limit))
        node.replace_all_uses_with(relu)
        node.graph.erase_node(node)


def _is_convolution(layer: nn.Module) -> bool:
    """Subclasses may compute something else; padding by name or by reflection has no shorthand."""
    return (
        type(layer) is nn.Conv2d
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _is_batch_norm(layer: nn.Module) -> bool:
    return type(layer) is nn.BatchNorm2d and layer.running_mean is not None
