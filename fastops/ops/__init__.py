"""The raw ops: kernels behind torch's dispatcher, so that fake tensors, vmap and compilers can see them.

They carry no autograd: `fastops.autograd` differentiates them. Each takes the backend as an argument, so that a
backward pass runs where its forward did, whatever `fastops.backend` says by then. Importing this package registers them
all, so that a saved program that names one can be loaded.
"""

from . import add_relu, bce, conv, cross_entropy, linear, linear_cross_entropy, mse  # noqa: F401
from .registry import FallbackWarning

__all__ = ["FallbackWarning"]
