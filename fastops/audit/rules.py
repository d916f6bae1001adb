"""What the machine code of every kernel must show. `docs/audit.md` has the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from .launches import Launch
from .machine_code import Machine
from .targets import TARGETS, TENSOR_MEMORY_COLUMNS

ISSUE_BOUNDS: Final[dict[tuple[str, str], float]] = {
    ("sm90", "matmul_kernel"): 0.95,
    ("sm90", "persistent_matmul_kernel"): 0.95,
    ("sm90", "conv_kernel"): 0.8,
    ("sm90", "conv_grad_input_kernel"): 0.7,
    ("sm90", "conv_grad_weight_kernel"): 0.65,
}


class Rule(NamedTuple):
    """``broken`` tells how, or returns nothing."""

    name: str
    explanation: str
    broken: Callable[[Launch, Machine], str | None]


def _spills(launch: Launch, machine: Machine) -> str | None:
    return f"{machine.spilled_registers} spills" if machine.spilled_registers else None


def _shared_memory(launch: Launch, machine: Machine) -> str | None:
    limit = TARGETS[launch.target].shared_memory
    return f"{machine.shared_memory} of {limit} bytes" if machine.shared_memory > limit else None


def _tensor_memory(launch: Launch, machine: Machine) -> str | None:
    columns = machine.tensor_memory
    return f"{columns} of {TENSOR_MEMORY_COLUMNS} columns" if columns > TENSOR_MEMORY_COLUMNS else None


def _matrix_instruction(launch: Launch, machine: Machine) -> str | None:
    wanted = launch.product and launch.dtype not in ("fp32", "fp64") and TARGETS[launch.target].matrix_units
    return "none in the main loop" if wanted and not machine.loop.get("matrix") else None


def _wide_access(launch: Launch, machine: Machine) -> str | None:
    if not launch.wide or any(int(bits) >= 128 for bits in machine.accesses):
        return None
    return f"none among {sum(machine.accesses.values())}"


def _stream_width(launch: Launch, machine: Machine) -> str | None:
    if not launch.stream:
        return None
    wide = {int(bits): count for bits, count in machine.accesses.items() if int(bits) >= launch.width}
    covered = sum(bits * count for bits, count in wide.items()) // 8
    if covered < launch.stream:
        return f"{covered} of {launch.stream} bytes {launch.width} bits at a time"
    narrow = sum(machine.accesses.values()) - sum(wide.values())
    arguments = sum(str(type_).startswith("*") for type_ in launch.request["types"].values())
    return f"{narrow} narrower ones" if launch.width == 128 and narrow > arguments and not launch.narrow else None


def _issue_bound(launch: Launch, machine: Machine) -> str | None:
    least = ISSUE_BOUNDS.get((launch.target, launch.kernel))
    if not launch.leading or least is None or (machine.issue_bound or 0.0) >= least:
        return None
    return f"{machine.issue_bound} < {least}"


RULES: Final = (
    Rule("spill", "no register spills to memory", _spills),
    Rule("shared-memory", "a program's shared memory fits the card", _shared_memory),
    Rule("tensor-memory", "a program's tensor memory fits the card", _tensor_memory),
    Rule(
        "matrix-instruction",
        "16-bit, tf32 and bf16x3 products use the matrix units in their main loop",
        _matrix_instruction,
    ),
    Rule("wide-access", "products read or write aligned rows 128 bits at a time", _wide_access),
    Rule("stream-width", "losses read and write tensors 128 bits at a time, of odd sizes 64 or more", _stream_width),
    Rule("issue-bound", "the main loop of a large product leaves the matrix units busy", _issue_bound),
)


def broken_rules(launch: Launch, machine: Machine) -> dict[str, str]:
    """Name of each rule that this machine code breaks, and how."""
    return {rule.name: how for rule in RULES if (how := rule.broken(launch, machine))}
