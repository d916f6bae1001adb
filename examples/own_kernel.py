"""A Triton kernel of your own, tested without a GPU: its values, the memory that it touches, its machine code.

    python examples/own_kernel.py

Needs the extra audit. On a machine with a GPU the same tests run there.
"""

import os

import torch

if __name__ == "__main__" and not torch.cuda.is_available():  # before the kernel is defined: that is when it counts
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl
from torch import Tensor

from fastops.accuracy import error_share
from fastops.audit.machine_code import Machine, machine_code
from fastops.guard import run_guarded, same_bits


@triton.jit
def rms_norm_kernel(input_ptr, weight_ptr, output_ptr, columns, stride, epsilon, BLOCK: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)  # times the stride it may not fit 32 bits
    lanes = tl.arange(0, BLOCK)
    inside = lanes < columns
    within = tl.minimum(lanes, columns - 1)  # an address of the row, where the mask is false too
    x = tl.load(input_ptr + row * stride + within, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + within, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / columns + epsilon)
    tl.store(output_ptr + row * columns + lanes, (x * scale * weight).to(output_ptr.dtype.element_ty), mask=inside)


def rms_norm(input: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Rows over the root of their mean square, times ``weight``: [rows, columns], whose rows are contiguous."""
    rows, columns = input.shape
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    block = triton.next_power_of_2(columns)
    rms_norm_kernel[(rows,)](input, weight, output, columns, input.stride(0), epsilon, BLOCK=block)
    return output


def test_values_and_memory() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.float16):  # not bfloat16: Triton's interpreter cuts off where a GPU rounds
        for rows, columns, gap in ((64, 1, 0), (13, 7, 0), (5, 64, 0), (6, 33, 3)):
            torch.manual_seed(0)
            input = torch.randn(rows, columns + gap, device=device).to(dtype)[:, :columns]
            weight = torch.randn(columns, device=device).to(dtype)
            result = run_guarded(rms_norm, input, weight)  # an error if it touches anything but its tensors
            assert same_bits(result, rms_norm(input, weight))
            expected = torch.nn.functional.rms_norm(input, (columns,), weight, 1e-5)
            exact = torch.nn.functional.rms_norm(input.double(), (columns,), weight.double(), 1e-5)
            share = error_share(result, expected, exact)
            assert share <= 1, f"error {share:.3g} times what is allowed"
            print(f"{dtype} {rows}x{columns}, rows {columns + gap} apart: {share:.2f} of the error that is allowed")


def test_machine_code() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # compilers run in processes of their own, which import this file
    for target in ("sm80", "sm90", "gfx942"):
        request = {
            "kernel": "own_kernel:rms_norm_kernel",
            "architecture": target,
            "types": {name: "*fp16" for name in ("input_ptr", "weight_ptr", "output_ptr")}
            | {"columns": "i32", "stride": "i32", "epsilon": "fp32"},
            "constants": {"BLOCK": 4096},
            "attributes": {name: "D" for name in ("input_ptr", "weight_ptr", "output_ptr", "columns", "stride")},
            "num_warps": 4,
        }
        (machine,) = machine_code([request], jobs=1)
        assert isinstance(machine, Machine), machine
        assert machine.spilled_registers == 0 and machine.registers < 128
        print(f"{target}: {machine.registers} registers, accesses by width {machine.accesses}")


if __name__ == "__main__":
    test_values_and_memory()
    test_machine_code()
