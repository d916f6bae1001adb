"""Batch norms folded into the convolutions and linear layers before them, in evaluation."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from swap_models import image, resnet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

import fastops
from fastops import fold
from fastops.accuracy import error_share


@pytest.fixture
def folding() -> Iterator[None]:
    """Convolutions are ATen's too, and batch norms are folded into them."""
    with fastops.backend("onednn"):
        yield


folds = pytest.mark.usefixtures("folding")


class Norms(TorchDispatchMode):
    """Counts batch norms that run on their own."""

    count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        self.count += "batch_norm" in str(func)
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


class Block(nn.Module):
    """A convolution with its batch norm, with and without a ReLU, in one to three dimensions."""

    def __init__(self, dimensions: int = 2, bias: bool = True, affine: bool = True, track: bool = True) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.conv1, self.conv2 = conv(3, 5, 3, padding=1, bias=bias), conv(5, 4, 2, bias=bias)
        self.bn1, self.bn2 = (norm(c, affine=affine, track_running_stats=track) for c in (5, 4))
        self.train()
        with torch.no_grad():
            for _ in range(3):
                self(torch.randn(4, 3, *(5,) * dimensions) * 2 + 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


def folded_pair(**options: object) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    eager = Block(**options).double()  # type: ignore[arg-type]
    return eager, fastops.swap(copy.deepcopy(eager)), torch.randn(16, 3, 5, 5).double()


def count_of_norms(model: nn.Module, *inputs: Tensor) -> int:
    with Norms() as norms:
        model(*inputs)
    return norms.count


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_folded_results(dimensions: int, bias: bool, affine: bool, backend: str) -> None:
    eager, swapped, _ = folded_pair(dimensions=dimensions, bias=bias, affine=affine)
    x = torch.randn(64, 3, *(5,) * dimensions).double()
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), eager(x))
        assert torch.equal(swapped(x), eager(x)) or backend != "torch"
        assert count_of_norms(swapped, x) == (2 if backend == "torch" else 0)


def lie_otherwise(model: nn.Sequential) -> None:
    weight = model[0].weight.detach()
    model[0].weight = nn.Parameter(weight.transpose(0, 1).contiguous().transpose(0, 1))


CONVOLUTIONS: dict[str, tuple[nn.Module, Callable[[nn.Sequential], object]]] = {
    "plain": (nn.Conv2d(4, 8, 3, bias=False), lambda m: None),
    "groups": (nn.Conv2d(4, 8, 3, padding=1, groups=2), lambda m: None),
    "depthwise": (nn.Conv2d(4, 8, 3, stride=2, groups=4), lambda m: None),
    "reflected": (nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect"), lambda m: None),
    "channels_last": (nn.Conv2d(4, 8, 3), lambda m: m.to(memory_format=torch.channels_last)),
    "transposed": (nn.Conv2d(4, 8, 3), lie_otherwise),
}


@folds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_accuracy_of_folded_results(case: str, dtype: torch.dtype) -> None:
    """Also where the batch norm takes off a mean that is large beside what is left, in dtypes of few digits."""
    convolution, change = CONVOLUTIONS[case]
    model = nn.Sequential(copy.deepcopy(convolution), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].running_mean, -2, 2)
    nn.init.uniform_(model[1].running_var, 0.1, 9)
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.uniform_(model[1].bias, -1, 1)
    model.eval().to(dtype)
    change(model)
    x = torch.randn(4, 4, 16, 16).to(dtype)
    swapped = fastops.swap(copy.deepcopy(model))
    with torch.no_grad():
        exact, expected = copy.deepcopy(model).double()(x.double()), model(x)
        assert error_share(swapped(x), expected, exact) <= 1
        assert swapped(x).stride() == expected.stride()
        assert count_of_norms(swapped, x) == 0
        weights, both = fold.folded_weights(*swapped[:2], x), fuse_conv_bn_eval(*copy.deepcopy(model[:2]).double())
    assert weights is not None
    for found, wanted in zip(weights, (both.weight, both.bias), strict=True):  # rounded once
        torch.testing.assert_close(found.double(), wanted, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6)


@folds
def test_folding_leaves_the_model_as_it_was() -> None:
    eager, swapped, x = folded_pair()
    with torch.no_grad():
        swapped(x)
    assert [name for name, _ in swapped.named_parameters()] == [name for name, _ in eager.named_parameters()]
    for (name, a), b in zip(eager.state_dict().items(), swapped.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for ours, theirs in zip(swapped.modules(), eager.modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys()
    buffer = io.BytesIO()
    torch.save(swapped.state_dict(), buffer)
    assert type(pickle.loads(pickle.dumps(swapped))) is Block
    fastops.unswap(swapped)
    assert [type(m) for m in swapped.modules()] == [type(m) for m in eager.modules()]
    with torch.no_grad():
        assert torch.equal(swapped(x), eager(x))
        assert count_of_norms(swapped, x) == 2


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight in place": lambda m: m.conv1.weight.mul_(2),
    "bias in place": lambda m: m.conv2.bias.add_(1),
    "scale": lambda m: m.bn1.weight.mul_(-1),
    "shift": lambda m: m.bn2.bias.sub_(3),
    "mean": lambda m: m.bn1.running_mean.add_(1),
    "variance": lambda m: m.bn2.running_var.mul_(4),
    "through .data, as averages of weights are written": lambda m: m.conv1.weight.data.mul_(2),
    "from numpy, as another process would": lambda m: m.bn1.running_mean.numpy().__iadd__(1),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "new parameter": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight * 3)),
    "no bias": lambda m: setattr(m.conv1, "bias", None),
    "dtype": lambda m: m.float().double(),
    "state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "an epoch of training": lambda m: (m.train()(torch.ones(4, 3, 5, 5).double()), m.eval()),
}


@folds
@pytest.mark.parametrize("change", CHANGES)
def test_folded_weights_follow_every_change(change: str) -> None:
    eager, swapped, x = folded_pair()
    with torch.no_grad():
        before = swapped(x)
        for model in (eager, swapped):
            CHANGES[change](model)
        assert change == "dtype" or not torch.allclose(swapped(x), before)
        torch.testing.assert_close(swapped(x), eager(x))
        assert count_of_norms(swapped, x) == 0


@folds
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_is_followed(fused: bool) -> None:
    """Fused, it leaves version counters alone."""
    eager, swapped, x = folded_pair()
    with torch.no_grad():
        swapped(x)
    for model in (eager, swapped):
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=fused)
        model(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), eager(x))
        assert count_of_norms(swapped, x) == 0


def parametrize(*layers: nn.Module) -> None:
    for layer in layers:
        register_parametrization(layer, "weight", nn.Softplus())


NOT_FOLDED: dict[str, Callable[[nn.Module], object]] = {
    "training": lambda m: m.train(),
    "batch norms alone in training": lambda m: (m.bn1.train(), m.bn2.train()),
    "batch norms parametrized": lambda m: parametrize(m.bn1, m.bn2),
    "convolutions parametrized": lambda m: parametrize(m.conv1, m.conv2),
    "no statistics": lambda m: [norm._buffers.update(running_mean=None, running_var=None) for norm in (m.bn1, m.bn2)],
    "hooks on the convolutions": lambda m: [c.register_forward_hook(lambda *_: None) for c in (m.conv1, m.conv2)],
    "forward replaced": lambda m: [setattr(n, "forward", type(n).forward.__get__(n)) for n in (m.bn1, m.bn2)],
}


@folds
@pytest.mark.parametrize("case", NOT_FOLDED)
def test_not_folded(case: str) -> None:
    eager, swapped, x = folded_pair()
    with torch.no_grad():
        swapped(x)
        for model in (eager, swapped):
            NOT_FOLDED[case](model)
        assert torch.equal(swapped(x), eager(x))
        assert count_of_norms(swapped, x) == 2


@folds
def test_a_hook_keeps_its_own_batch_norm_from_being_folded() -> None:
    _, swapped, x = folded_pair()
    seen = []
    swapped.bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    with torch.no_grad():
        assert count_of_norms(swapped, x) == 1
    assert seen == ["bn1"]


@folds
def test_gradients_and_transforms_see_the_parameters() -> None:
    """Where derivatives of the parameters are wanted the two run on their own: eager's gradients, to the last bit."""
    eager, swapped, x = folded_pair()
    gradients = []
    for model in (eager, swapped):
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    parameters = {name: p.detach() for name, p in swapped.named_parameters()}
    buffers = dict(swapped.named_buffers())

    def loss(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().sum()

    found, expected = (torch.func.grad(lambda p, m=m: loss(m, p))(parameters) for m in (swapped, eager))
    torch.testing.assert_close(found, expected)
    _, found = torch.func.jvp(lambda p: loss(swapped, p), (parameters,), (parameters,))
    _, expected = torch.func.jvp(lambda p: loss(eager, p), (parameters,), (parameters,))
    torch.testing.assert_close(found, expected)


@folds
def test_gradient_of_the_input_goes_through_folded_weights() -> None:
    eager, swapped, x = folded_pair()
    for model in (eager, swapped):
        model.requires_grad_(False)
    found, expected = (torch.func.grad(lambda x, m=m: m(x).square().sum())(x) for m in (swapped, eager))
    torch.testing.assert_close(found, expected)
    x.requires_grad_()
    found, expected = (torch.autograd.grad(m(x).square().sum(), x) for m in (swapped, eager))
    torch.testing.assert_close(found, expected)
    with torch.enable_grad():
        assert count_of_norms(swapped, x) == 0


@folds
def test_inference_mode_and_after() -> None:
    eager, swapped, x = folded_pair()
    with torch.inference_mode():
        torch.testing.assert_close(swapped(x), eager(x))
    for model in (eager, swapped):
        model.requires_grad_(False)
    x.requires_grad_()
    found, expected = (torch.autograd.grad(m(x).sum(), x) for m in (swapped, eager))
    torch.testing.assert_close(found, expected)
    with torch.inference_mode():
        made_there = fastops.swap(Block().double())
        twin = fastops.unswap(copy.deepcopy(made_there))
        for model in (made_there, twin):
            model(x)
            model.conv1.weight.mul_(2)  # an inference tensor: nothing counts its changes
        torch.testing.assert_close(made_there(x), twin(x))


@folds
def test_folded_only_where_the_weight_is_much_smaller_than_the_output() -> None:
    torch.manual_seed(0)
    swapped = fastops.swap(nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16)).eval())
    with torch.no_grad():
        assert count_of_norms(swapped, torch.randn(3, 8, 32, 32)) == 1  # 72 weights, 16 x 16 positions
        assert count_of_norms(swapped, torch.randn(4, 8, 32, 32)) == 0


MISFITS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "number of features": (nn.Conv2d(3, 1, 3), nn.BatchNorm2d(4), (9, 3, 8, 8)),
    "dimension": (nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4), (9, 3, 8, 8)),
    "other dimension": (nn.Conv1d(3, 4, 3), nn.BatchNorm3d(4), (9, 3, 8)),
    "no batch": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (3, 32, 32)),
}


@folds
@pytest.mark.parametrize("case", MISFITS)
def test_a_batch_norm_that_does_not_fit_raises_torchs_error(case: str) -> None:
    *layers, shape = MISFITS[case]
    model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as expected:
        model(x)
    fastops.swap(model)
    with torch.no_grad(), pytest.raises(expected.type) as found:
        model(x)
    assert str(found.value) == str(expected.value)


@folds
def test_compiled_and_traced_models_fold_nothing_and_are_right() -> None:
    eager, swapped, x = folded_pair()
    with torch.no_grad():
        graphs: list[str] = []
        compiled = torch.compile(swapped, backend=lambda g, _: graphs.append(g.code) or g.forward, fullgraph=True)
        assert torch.equal(compiled(x), eager(x)) and "".join(graphs).count("batch_norm(") == 2
        traced = torch.jit.trace(swapped, x)
        assert str(traced.inlined_graph).count("aten::batch_norm") == 2 and torch.equal(traced(x), eager(x))


class Own(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        nn.init.uniform_(self.running_mean)
        nn.init.uniform_(self.running_var, 0.5, 2)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), Own(3), Own(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(F.silu(self.bn1(self.conv(x)))))


@folds
def test_a_shared_convolution_and_subclasses_of_batch_norms() -> None:
    eager = Shared().double().eval()
    swapped, x = fastops.swap(copy.deepcopy(eager)), torch.randn(8, 3, 9, 9).double()
    assert fastops.report(swapped).folded == 2
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), eager(x))
        assert count_of_norms(swapped, x) == 0


@folds
def test_layers_alone_fold_nothing() -> None:
    model = fastops.swap(Block().double(), fuse=False)
    report = fastops.report(model)
    assert report.folded == 0 and "not folded: fastops.swap would fuse it" in str(report)
    with torch.no_grad():
        assert count_of_norms(model, torch.randn(16, 3, 5, 5).double()) == 2


def test_folding_is_no_option() -> None:
    with pytest.raises(TypeError, match="fold_batchnorm"):
        fastops.swap(Block(), fold_batchnorm=True)  # type: ignore[call-arg]


def test_resnet10_with_batch_norms_folded(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "SMALLER", 0)  # the image is too small for most of them
    eager = resnet(blocks=1).eval()
    swapped = fastops.swap(copy.deepcopy(eager))
    x, _ = image(size=32)
    with torch.no_grad(), Norms() as norms:
        found = swapped(x)
    assert norms.count == (12 if backend == "torch" else 0)
    with torch.no_grad():
        expected = eager(x)
    if backend == "torch":
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
