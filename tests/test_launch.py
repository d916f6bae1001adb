"""The launcher past Triton's own, over a driver that does nothing: what it takes again, what never, and its cost."""

import operator
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, one_case_per_op
from forked import run_python
from interpreter.launches import replace_launch
from torch import Tensor

import fastops
import fastops.functional as FF
from fastops.kernels import (
    configs,
    matmul,
    private,
)
from fastops.kernels import launch as launcher

BENCH = Path(__file__).resolve().parent.parent / "bench"
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]

over_a_stub = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="the stub of a driver needs a C compiler")

REPEATED = """
import stub

driver = stub.activate()

import ctypes, struct
import torch, triton, triton.language as tl
from triton import knobs
from fastops.kernels.configs import planned
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


@planned
def plan(number, factor, flag, block, **options):
    return Plan(kernel, (4,), number, factor, FLAG=flag, BLOCK=block, **options)


def run(pointer, other, number=32, factor=2.0, flag=True, block=128, **options):
    "Through Triton? And the function that the driver got, with its grid and the rest, and its arguments."
    global handed
    jit, count = len(jit_launches), driver.stub_launches()
    sizes = [8, 8, *[8 if number >= 2**31 else 4] * (number != 1), *[4] * (factor != 1), 8, 8]  # scratch memory last
    driver.stub_expect((ctypes.c_int * len(sizes))(*sizes), len(sizes))
    launch(plan(number, factor, flag, block, **options), pointer, other)
    assert driver.stub_launches() == count + 1
    handed = ctypes.string_at(driver.stub_handed(), 36 + sum(sizes))
    return len(jit_launches) > jit, driver.stub_last_function()


memory = torch.empty(4096, dtype=torch.uint8)
start = -memory.data_ptr() % 16
aligned = memory[start : start + 2048].view(torch.float32)
unaligned = memory[start + 4 : start + 4 + 1024].view(torch.float32)
assert aligned.data_ptr() % 16 == 0 != unaligned.data_ptr() % 16

first = run(aligned, aligned)
assert first[0]
given = struct.pack("<QQifQQ", aligned.data_ptr(), aligned.data_ptr(), 32, 2.0, 0, 0)
assert handed[:24] == struct.pack("<6I", 4, 1, 1, 128, 1, 1) and handed[36:] == given
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
    by_triton = handed
    assert run(**words) == (False, function) and handed == by_triton, words
assert len(set(others)) == len(others)
assert run(aligned, aligned, number=48) == (True, first[1])  # Triton says whether another number needs another kernel

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


WARMUP = """
import stub

driver = stub.activate()

import warnings
import torch
from torch import nn
from triton import knobs

import fastops
from fastops import dispatch
from fastops.kernels import configs, matmul

dispatch._INTERPRETER = True  # tensors of the CPU go to kernels
configs.architecture = lambda _: "sm90"
configs._HALF_PRECISION["sm90"] = (configs.MatmulConfig(16, 16, 16, 1, 1),)  # small ones compile soon
configs._PERSISTENT.clear()  # they take memory on a GPU
compiled = []
knobs.runtime.jit_post_compile_hook = lambda **words: compiled.append(words["repr"])

model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).half()
x = torch.randn(24, 64, dtype=torch.float16)
assert fastops.warmup(model, x) == 0  # not swapped
fastops.swap(model)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
count = fastops.warmup(model, x)
assert count == len(compiled) > 4 and driver.stub_launches() == 0, (count, compiled, driver.stub_launches())
assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
assert all(parameter.grad is None for parameter in model.parameters()) and knobs.runtime.jit_cache_hook is None

with fastops.backend("torch"), torch.no_grad():
    assert model(x).isfinite().all()
model(x).square().sum().backward()  # a step and an evaluation launch, and compile nothing more
with torch.no_grad():
    model(x)
assert driver.stub_launches() > 4 and len(compiled) == count, compiled[count:]
assert fastops.warmup(model, x) == 0


def fails(*_, **__):
    raise RuntimeError("no code for this GPU")


matmul.matmul_kernel.compile = fails
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.float(), compiled.clear()
    assert 0 < fastops.warmup(model, x.float()) == len(compiled)
(warning,) = caught
assert warning.category is fastops.FallbackWarning and "do not compile; torch will run instead: no code" in str(warning)
"""


def run(*words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run_python(words, cwd=BENCH, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@over_a_stub
def test_same_arguments_alone_take_a_compiled_kernel_again(tmp_path: Path) -> None:
    """Not one with another alignment, dtype, number or constant; and a profiler's hooks are called as ever."""
    script = tmp_path / "repeated.py"  # Triton reads a kernel's source from its file
    script.write_text(f"import sys\nsys.path.insert(0, {str(BENCH)!r})\n" + REPEATED)
    run(str(script))


@over_a_stub
def test_warmup_compiles_what_training_and_evaluation_launch(tmp_path: Path) -> None:
    """And nothing else; it launches nothing, and says what does not compile."""
    script = tmp_path / "warmup.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(BENCH)!r})\n" + WARMUP)
    run(str(script))


def test_warmup_takes_modules() -> None:
    with pytest.raises(TypeError, match=r"warmup expects a torch\.nn\.Module, not function"):
        fastops.warmup(lambda x: x, torch.randn(2))  # type: ignore[arg-type]


@over_a_stub
def test_launch_again_costs_a_fraction_of_tritons() -> None:
    """Measured in turns: a ratio that load does not change."""
    _, *rows = (line.split() for line in run("launch_time.py", "--pairs", "40").splitlines())
    assert [row[0] for row in rows] == ["add_relu_kernel", "matmul_kernel"]
    for name, triton, ours, ratio, whole in rows:
        assert 0 < float(ours) < float(triton) and float(ratio) < 0.33 and float(ours) < float(whole), name


def test_only_known_launchers_are_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any other version of Triton, and on any other GPU, Triton launches by itself each time."""
    launches: list[object] = []

    class Kernel:
        device_caches, pre_run_hooks, arg_names, fn = {}, [], ["pointer"], object()  # type: ignore[var-annotated]

        def __getitem__(self, grid: object) -> Callable[..., SimpleNamespace]:
            def compile(*_: Tensor) -> SimpleNamespace:
                launches.append(grid)
                return SimpleNamespace(run=lambda *_: None, function=None, packed_metadata=None)

            return compile

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None, debug=False)
    for version, backend, expected in (("3.8.1", "cuda", 1), ("3.9.0", "cuda", 3), ("3.8.1", "hip", 3)):
        monkeypatch.setattr("triton.__version__", version)
        found = SimpleNamespace(active=active), runtime, private.launchers_are_known(backend)
        monkeypatch.setattr(launcher, "_triton", lambda found=found: found)
        launches.clear()
        plan = launcher.Plan(Kernel(), (1,))
        for _ in range(3):
            launcher.launch(plan, torch.empty(4))
        assert len(launches) == expected, (version, backend)


# Plans ----------------------------------------------------------------------------------------------------------------


@one_case_per_op
def test_plans_are_made_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each shape, and anew when tiles change."""
    launched: list[launcher.Plan] = []
    original = launcher.launch

    def launch(plan: launcher.Plan, *tensors: Tensor) -> None:
        launched.append(plan)
        original(plan, *tensors)

    replace_launch(monkeypatch, launch)

    def run() -> list[launcher.Plan]:
        launched.clear()
        tensors = case.tensors(torch.float32)
        with fastops.backend("triton"):
            torch.autograd.grad(case.ours(*tensors).sum(), tensors)
        return launched.copy()

    plans = run()
    again = run()
    assert plans and all(map(operator.is_, plans, again)) and len(plans) == len(again)
    configs.set_tiles({})
    assert not {*map(id, plans)} & {*map(id, run())}


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


def test_plan_of_tiles_that_changed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread: it serves the call that asked for it, and no later one."""
    product = (torch.device("cpu"), torch.float32, "ieee", 8, 8)
    small, large = (configs.MatmulConfig(size, size, 16, 1, 1) for size in (16, 32))
    monkeypatch.setattr(configs, "measured", {product: small})

    @configs.planned
    def plan() -> configs.Tile:
        tile = configs.matmul_config(*product, 16)
        if tile == small:
            configs.set_tiles({product: large})
        return tile

    assert [plan(), plan()] == [small, large]


def test_products_are_met_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is planned already, also by another thread just now: `fastops.tune` looks for all of them."""
    a = torch.randn(8, 8)
    matmul.matmul(a, a)
    monkeypatch.setattr(configs, "met", set())
    matmul.matmul(a, a)
    assert configs.met == {(a.device, a.dtype, "ieee", 8, 8)}


def test_products_are_met_while_tuning_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread, between any two lines of this one."""
    monkeypatch.setattr(configs, "met", met := set[configs.Product]())

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "line" and frame.f_lineno > frame.f_code.co_firstlineno + 1:  # its first line is done
            configs.met = None
        return trace

    before = sys.gettrace()
    sys.settrace(lambda frame, *rest: trace(frame, *rest) if frame.f_code is configs._measured.__code__ else None)
    try:
        matmul.matmul(torch.randn(8, 8), torch.randn(8, 8))
    finally:
        sys.settrace(before)
    assert configs.met is None and len(met) == 1


def test_label_smoothing_of_numpy() -> None:
    """It equals a float, and is none to Triton's compiler: no plan may have it."""
    x, target, smoothing = torch.randn(4, 8), torch.tensor([1, 2, 3, 0]), np.float64(0.1)
    with fastops.backend("triton"):
        loss = FF.cross_entropy(x.requires_grad_(), target, label_smoothing=smoothing)
        loss += FF.linear_cross_entropy(x, torch.randn(8, 8), target, label_smoothing=smoothing)
        loss.backward()
    plans = [plan for kept in configs.plans.values() for plan in (kept if isinstance(kept, tuple) else (kept,))]
    found = [plan.constants.get("LABEL_SMOOTHING") for plan in plans if isinstance(plan, launcher.Plan)]
    assert [type(value) for value in found if value is not None] == [float] * 4
