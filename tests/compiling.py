"""The ``fastops`` backend of `torch.compile`, and what it makes of a graph, for several files of tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastops.compile import compile_graph


class Recorder:
    """The compiler behind ``backend="fastops"`` in these tests: eager, and it keeps the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    @property
    def calls(self) -> list[str]:
        """The names of all functions and methods that the graphs call."""
        nodes = (node for graph in self.graphs for node in graph.graph.nodes if node.op.startswith("call"))
        return [getattr(node.target, "__name__", str(node.target)) for node in nodes]


def compiled(model: nn.Module, compiler: Any = "eager", **options: Any) -> nn.Module:
    """A copy. (`nn.Module.compile` leaves a bare `nn.Sequential` as it is up to torch 2.13.)"""
    return torch.compile(copy.deepcopy(model), backend=compile_graph, options={"compiler": compiler}, **options)


def leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
