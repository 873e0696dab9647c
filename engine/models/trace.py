"""Cutting any traceable model after named modules, with torch.fx."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import UsageError
from ..files import first_line
from .names import unknown_name
from .parts import Parts, eval_mode

RELUS = {torch.relu, torch.relu_, F.relu, F.relu6, "relu", "relu_"}
RELU_MODULES = (nn.ReLU, nn.ReLU6)
_ACTIVATIONS = {"relu", "relu6", "silu", "gelu", "hardswish", "leaky_relu", "elu"}
_KEEP_SIGN_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.Dropout, nn.Identity)


def cut_after(model: nn.Module, at: Sequence[str]) -> Parts:
    """Cuts a model after the outputs of the modules at the paths `at`.

    What follows the last cut is split into neck and head after its last layer that has parameters
    and is not linear, and the activation of that layer. `post_relu` is true where
    tracing shows a ReLU at the end of the stage; a stage that is non-negative for another reason
    counts as false. The model is traced in eval mode (functional dropout stays off) and is not
    altered.

    Raises:
        UsageError: Unknown path, a model that does not trace, or other than one tensor at a cut.
    """
    known = dict(model.named_modules())
    if not at:
        raise UsageError("stages=(): expected one module path or more")
    for path in at:
        if path not in known or not path:
            raise unknown_name(f"module path of {type(model).__name__}", path, filter(None, known))

    # The wrapper lets a forward of several arguments keep their defaults.
    root = nn.Sequential(OrderedDict(model=model))
    nodes = list(_trace(root, {f"model.{path}" for path in at}, at).nodes)
    cuts = [_called_once(nodes, path) for path in at]
    if cuts != sorted(set(cuts)):
        raise UsageError(f"stages={','.join(at)}: expected different modules in order of execution")
    for cut, path in zip(cuts, at, strict=True):
        crossing = _crossing(nodes, cut)
        if crossing != [nodes[cut]]:
            names = ", ".join(str(node).removeprefix("model_") for node in crossing) or "none"
            raise UsageError(
                f"cannot cut after {path}: expected its output alone to be used later, got {names}"
            )

    starts = [0, *cuts[:-1]]  # node 0 is the image
    stages = [_segment(root, nodes, a, b) for a, b in zip(starts, cuts, strict=True)]
    last, end = cuts[-1], len(nodes) - 2  # the node before `output`
    split = _head_boundary(root, nodes, last)
    return Parts(
        stages,
        _segment(root, nodes, last, split),
        _segment(root, nodes, split, end),
        [_ends_in_relu(root, nodes[cut]) for cut in cuts],
    )


class LeafTracer(fx.Tracer):
    """Keeps the cut modules whole, and modules without children, whose code need not trace."""

    def __init__(self, cuts: set[str]) -> None:
        super().__init__()
        self.cuts = cuts

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = next(m.children(), None) is None
        return (
            module_qualified_name in self.cuts
            or childless
            or super().is_leaf_module(m, module_qualified_name)
        )


def _trace(root: nn.Module, cuts: set[str], at: Sequence[str]) -> fx.Graph:
    name = type(root.get_submodule("model")).__name__
    try:
        with eval_mode(root):
            graph = LeafTracer(cuts).trace(root)
    except Exception as error:  # tracing runs foreign code on proxies: it can raise anything
        raise UsageError(
            f"{name} cannot be traced, so it cannot be cut at {','.join(at)} ({first_line(error)})"
        ) from error
    output = list(graph.nodes)[-1].args[0]
    if not isinstance(output, fx.Node):
        raise UsageError(f"{name} returns {type(output).__name__}, expected one tensor of logits")
    return graph


def _called_once(nodes: list[fx.Node], path: str) -> int:
    calls = [i for i, node in enumerate(nodes) if node.target == f"model.{path}"]
    if len(calls) != 1:
        raise UsageError(f"cannot cut after {path}: called {len(calls)} times, expected once")
    return calls[0]


def _crossing(nodes: list[fx.Node], cut: int) -> list[fx.Node]:
    """Values computed up to `cut` and used after it; parameters are at hand everywhere."""
    later = set(nodes[cut + 1 :])
    return [n for n in nodes[: cut + 1] if n.op != "get_attr" and not later.isdisjoint(n.users)]


def _segment(root: nn.Module, nodes: list[fx.Node], start: int, end: int) -> nn.Module:
    """The module that computes node `end` from node `start`, sharing the submodules of `root`."""
    if start == end:
        return nn.Identity()
    graph = fx.Graph()
    copies = {nodes[start]: graph.placeholder("x")}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter first read in an earlier segment
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes[start + 1 : end + 1]:
        copies[node] = graph.node_copy(node, copy_of)
    graph.output(copies[nodes[end]])
    return fx.GraphModule(root, graph)


def _head_boundary(root: nn.Module, nodes: list[fx.Node], last_cut: int) -> int:
    """Index of the last node of the neck; the head is what follows and must have parameters."""
    tail = range(last_cut + 1, len(nodes) - 1)
    boundary = max((i for i in tail if _is_backbone(root, nodes[i])), default=last_cut)
    while boundary > last_cut and _is_activation(root, nodes[boundary + 1]):
        boundary += 1
    head = nodes[boundary + 1 : -1]
    if _crossing(nodes, boundary) == [nodes[boundary]] and any(_has_weights(root, n) for n in head):
        return boundary
    return last_cut


def _has_weights(root: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return next(root.get_submodule(str(node.target)).parameters(), None) is not None


def _is_backbone(root: nn.Module, node: fx.Node) -> bool:
    if any(source.op == "get_attr" for source in node.all_input_nodes):
        return True
    is_linear = node.op == "call_module" and isinstance(
        root.get_submodule(str(node.target)), nn.Linear
    )
    return _has_weights(root, node) and not is_linear


def _is_activation(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))).__module__ == nn.ReLU.__module__
    return getattr(node.target, "__name__", str(node.target)).rstrip("_") in _ACTIVATIONS


def _ends_in_relu(root: nn.Module, node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return isinstance(node, fx.Node) and node.target in RELUS
    module = root.get_submodule(str(node.target))
    if isinstance(module, _KEEP_SIGN_MODULES):
        return _ends_in_relu(root, node.args[0])
    return ends_in_relu(module)


def ends_in_relu(module: nn.Module) -> bool:
    """Whether tracing shows a ReLU at the end of `module`."""
    if isinstance(module, RELU_MODULES) or next(module.children(), None) is None:
        return isinstance(module, RELU_MODULES)
    try:
        with eval_mode(module):
            graph = LeafTracer(set()).trace(module)
    except Exception:  # foreign code on proxies; a stage that cannot be looked into counts as False
        return False
    return _ends_in_relu(module, list(graph.nodes)[-1].args[0])
