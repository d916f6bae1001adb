"""The launcher past Triton's own, over a driver that does nothing: what it takes again, what never, and its cost."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import Case, one_case_per_op
from torch import Tensor

import fastops
from fastops.kernels import configs
from fastops.kernels import launch as launcher

BENCH = Path(__file__).resolve().parent.parent / "bench"
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]

over_a_stub = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="the stub of a driver needs a C compiler")

REPEATED = """
import stub

driver = stub.activate()

import torch, triton, triton.language as tl
from triton import knobs
from fastops.kernels.launch import Plan, launch


@triton.jit
def kernel(pointer, other, number, factor, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(other + lanes, tl.load(pointer + lanes) * number * factor)


jit_launches = []
original = triton.JITFunction.run


def counted(*words, **options):
    jit_launches.append(1)
    return original(*words, **options)


triton.JITFunction.run = counted


plans = {}


def run(pointer, other, number=32, factor=2.0, flag=True, block=128, **options):
    "Through Triton? And the function that the driver got."
    jit, count = len(jit_launches), driver.stub_launches()
    words = repr((number, factor, flag, block, options))
    if words not in plans:
        plans[words] = Plan(kernel, (4,), number, factor, FLAG=flag, BLOCK=block, **options)
    launch(plans[words], pointer, other)
    assert driver.stub_launches() == count + 1
    return len(jit_launches) > jit, driver.stub_last_function()


memory = torch.empty(4096, dtype=torch.uint8)
start = -memory.data_ptr() % 16
aligned = memory[start : start + 2048].view(torch.float32)
unaligned = memory[start + 4 : start + 4 + 1024].view(torch.float32)
assert aligned.data_ptr() % 16 == 0 != unaligned.data_ptr() % 16

first = run(aligned, aligned)
assert first[0]
assert run(aligned, aligned) == run(aligned[4:], aligned[8:]) == (False, first[1])  # other addresses, aligned alike

others = [first[1]]
for words in (
    dict(pointer=unaligned),
    dict(other=unaligned),
    dict(pointer=unaligned, other=unaligned),
    dict(pointer=aligned.double()),
    dict(number=1),
    dict(number=3),
    dict(number=2**40),
    dict(factor=1),
    dict(block=64),
    dict(flag=False),
    dict(num_warps=8),
):
    words = dict(pointer=aligned, other=aligned) | words
    through_triton, function = run(**words)
    assert through_triton, words  # never what was compiled for something else
    others.append(function)
    assert run(**words) == (False, function), words
assert len(set(others)) == len(others)
assert run(aligned, aligned, number=48) == (True, first[1])  # Triton says whether another number needs another kernel
assert run(aligned, aligned, factor=1.0)[0]  # 1.0 is no 1

knobs.runtime.debug = True
through_triton, checked = run(aligned, aligned, number=80)
assert through_triton and checked != first[1]  # with assertions
knobs.runtime.debug = False
assert run(aligned, aligned, number=80) == (True, first[1])

entered = []
knobs.runtime.launch_enter_hook.add(lambda metadata: entered.append(metadata.get()["name"]))
assert run(aligned, aligned) == (True, first[1])  # a profiler sees every launch
assert entered == ["kernel"]
"""


def run(*words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, *words], cwd=BENCH, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@over_a_stub
def test_same_arguments_alone_take_a_compiled_kernel_again(tmp_path: Path) -> None:
    """Not one with another alignment, dtype, number or constant; and a profiler's hooks are called as ever."""
    script = tmp_path / "repeated.py"  # Triton reads a kernel's source from its file
    script.write_text(f"import sys\nsys.path.insert(0, {str(BENCH)!r})\n" + REPEATED)
    run(str(script))


@over_a_stub
def test_launch_again_costs_a_fraction_of_tritons() -> None:
    """Measured in turns: a ratio that load does not change."""
    _, *rows = (line.split() for line in run("launch_time.py", "--pairs", "40").splitlines())
    assert [row[0] for row in rows] == ["add_relu_kernel", "matmul_kernel"]
    for name, triton, ours, _, ratio in rows:
        assert 0 < float(ours) < float(triton) and float(ratio) < 0.33, name


def test_offsets_of_amd_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has 32-bit offsets there into a storage of less than 2 GiB, whatever the shapes are."""
    compilations = []

    class Kernel:
        device_caches, pre_run_hooks, arg_names, fn = {}, [], ["pointer"], object()  # type: ignore[var-annotated]

        def __getitem__(self, grid: object) -> Callable[..., SimpleNamespace]:
            def compile(*_: Tensor) -> SimpleNamespace:
                compilations.append(grid)
                return SimpleNamespace(run=lambda *_: None, function=None, packed_metadata=None)

            return compile

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None, debug=False)
    large = torch.empty(2**31, dtype=torch.uint8)  # never touched
    small = torch.empty(2**10, dtype=torch.uint8)
    for amd, expected in ((True, 2), (False, 1)):
        found = active, runtime, True, amd
        monkeypatch.setattr(launcher, "_triton", lambda found=found: found)
        compilations.clear()
        plan = launcher.Plan(Kernel(), (1,))
        for tensor in (small, large, small, large):
            launcher.launch(plan, tensor)
        assert len(compilations) == expected


@one_case_per_op
def test_plans_are_made_once(case: Case) -> None:
    """For each shape, and anew when tiles change."""

    def run() -> dict[object, object]:
        tensors = case.tensors(torch.float32)
        with fastops.backend("triton"):
            torch.autograd.grad(case.ours(*tensors).sum(), tensors)
        return dict(configs.plans)

    made = run()
    assert made and run() == made  # plans are equal if they are the same object
    configs.use({})
    assert not configs.plans
    again = run()
    assert again.keys() == made.keys() and again != made


def test_number_of_plans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With shapes that never come again."""
    monkeypatch.setattr(configs, "_PLANS_AT_MOST", 4)
    asked: list[tuple[int, bool]] = []

    @configs.planned
    def plan(size: int, even: bool = False) -> None:
        asked.append((size, even))

    for size in range(7):
        for _ in range(2):
            plan(size)
            plan(size, even=True)
            assert len(configs.plans) <= 4
    assert asked == [(size, even) for size in range(7) for even in (False, True)]  # None is kept too
