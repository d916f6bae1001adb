"""Triton kernels for PyTorch layers and losses, with exact torch semantics, that plug into existing models."""

__version__ = "0.1.0"

try:
    from . import compile, functional, nn
    from .dispatch import backend, explain
    from .lm_head import fuse_lm_head, unfuse_lm_head
    from .ops import FallbackError, FallbackWarning
    from .precompile import warmup
    from .reporting import Report, report
    from .swap import swap, unswap
    from .tuning import Choice, Tuning, tune
    from .verification import Difference, Verification, verify
except (ImportError, ValueError, KeyboardInterrupt) as error:  # no torch; no backend of that name in FASTOPS_BACKEND
    from .cli import end_command

    end_command(error)
    raise

__all__ = [
    "Choice",
    "Difference",
    "FallbackError",
    "FallbackWarning",
    "Report",
    "Tuning",
    "Verification",
    "__version__",
    "backend",
    "compile",
    "explain",
    "functional",
    "fuse_lm_head",
    "nn",
    "report",
    "swap",
    "tune",
    "unfuse_lm_head",
    "unswap",
    "verify",
    "warmup",
]
