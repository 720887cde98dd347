"""FLOPs by the paper's convention (§5.2): linear projections, attention products and convolutions of a forward pass.

Counted on the traced program, so that whatever runs is counted: a multiply and an add are two. Training is three
times the forward pass. Elementwise work, norms and softmax are left out, as is recomputation.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["TRAINING", "forward_flops"]

TRAINING = 3
"""Forward and backward together, in forward passes."""


def forward_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of the matrix products and convolutions in `function(*args)`; arguments may be `ShapeDtypeStruct`s."""
    return _count(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        shapes: list[tuple[int, ...]] = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
        outs: list[tuple[int, ...]] = [getattr(variable.aval, "shape", ()) for variable in equation.outvars]
        match equation.primitive.name:
            case "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                total += 2 * math.prod(outs[0]) * math.prod(shapes[0][axis] for axis in contracted)
            case "conv_general_dilated":
                # The kernel's output axis does not multiply the work of one output element.
                kernel, axis = shapes[1], equation.params["dimension_numbers"].rhs_spec[0]
                total += 2 * math.prod(outs[0]) * math.prod(kernel) // kernel[axis]
            case "scan":
                total += equation.params["length"] * _count(equation.params["jaxpr"].jaxpr)
            case "cond":
                total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
            case "while":
                raise ValueError("a loop without a fixed number of turns cannot be counted")
            case name if "dot" in name or "conv_general" in name or "pallas" in name:
                raise ValueError(f"do not know how to count the FLOPs of {name}")
            case _:
                for value in equation.params.values():
                    inner = getattr(value, "jaxpr", value)
                    if hasattr(inner, "eqns"):
                        total += _count(inner)
    return total
