"""Which operation becomes which node: rules, found by function, method, ATen operator or module type.

A rule gets the emitter, the raw node and its arguments (before them the module, for module calls), in which tensors are
nodes of the new graph or constants. It returns a node of the new graph, a constant, a number, or a tuple of these.
"""

from collections.abc import Callable
from typing import Any, Final

from torch import fx, nn

Rule = Callable[..., Any]
FUNCTIONS: Final[dict[Any, Rule]] = {}
METHODS: Final[dict[str, Rule]] = {}
MODULES: Final[dict[type[nn.Module], Rule]] = {}


def rule(
    *targets: Any, methods: tuple[str, ...] = (), modules: tuple[type[nn.Module], ...] = ()
) -> Callable[[Rule], Rule]:
    """Register a rule. A string among the targets names an ATen operator, all overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            FUNCTIONS[target] = function
        for method in methods:
            METHODS[method] = function
        for module in modules:
            MODULES[module] = function
        return function

    return register


def shape_of(x: fx.Node) -> tuple[int, ...]:
    """Shape of a tensor of the new graph at the batch size of the propagation."""
    return tuple(x.meta["shape"])
