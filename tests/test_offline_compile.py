"""Every kernel, compiled for GPUs that need not be here, keeps the rules of `fastops audit`."""

import pytest
import torch

from fastops.audit.launches import AUDITED, launches, recorded
from fastops.audit.machine_code import Machine, machine_code
from fastops.audit.rules import broken_rules
from fastops.kernels import configs, linear
from fastops.kernels.activation import NONE, RELU

TARGETS = ("sm80", "sm90", "sm100", "gfx942")
HEAD = ("linear_cross_entropy",)
PRODUCTS = ("linear", "conv2d")
LOSSES = tuple(op for op in AUDITED if op not in (*PRODUCTS, *HEAD))
# By name: ops, and whether of their kernels those with a matrix product are meant, the others, or both.
GROUPS = {
    "linear": (("linear",), (True, False)),
    "conv": (("conv2d",), (True,)),
    "around conv": (("conv2d",), (False,)),
    "losses": (LOSSES, (True, False)),
    "head": (HEAD, (True, False)),
}
# Around convolutions and in losses sm80 and sm100 hardly differ from sm90, but for sm100's limit of registers. In
# linear layers sm100 differs in the matrix instruction, which convolutions and heads have too.
LATER = {("sm100", "linear"), *((target, name) for target in ("sm80", "sm100") for name in ("around conv", "losses"))}
EVERY = [
    pytest.param(target, *group, id=f"{target}-{name}", marks=pytest.mark.nightly if (target, name) in LATER else ())
    for target in TARGETS
    for name, group in GROUPS.items()
]


@pytest.mark.parametrize(("target", "ops", "products"), EVERY)
def test_machine_code(target: str, ops: tuple[str, ...], products: tuple[bool, ...]) -> None:
    problems = []
    known = (launch for launch in launches(target, ops) if launch.product in products)
    found = [launch for launch in known if launch.dtype != "fp16"]  # bf16 says the same
    assert found
    for launch, machine in zip(found, machine_code([launch.request for launch in found], jobs=1), strict=True):
        broken = broken_rules(launch, machine) if isinstance(machine, Machine) else machine
        if broken:
            problems.append(f"{launch.kernel} {launch.dtype} {launch.config} {launch.shape}: {broken}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("target", "op", "words", "least"),
    [
        ("sm90", "linear", ("matmul_kernel", "tf32", "128x128x32", "512x784x512"), 0.98),
        ("sm90", "linear", ("matmul_kernel", "bf16", "64x128x64", "512x784x512"), 1.0),
        ("sm90", "linear", ("matmul_kernel", "bf16", "64x64x128", "512x784x512"), 1.0),
        ("sm80", "linear", ("matmul_kernel", "bf16", "64x64x64", "512x784x512"), 0.94),
        ("sm90", "linear_cross_entropy", ("_kernel", "bf16", "64x64x64", "512x768x1024"), 0.9),
        ("sm90", "conv2d", ("conv_grad_weight_kernel", "bf16", "64x64x64", "8x64x100"), 0.38),
    ],
)
def test_small_tiles_leave_the_matrix_units_busy(target: str, op: str, words: tuple[str, ...], least: float) -> None:
    """Where few elements are multiplied for each address, mask and division, forward and backward."""
    found = []
    for launch in launches(target, [op]):
        text = f"{launch.kernel} {launch.dtype} {launch.config} {launch.shape}"
        found += [launch] if all(word in text for word in words) else []
    assert found
    for machine in machine_code([launch.request for launch in found], jobs=1):
        assert isinstance(machine, Machine)
        assert machine.issue_bound is not None
        assert machine.issue_bound >= least


def test_every_kernel_compiles() -> None:
    """With whatever Triton is here, one specialization of each: code that one version takes another may not."""
    half = [launch for launch in launches("sm90", AUDITED) if launch.dtype == "bf16"]
    each = {launch.kernel: launch for launch in half}
    found = zip(each, machine_code([launch.request for launch in each.values()], jobs=1), strict=True)
    assert {kernel: machine for kernel, machine in found if not isinstance(machine, Machine)} == {}
    assert len(each) > 20


def test_the_rules_see_what_they_look_for() -> None:
    """Each kind of code that a rule reads is there where it must be: an instruction name that changes is no pass."""
    found = {target: launches(target, ["linear"]) for target in TARGETS}
    wanted = [found[target][0] for target in TARGETS]
    specialized = next(launch for launch in found["sm100"] if launch.request["constants"].get("WARP_SPECIALIZE"))
    *machines, machine = machine_code([launch.request for launch in (*wanted, specialized)], jobs=1)
    assert isinstance(machine, Machine)
    assert machine.occupancy == (8 + 4) / 64, "beside the warps that store, four that load and multiply"
    for launch, machine in zip(wanted, machines, strict=True):
        assert isinstance(machine, Machine)
        assert launch.wide and launch.product and launch.leading
        assert machine.registers > 32 and machine.shared_memory > 0
        assert (machine.tensor_memory > 0) == (launch.target == "sm100")
        assert machine.loop["matrix"] > 0 and machine.loop["other"] > 0
        assert (machine.issue_bound is None) == launch.target.startswith("gfx")
        assert machine.accesses.keys() & {"128", "256"}


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_accesses_are_as_wide_as_rows_allow(target: str) -> None:
    """128 bits where rows begin at 16 bytes, 64 and 32 where they are multiples of 4 and 2; 128 of the result."""
    widths = {1000: 128, 1004: 64, 1002: 32}
    requests = []
    for size in widths:
        x, w = (torch.empty(512, size, dtype=torch.float16, device="meta") for _ in range(2))
        requests += recorded(target, None, "ieee", linear.linear, x, w, None, RELU)[1]
    for width, machine in zip(widths.values(), machine_code(requests, jobs=1), strict=True):
        assert isinstance(machine, Machine)
        assert machine.spilled_registers == 0
        assert {*machine.accesses} == {"128", str(width)}


def test_defects_would_show() -> None:
    """The check reads something: a tile with too many accumulators spills, and float32 takes no matrix unit."""
    x = torch.empty(512, 512, device="meta")
    tile = configs.MatmulConfig(128, 64, 16, 1, 2)
    _, requests = recorded("sm80", tile, "ieee", linear.linear, x, x, None, NONE)
    (machine,) = machine_code(requests, jobs=1)
    assert isinstance(machine, Machine)
    assert machine.spilled_registers > 0
    assert machine.matrix_instructions == {}


def test_a_narrow_stream_would_show() -> None:
    """One tensor of a loss that does not start at 16 bytes breaks the rule, with aligned sizes and with odd ones."""
    found = [launch for launch in launches("sm90", ["mse_loss", "cross_entropy"]) if launch.stream]
    chosen = {(launch.kernel, launch.width): launch for launch in found}.values()
    assert len(chosen) == 8
    requests = [launch.request | {"attributes": launch.request["attributes"] | {"input_ptr": ""}} for launch in chosen]
    for launch, machine in zip(chosen, machine_code(requests, jobs=1), strict=True):
        assert isinstance(machine, Machine)
        assert broken_rules(launch, machine).keys() == {"stream-width"}
