"""`fastops.tune`: what it measures and leaves alone, and what is obeyed. Clocks are fakes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interpreter.launches import replace_launch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tuned import again, clock, mlp

import fastops
import fastops.functional as FF
from fastops import dispatch, tuning_cache
from fastops.kernels import configs
from fastops.kernels import linear as linear_kernels
from fastops.kernels.launch import Plan
from fastops.models import CIFARNet, LeNet
from fastops.ops import OPS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_a_cpu(no_interpreter: None) -> None:
    """oneDNN against ATen."""


def test_the_fastest_way_is_obeyed(tuning_folder: Path) -> None:
    """For the shapes that were met, with and without gradients as measured; here and in a later process."""
    model, x = mlp(), torch.randn(5, 8)
    tuning = fastops.tune(model, x, timer=clock(onednn=1.0, torch=2.0))
    assert [(c.op, c.gradients, c.way) for c in tuning.choices] == [
        (op, gradients, "onednn") for gradients in (True, False) for op in ("linear_relu", "linear")
    ]
    assert tuning.choices[0].seconds == {"onednn": 1.0, "torch": 2.0}
    assert tuning.choices[0].shapes == "5x8 16x8 16" and tuning.memory_format is None
    assert str(tuning.path) in str(tuning) and "linear_relu 5x8 16x8 16" in str(tuning)

    for _ in range(2):
        first, last = model[0], model[3]
        found = fastops.explain("linear_relu", x, first.weight, first.bias)
        assert (found.backend, found.reason) == ("onednn", "fastops.tune measured it the fastest here")
        assert fastops.explain("linear", x, first.weight, first.bias).backend == "torch"  # another op
        other_batch, other_dtype = torch.randn(6, 8), [tensor.double() for tensor in (x, first.weight, first.bias)]
        assert fastops.explain("linear_relu", other_batch, first.weight, first.bias).backend == "torch"
        assert fastops.explain("linear_relu", *other_dtype).backend == "torch"
        with torch.no_grad():
            assert fastops.explain("linear", torch.randn(5, 16), last.weight, last.bias).backend == "onednn"
        with fastops.backend("torch"):
            assert fastops.explain("linear_relu", x, first.weight, first.bias).reason == "backend 'torch' is selected"
        model.eval()
        assert "KernelFunction" in type(FF.linear_relu(x, first.weight, first.bias).grad_fn).__name__
        torch.testing.assert_close(model(x), F.linear(F.linear(x, first.weight, first.bias).relu(), *last.parameters()))
        again()

    directions = fastops.tune(model, x, timer=lambda call: (call(), 1.0)[1])  # nothing gained: the rule
    assert {choice.way for choice in directions.choices} == {"torch"}
    again()
    assert fastops.explain("linear_relu", x, model[0].weight, model[0].bias).backend == "torch"


@pytest.mark.parametrize(("seconds", "way"), [(0.97, "onednn"), (0.99, "torch"), (1.5, "torch")])
def test_the_rule_stays_without_a_clear_gain(tuning_folder: Path, seconds: float, way: str) -> None:
    tuning = fastops.tune(mlp(), torch.randn(5, 8), timer=clock(onednn=seconds, torch=1.0))
    assert {choice.way for choice in tuning.choices} == {way}


def test_nothing_is_kept_where_turns_disagree(tuning_folder: Path) -> None:
    """On a busy machine the least time alone may be luck: the rule stays, and the table says why."""
    turns, slow = iter(range(1000)), [0]

    def timer(call: Callable[[], object]) -> float:
        busy = slow[0] * (next(turns) % 3 == 0)
        return {"onednn": 1.0, "torch": 2.0}[dispatch.selected_backend()] + busy

    model, x = mlp(), torch.randn(5, 8)
    assert {(choice.way, choice.agreed) for choice in fastops.tune(model, x, timer=timer).choices} == {("onednn", True)}
    slow[0] = 10
    tuning = fastops.tune(model, x, timer=timer)
    assert {(choice.way, choice.agreed) for choice in tuning.choices} == {("torch", False)}
    assert str(tuning).count("the turns disagree, so the rule stays") == len(tuning.choices)
    assert fastops.explain("linear_relu", x, model[0].weight, model[0].bias).backend == "torch"


@pytest.mark.parametrize(("op", "own"), [("linear", "matmul"), ("conv2d", "conv")])
def test_the_key_has_the_precision_of_its_own_products(op: str, own: str) -> None:
    with FakeTensorMode():
        arguments = (torch.empty(2, 3, device="cuda"),)
    settings: dict[str, Any] = {"matmul": torch.backends.cuda.matmul, "conv": torch.backends.cudnn.conv}
    for name, setting in settings.items():
        before, usual = tuning_cache.key(op, arguments), setting.fp32_precision
        setting.fp32_precision = "ieee" if usual == "tf32" else "tf32"
        try:
            assert (tuning_cache.key(op, arguments) != before) == (name == own)
        finally:
            setting.fp32_precision = usual


def test_gradients_apart(tuning_folder: Path) -> None:
    """A way may win with its backward pass and lose without."""

    def timer(call: Callable[[], object]) -> float:
        return 1.0 if (dispatch.selected_backend() == "onednn") == torch.is_grad_enabled() else 2.0

    model, x = mlp(), torch.randn(5, 8)
    fastops.tune(model, x, timer=timer)
    words = (x, model[0].weight, model[0].bias)
    assert fastops.explain("linear_relu", *words).backend == "onednn"
    with torch.no_grad():
        assert fastops.explain("linear_relu", *words).backend == "torch"
    assert fastops.explain("linear_relu", *(word.detach() for word in words)).backend == "torch"


def test_backward_is_measured_where_gradients_are_recorded(tuning_folder: Path) -> None:
    made = []

    def timer(call: Callable[[], object]) -> float:
        with torch.profiler.profile() as profile:
            call()
        made.append((torch.is_grad_enabled(), any("Backward" in event.name for event in profile.events())))
        return 1.0

    fastops.tune(mlp(), torch.randn(5, 8), timer=timer)
    assert set(made) == {(True, True), (False, False)}


def test_model_and_input_are_left_alone(tuning_folder: Path) -> None:
    model = fastops.swap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten()))
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strides = [parameter.stride() for parameter in model.parameters()]
    copy, random = x.detach().clone(), torch.get_rng_state()
    tuning = fastops.tune(model, x, timer=clock())
    assert set(tuning.format_seconds) == {torch.contiguous_format, torch.channels_last}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert torch.equal(x, copy) and x.grad is None and all(p.grad is None for p in model.parameters())
    assert [parameter.stride() for parameter in model.parameters()] == strides

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) @ x

    fails = Fails()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fastops.tune(fails, torch.randn(4, 3))
    assert fails.norm.num_batches_tracked == 0


def test_memory_format_of_the_whole_model(tuning_folder: Path) -> None:
    """Both are timed, the calls of both are tuned, and `swap` takes the answer."""
    model, x = fastops.swap(CIFARNet()), torch.randn(2, 3, 32, 32)

    def timer(call: Callable[[], object]) -> float:
        if dispatch.selected_backend() != "auto":
            return 1.0
        return 2.0 if call.args[0].conv2.weight.is_contiguous() else 1.0  # type: ignore[attr-defined]

    tuning = fastops.tune(model, x, timer=timer)
    assert tuning.format_seconds == {torch.contiguous_format: 2.0, torch.channels_last: 1.0}
    assert tuning.memory_format is torch.channels_last
    assert "whole model, channels_last: 1000.00 ms" in str(tuning)
    fastops.swap(model, memory_format=tuning.memory_format)
    assert not model.conv2.weight.is_contiguous()


def test_model_that_runs_in_its_own_memory_format_alone(tuning_folder: Path) -> None:
    with pytest.warns(UserWarning, match="memory formats are not compared: view size is not compatible"):
        tuning = fastops.tune(fastops.swap(LeNet()), torch.randn(2, 1, 32, 32), timer=clock(onednn=1.0, torch=2.0))
    assert tuning.memory_format is None and len(tuning.choices) == 2 * 5


def test_report_says_which_way_ran(tuning_folder: Path) -> None:
    model, x = mlp(), torch.randn(5, 8)
    assert fastops.report(model).notes == ()
    fastops.tune(model, x, timer=clock(onednn=1.0, torch=2.0))
    notes = fastops.report(model, x).notes
    assert notes[0] == "linear_relu 5x8 16x8 16: onednn: fastops.tune measured it the fastest here"
    assert notes[1].startswith("linear 5x16 4x16 4: onednn")
    assert "measured" in str(fastops.report(model, (x,))) and "rule" not in str(fastops.report(model, x))


def test_calls_that_nobody_tuned_go_by_the_rule(tuning_folder: Path) -> None:
    """And those that no key describes: sparse, nested, other classes, meta, in transforms and under compilers."""
    model, x = mlp(), torch.randn(5, 8)
    fastops.tune(model, x, timer=clock(onednn=1.0, torch=2.0))
    w, b = model[0].weight.detach(), model[0].bias.detach()
    expected = F.linear(x, w, b)
    assert torch.equal(FF.linear(x.to_sparse(), w), F.linear(x.to_sparse(), w))
    assert FF.linear(torch.empty(5, 8, device="meta"), w.to("meta")).shape == (5, 16)
    torch.testing.assert_close(torch.vmap(FF.linear, (0, None, None))(x, w, b), expected)
    torch.testing.assert_close(torch.compile(FF.linear, backend="eager", fullgraph=True)(x, w, b), expected)
    torch.testing.assert_close(torch.func.jvp(lambda t: FF.linear(t, w, b), (x,), (x,))[0], expected)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        FF.linear(x, torch.randn(4, 7))
    assert FF.mse_loss(x, x, reduction="sum") == 0
    assert FF.cross_entropy(x, torch.zeros(5, dtype=torch.int64)) > 0
    assert FF.conv1d(x[None], torch.randn(2, 5, 3), stride=[2]).shape == (1, 2, 3)


def test_convolutions_and_heads(tuning_folder: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 3, padding="same")
            self.loss = fastops.nn.LinearCrossEntropyLoss(4, 7)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return self.loss(self.conv(x).mean(2), target)  # type: ignore[no-any-return]

    model = fastops.swap(Net())
    words = torch.randn(2, 3, 5), torch.tensor([1, 2])
    tuning = fastops.tune(model, words, timer=clock(onednn=1.0, torch=2.0))
    assert {(choice.op, choice.way) for choice in tuning.choices} == {
        ("conv1d", "onednn"),
        ("linear_cross_entropy", "onednn"),
    }
    notes = fastops.report(model, words).notes
    assert len(notes) == 2 and all("onednn: fastops.tune measured" in note for note in notes)


def test_models_that_change_what_they_are_given(tuning_folder: Path) -> None:
    """Inputs changed in place, buffers assigned anew, keyword arguments, and a backward pass that is still to come."""

    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = fastops.nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.norm(self.layer(x.mul_(2))) * scale  # type: ignore[no-any-return]

    model, x, scale = Changes(), torch.ones(3, 4), torch.ones(3, 1)
    fastops.tune(model, x, example_kwargs={"scale": scale}, timer=clock())
    notes = fastops.report(model, x, example_kwargs={"scale": scale}).notes
    assert len(notes) == 1 and notes[0].startswith("linear 3x4 4x4 4")
    assert model.calls == 0 and x.eq(1).all()
    pending = model.eval()(x.clone(), scale=scale)
    fastops.tune(model, x, example_kwargs={"scale": scale}, timer=clock())
    pending.sum().backward()
    with torch.inference_mode():
        fastops.tune(model, torch.ones(3, 4), example_kwargs={"scale": scale}, timer=clock())


def test_contexts_inside_a_model(tuning_folder: Path) -> None:
    """Autocast and no_grad around a call count when it is made again, and transforms are not looked into."""

    class Contexts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.layer(x)
            with torch.no_grad():
                x = self.layer(x.float())
            return torch.vmap(self.layer)(x)  # type: ignore[no-any-return]

    model, x = fastops.swap(Contexts()), torch.randn(3, 4)
    tuning = fastops.tune(model, x, timer=clock(onednn=1.0, torch=2.0))
    assert [(choice.gradients, choice.way) for choice in tuning.choices] == [
        (True, "torch"),  # in bfloat16, which oneDNN's products do not take
        (False, "torch"),
        (False, "onednn"),
    ]
    notes = fastops.report(model, x).notes
    assert "measured" not in notes[0] and "measured" in notes[1] and len(notes) == 2


def test_memory_budget_comes_first(tuning_folder: Path) -> None:
    """However fast all logits at once are, they are not what was asked for."""
    options = fastops.nn.LinearCrossEntropyOptions(memory_budget=100)
    model = fastops.nn.LinearCrossEntropyLoss(4, 50, options=options)
    words = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
    assert fastops.tune(model, words, timer=clock(onednn=2.0, torch=1.0)).choices == ()
    assert "budget" in fastops.report(model, words).notes[0]


def test_way_without_memory_is_no_contestant(tuning_folder: Path) -> None:
    def timer(call: Callable[[], object]) -> float:
        if dispatch.selected_backend() == "torch":
            raise torch.OutOfMemoryError
        return 1.0

    tuning = fastops.tune(mlp(), torch.randn(5, 8), timer=timer)
    assert all(choice.seconds.keys() == {"onednn"} and choice.way == "onednn" for choice in tuning.choices)


def test_interrupted(tuning_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_INTERPRETER", True)
    monkeypatch.setattr(configs, "measured", {})

    def timer(call: Callable[[], object]) -> float:
        if configs.measured:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        fastops.tune(mlp(), torch.randn(5, 8), timer=timer)
    assert configs.measured == {} and configs.met is None and not dispatch.tuned and not tuning_folder.exists()
    assert dispatch.selected_backend() == "auto"


def test_another_number_of_threads(tuning_folder: Path) -> None:
    model, x = mlp(), torch.randn(5, 8)
    words = (x, model[0].weight, model[0].bias)
    fastops.tune(model, x, timer=clock(onednn=1.0, torch=2.0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert fastops.explain("linear_relu", *words).backend == "torch"
    finally:
        torch.set_num_threads(threads)
    assert fastops.explain("linear_relu", *words).backend == "onednn"


def test_model_that_cannot_be_copied(tuning_folder: Path) -> None:
    """Its calls are tuned; only the memory formats are not compared."""
    model = fastops.swap(nn.Conv2d(3, 4, 3))
    model.cached = model.weight * 2
    with pytest.warns(UserWarning, match="memory formats are not compared"):
        tuning = fastops.tune(model, torch.randn(1, 3, 5, 5), timer=clock())
    assert len(tuning.choices) == 2 and tuning.memory_format is None


def test_frozen_model(tuning_folder: Path) -> None:
    model = fastops.swap(nn.Conv2d(3, 4, (3, 3), stride=(np.int64(1), np.int64(1)))).requires_grad_(False)
    assert len(fastops.tune(model, torch.randn(1, 3, 5, 5), timer=clock()).choices) == 2  # one for each format
    assert len(fastops.tune(model, torch.randn(1, 3, 5, 5, requires_grad=True), timer=clock()).choices) == 4
    with pytest.raises(TypeError, match="conv2d"):
        FF.conv2d(torch.randn(1, 3, 5, 5), model.weight, stride={1: 2})  # type: ignore[arg-type]


def test_nothing_to_tune(tuning_folder: Path) -> None:
    tuning = fastops.tune(nn.Linear(8, 4), torch.randn(5, 8))
    assert tuning.choices == () and tuning.path is None and not tuning_folder.exists() and not dispatch.tuned


def test_wrong_arguments(tuning_folder: Path) -> None:
    with pytest.raises(TypeError, match=r"tune expects a torch\.nn\.Module, not function"):
        fastops.tune(F.relu, torch.randn(1))  # type: ignore[arg-type]
    with fastops.backend("onednn"), pytest.raises(RuntimeError, match="backend 'onednn' is selected"):
        fastops.tune(mlp(), torch.randn(5, 8))


def test_kernel_that_fails_is_no_contestant(tuning_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton would run: its kernels against the torch expression, without one that does not compile."""
    monkeypatch.setattr(dispatch, "_INTERPRETER", True)
    model, x = mlp(), torch.randn(5, 8)
    seconds = clock(triton=1.0, onednn=3.0, torch=2.0)
    assert {choice.way for choice in fastops.tune(model, x, timer=seconds).choices} == {"triton"}

    def fail(*words: object) -> None:
        raise RuntimeError("no code for this GPU")

    for op in ("linear", "linear_relu"):
        monkeypatch.setitem(vars(OPS[op]), "launchers", (fail, fail))
    with pytest.warns(fastops.FallbackWarning, match="no code for this GPU"):
        tuning = fastops.tune(model, x, timer=seconds)
    assert {choice.way for choice in tuning.choices} == {"torch"}


def test_a_tile_that_fails_spoils_no_other(tuning_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_INTERPRETER", True)
    monkeypatch.setattr(configs, "measured", {})
    large, small = configs.matmul_candidates("interpreter", torch.float32, "ieee")
    layer, x, launched, original = fastops.swap(nn.Linear(8, 4)), torch.randn(6, 8), [], linear_kernels.launch

    def launch(plan: Plan, *tensors: Tensor) -> None:
        launched.append(True)
        if plan.constants.get("BLOCK_M") == large.BLOCK_M:
            raise RuntimeError("out of resource: shared memory")
        original(plan, *tensors)

    def timer(call: Callable[[], object]) -> float:
        launched.clear()
        call()
        assert launched or dispatch.selected_backend() != "triton", "the torch expression was timed for a tile"
        return 1.0 + (dispatch.selected_backend() != "triton")

    assert large.BLOCK_M != small.BLOCK_M
    replace_launch(monkeypatch, launch)
    with torch.no_grad():
        tuning = fastops.tune(layer, x, timer=timer)
    assert {choice.way for choice in tuning.choices if not choice.gradients} == {"triton"}
    assert large not in configs.measured.values()


def test_tiles_of_kernels(tuning_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton runs, each matrix product of each call is timed with every tile of its table."""
    monkeypatch.setattr(dispatch, "_INTERPRETER", True)
    monkeypatch.setattr(configs, "measured", {})
    large, small = configs.matmul_candidates("interpreter", torch.float32, "ieee")
    layer, x = fastops.swap(nn.Linear(8, 4)), torch.randn(6, 8)
    forward = (CPU, torch.float32, "ieee", 6, 4)  # of 6x8 and 8x4; the gradient of the weight is 4x8
    taken = []

    def timer(call: Callable[[], object]) -> float:
        taken.clear()
        call()
        return 5.0 if small in taken else 1.0 + (dispatch.selected_backend() != "triton")

    original = linear_kernels.launch

    def launch(plan: Plan, *tensors: Tensor) -> None:
        if "BLOCK_K" in plan.constants:
            taken.append(configs.MatmulConfig(*(plan.constants[name] for name in configs.MatmulConfig._fields)))
        original(plan, *tensors)

    replace_launch(monkeypatch, launch)
    words = (*forward[:3], 6, 4)
    assert configs.matmul_config(*words, 16) == small
    with torch.no_grad():
        tuning = fastops.tune(layer, x, timer=timer)
    assert {choice.way for choice in tuning.choices if not choice.gradients} == {"triton"}
    assert configs.measured[forward] == configs.matmul_config(*words, 16) == large
    assert configs.matmul_config(*words, 2) == small  # operands that are not aligned have their own tile
    assert configs.met is None

    configs.measured.clear()
    again()
    taken.clear()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert configs.measured[forward] == large and taken == [large]

    fastops.tune(layer, x, timer=lambda call: (call(), 1.0)[1])
    again()
    assert fastops.explain("linear", x, layer.weight).backend == "triton"
    assert forward not in configs.measured  # nothing gained: the table


def test_the_clock(tuning_folder: Path) -> None:
    """The default timer, once: it makes the call and says seconds."""
    tuning = fastops.tune(mlp(), torch.randn(5, 8))
    assert all(0 < seconds < 10 for choice in tuning.choices for seconds in choice.seconds.values())
