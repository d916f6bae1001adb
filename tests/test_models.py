"""Each reference model, plain and swapped, against its numpy oracle: the loss of every step of training."""

import copy
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastops
from fastops.models import FASHION_CLASSES, CIFARNet, FashionMLP, LeNet, LinearRegression, Logistic, TwoLayerNet
from fastops.models.lenet import random_image
from fastops.models.linear_regression import points
from fastops.models.two_layer_net import random_batch

BACKENDS = ["torch", "onednn", "triton"]
UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2

Batches = list[tuple[Tensor, Tensor]]


def train(
    model: nn.Module, loss_function: nn.Module, batches: Batches, lr: float, momentum: float = 0.0
) -> list[float]:
    """The tutorial's loop; returns the loss of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    losses = []
    for inputs, targets in batches:
        loss = loss_function(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_swapped(backend: str, model: nn.Module, loss_function: nn.Module, batches: Batches, lr: float) -> list[float]:
    with fastops.backend(backend):
        return train(fastops.swap(copy.deepcopy(model)), fastops.swap(loss_function), batches, lr)


def worst_so_far(losses: list[float], oracle: np.ndarray) -> np.ndarray:
    """The largest relative error up to each step: errors of the weights stay in all later steps."""
    return np.maximum.accumulate(np.abs(np.array(losses) - oracle) / oracle)


def eager_error(
    model: nn.Module,
    pairs: Iterable[tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]],
    loss_function: nn.Module,
    batches: Batches,
    lr: float,
    oracle: np.ndarray,
    momentum: float = 0.0,
) -> np.ndarray:
    """The yardstick: eager's worst error up to each step, with rows and hidden units in eight different orders.

    The order changes nothing but the rounding of the sums. One order alone is now and then exact to the last bit by
    luck. ``pairs``: the layers that have hidden units between them.
    """
    model = copy.deepcopy(model)
    errors = []
    for _ in range(8):
        order = torch.randperm(len(batches[0][0]))
        reordered = [(inputs[order], targets[order]) for inputs, targets in batches]
        errors.append(worst_so_far(train(copy.deepcopy(model), loss_function, reordered, lr, momentum), oracle))
        with torch.no_grad():
            for before, after in pairs:
                order = torch.randperm(len(before.weight))
                before.weight.copy_(before.weight[order])
                if before.bias is not None:
                    before.bias.copy_(before.bias[order])
                by_unit = after.weight.view(len(after.weight), len(order), -1)  # of a convolution: positions too
                by_unit.copy_(by_unit[:, order])
    worst: np.ndarray = np.max(errors, axis=0)
    assert worst[len(worst) // 5] < 1e-4, "eager itself does not follow the oracle"
    return worst


def product_error(backend: str, terms: int) -> float:
    """The error of torch's own product behind a backend, over that of its default one; 1 unless it is less exact.

    oneDNN may add up the terms one after another where MKL keeps several partial sums.
    """
    if backend != "onednn":
        return 1.0
    x, weight = torch.randn(64, terms), torch.randn(100, terms)
    exact = F.linear(x.double(), weight.double())
    onednn = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return max(1.0, float((onednn - exact).norm() / (F.linear(x, weight) - exact).norm()))


def assert_as_accurate(
    losses: list[float],
    yardstick: np.ndarray,
    oracle: np.ndarray,
    terms: int,
    backend: str = "torch",
    target: Tensor | None = None,
) -> None:
    """At every step at most twice the error of eager, plus the rounding of one inner product.

    An inner product of n terms has a relative error of about sqrt(n) unit roundoffs, whatever the order of its sum
    (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019). ``terms``: the longest one of
    the forward pass. A mean squared error that comes close to 0 also has the rounding of the output, as large as the
    ``target``: u |y| in the output is 2 u |y| / sqrt(loss) in the loss.
    """
    steps = len(losses)
    errors = worst_so_far(losses, oracle[:steps])
    allowed = 2 * product_error(backend, terms) * yardstick[:steps] + terms**0.5 * UNIT_ROUNDOFF
    if target is not None:
        allowed += 2 * UNIT_ROUNDOFF * target.square().mean().sqrt().item() / np.sqrt(oracle[:steps])
    wrong = errors > allowed
    assert not wrong.any(), f"step {wrong.argmax()}: error {errors[wrong][0]:.2e}, allowed {allowed[wrong][0]:.2e}"


# LinearRegression


@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_linear_regression_takes_the_steps_of_the_oracle(backend: str) -> None:
    model, loss_function = LinearRegression(), nn.MSELoss()
    if backend != "eager":
        fastops.swap(model), fastops.swap(loss_function)
    weight = model.linear.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = points()
    steps = list(oracles.linear_regression(1.0, x.numpy(), y.numpy(), lr=0.01, epochs=10))
    assert len(steps) == 30
    with fastops.backend("torch" if backend == "eager" else backend):
        for index, expected in enumerate(steps):
            sample, target = x[index % 3], y[index % 3]
            loss = loss_function(model(sample), target)
            optimizer.zero_grad()
            loss.backward()
            gradient = weight.grad.item()
            optimizer.step()
            torch.testing.assert_close(
                torch.tensor([loss.item(), gradient, weight.item()]), torch.tensor(expected, dtype=torch.float32)
            )
    assert f"{4 * weight.item():.2f}" == "7.80"  # what the tutorial prints for x = 4 after training


# TwoLayerNet

LR = 1e-6


def two_layer_net() -> tuple[TwoLayerNet, Tensor, Tensor]:
    torch.manual_seed(0)
    return TwoLayerNet(), *random_batch(64, torch.Generator().manual_seed(0))


def double(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


@pytest.fixture(scope="module")
def two_layer_oracle() -> tuple[np.ndarray, np.ndarray]:
    """The losses of 500 steps in float64, and how far eager strays from them."""
    model, x, y = two_layer_net()
    arrays = double(model.linear1.weight, model.linear2.weight, x, y)
    oracle = np.array(list(oracles.two_layer_net(*arrays, lr=LR, steps=500)))
    loss_function = nn.MSELoss(reduction="sum")
    pairs = [(model.linear1, model.linear2)]
    return oracle, eager_error(model, pairs, loss_function, [(x, y)] * 500, LR, oracle)


def test_two_layer_net_learns(two_layer_oracle: tuple[np.ndarray, np.ndarray]) -> None:
    losses, _ = two_layer_oracle
    assert losses[0] > 1e7
    assert losses[-1] < 1e-3


def test_two_layer_net_hand_written_gradients(two_layer_oracle: tuple[np.ndarray, np.ndarray]) -> None:
    model, x, y = two_layer_net()
    w1, w2 = model.linear1.weight.detach().clone(), model.linear2.weight.detach().clone()
    losses = []
    for _ in range(500):
        hidden = x @ w1.T
        active = hidden.clamp(min=0)
        error = active @ w2.T - y
        losses.append(error.square().sum().item())
        grad_output = 2 * error
        grad_hidden = grad_output @ w2
        grad_hidden[hidden < 0] = 0
        w1 -= LR * (grad_hidden.T @ x)
        w2 -= LR * (grad_output.T @ active)
    oracle, yardstick = two_layer_oracle
    assert_as_accurate(losses, yardstick, oracle, terms=1000)


@pytest.mark.parametrize(("backend", "steps"), [("torch", 500), ("onednn", 500), ("triton", 10)])
def test_two_layer_net_swapped(backend: str, steps: int, two_layer_oracle: tuple[np.ndarray, np.ndarray]) -> None:
    """All 500 steps; 10 in the interpreter."""
    model, x, y = two_layer_net()
    losses = train_swapped(backend, model, nn.MSELoss(reduction="sum"), [(x, y)] * steps, LR)
    oracle, yardstick = two_layer_oracle
    assert_as_accurate(losses, yardstick, oracle, terms=1000, backend=backend)


# FashionMLP


def fashion_mlp(steps: int) -> tuple[FashionMLP, Batches]:
    torch.manual_seed(0)
    images, labels = torch.rand(steps, 64, 1, 28, 28), torch.randint(10, (steps, 64))
    return FashionMLP(), list(zip(images, labels, strict=True))


@pytest.mark.parametrize(("backend", "steps"), [("torch", 20), ("onednn", 20), ("triton", 2)])
def test_fashion_mlp_swapped(backend: str, steps: int) -> None:
    model, batches = fashion_mlp(steps)
    layers = [layer for layer in model.linear_relu_stack if isinstance(layer, nn.Linear)]
    oracle = np.array(
        list(
            oracles.classifier(
                double(*(layer.weight for layer in layers)),
                double(*(layer.bias for layer in layers)),
                [(images.flatten(1).double().numpy(), labels.numpy()) for images, labels in batches],
                lr=0.1,
            )
        )
    )
    swapped = train_swapped(backend, model, nn.CrossEntropyLoss(), batches, lr=0.1)
    yardstick = eager_error(model, list(pairwise(layers)), nn.CrossEntropyLoss(), batches, 0.1, oracle)
    assert_as_accurate(swapped, yardstick, oracle, terms=784, backend=backend)


def test_fashion_mlp_with_one_hot_targets_follows_class_indices() -> None:
    model, batches = fashion_mlp(5)
    one_hot = [(images, F.one_hot(labels, 10).float()) for images, labels in batches]
    expected = train(copy.deepcopy(model), nn.CrossEntropyLoss(), batches, lr=0.1)
    losses = train_swapped("onednn", model, nn.CrossEntropyLoss(), one_hot, lr=0.1)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0.0)


def test_fashion_mlp_saved_swapped_and_loaded_plain(tmp_path) -> None:
    model, batches = fashion_mlp(5)
    fastops.swap(model)
    with fastops.backend("onednn"):
        train(model, fastops.swap(nn.CrossEntropyLoss()), batches, lr=0.1)
        torch.save(model.state_dict(), tmp_path / "model.pth")
        plain = FashionMLP()
        plain.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
        plain.eval(), model.eval()
        images = batches[0][0]
        with torch.no_grad():
            predicted, expected = model(images).argmax(1), plain(images).argmax(1)
    assert type(plain.linear_relu_stack[0]) is nn.Linear
    assert torch.equal(predicted, expected)
    assert FASHION_CLASSES[9] == "Ankle boot"
    assert len(FASHION_CLASSES) == plain(images).shape[1]


# LeNet


@pytest.mark.parametrize(("backend", "steps"), [("torch", 100), ("onednn", 100), ("triton", 8)])
def test_lenet_swapped(backend: str, steps: int) -> None:
    torch.manual_seed(0)
    model, batches = LeNet(), [random_image(torch.Generator().manual_seed(0))] * steps
    oracle = np.array(
        train(copy.deepcopy(model).double(), nn.MSELoss(), [(x.double(), y.double()) for x, y in batches], lr=0.01)
    )
    swapped = train_swapped(backend, model, nn.MSELoss(), batches, lr=0.01)
    pairs = list(pairwise((model.conv1, model.conv2, model.fc1, model.fc2, model.fc3)))
    yardstick = eager_error(model, pairs, nn.MSELoss(), batches, 0.01, oracle)
    assert_as_accurate(swapped, yardstick, oracle, terms=576, backend=backend, target=batches[0][1])


def test_lenet_gradient_of_the_first_bias(backend: str) -> None:
    """The tutorial looks at conv1.bias.grad, and walks back from the loss along grad_fn."""
    torch.manual_seed(0)
    model, (x, y) = LeNet(), random_image(torch.Generator().manual_seed(0))
    swapped = fastops.swap(copy.deepcopy(model))
    assert fastops.report(swapped).fused == 4
    with fastops.backend(backend):
        loss = F.mse_loss(swapped(x), y)
        loss.backward()
    F.mse_loss(model(x), y).backward()
    torch.testing.assert_close(swapped.conv1.bias.grad, model.conv1.bias.grad)
    met, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        met.add(node)
        nodes += [following for following, _ in node.next_functions if following is not None and following not in met]
    leaves = {id(node.variable) for node in met if hasattr(node, "variable")}
    assert leaves == {id(parameter) for parameter in swapped.parameters()}


# CIFARNet


@pytest.mark.parametrize(("backend", "steps"), [("torch", 20), ("onednn", 20), ("triton", 3)])
def test_cifar_net_swapped(backend: str, steps: int) -> None:
    """Four images at a time, SGD with momentum, as the tutorial trains it."""
    torch.manual_seed(0)
    model, generator = CIFARNet(), torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator))
        for _ in range(steps)
    ]
    double = [(x.double(), y) for x, y in batches]
    oracle = np.array(train(copy.deepcopy(model).double(), nn.CrossEntropyLoss(), double, lr=1e-3, momentum=0.9))
    with fastops.backend(backend):
        swapped, criterion = fastops.swap(copy.deepcopy(model)), fastops.swap(nn.CrossEntropyLoss())
        assert fastops.report(swapped).fused == 4
        losses = train(swapped, criterion, batches, lr=1e-3, momentum=0.9)
    pairs = list(pairwise((model.conv1, model.conv2, model.fc1, model.fc2, model.fc3)))
    yardstick = eager_error(model, pairs, nn.CrossEntropyLoss(), batches, 1e-3, oracle, momentum=0.9)
    assert_as_accurate(losses, yardstick, oracle, terms=400, backend=backend)


# All of them


@pytest.mark.parametrize(
    ("model", "shapes", "inputs"),
    [
        (LinearRegression, {"linear.weight": (1, 1)}, (3, 1)),
        (Logistic, {"linear.weight": (3, 5), "linear.bias": (3,)}, (2, 5)),
        (TwoLayerNet, {"linear1.weight": (100, 1000), "linear2.weight": (10, 100)}, (3, 1000)),
        (
            FashionMLP,
            {
                "linear_relu_stack.0.weight": (512, 784),
                "linear_relu_stack.0.bias": (512,),
                "linear_relu_stack.2.weight": (512, 512),
                "linear_relu_stack.2.bias": (512,),
                "linear_relu_stack.4.weight": (10, 512),
                "linear_relu_stack.4.bias": (10,),
            },
            (3, 1, 28, 28),
        ),
        (
            LeNet,
            {
                "conv1.weight": (6, 1, 3, 3),
                "conv1.bias": (6,),
                "conv2.weight": (16, 6, 3, 3),
                "conv2.bias": (16,),
                "fc1.weight": (120, 576),
                "fc1.bias": (120,),
                "fc2.weight": (84, 120),
                "fc2.bias": (84,),
                "fc3.weight": (10, 84),
                "fc3.bias": (10,),
            },
            (3, 1, 32, 32),
        ),
        (
            CIFARNet,
            {
                "conv1.weight": (6, 3, 5, 5),
                "conv1.bias": (6,),
                "conv2.weight": (16, 6, 5, 5),
                "conv2.bias": (16,),
                "fc1.weight": (120, 400),
                "fc1.bias": (120,),
                "fc2.weight": (84, 120),
                "fc2.bias": (84,),
                "fc3.weight": (10, 84),
                "fc3.bias": (10,),
            },
            (3, 3, 32, 32),
        ),
    ],
)
def test_keys_and_shapes_are_the_tutorials(
    model: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]], inputs: tuple[int, ...]
) -> None:
    plain = model()
    assert {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()} == shapes
    swapped = fastops.swap(copy.deepcopy(plain))
    assert list(swapped.state_dict()) == list(shapes)
    x = torch.randn(inputs)
    with fastops.backend("torch"):
        torch.testing.assert_close(swapped(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logistic(backend: str) -> None:
    """z = x W + b for x of ones and targets of zero: the loss is the mean of log(1 + exp(z)), its slope s(z) / 3."""
    x, w, b = np.ones(5), np.random.default_rng(0).standard_normal((5, 3)), np.zeros(3)
    z = x @ w + b
    slope = 1 / (1 + np.exp(-z)) / 3
    weight, bias = (torch.tensor(a).requires_grad_() for a in (w, b))
    with fastops.backend(backend):
        criterion = fastops.swap(nn.BCEWithLogitsLoss())
        loss = criterion(torch.tensor(x) @ weight + bias, torch.zeros(3, dtype=torch.float64))
    loss.backward()
    np.testing.assert_allclose(loss.item(), np.log1p(np.exp(z)).mean())
    np.testing.assert_allclose(bias.grad, slope)
    np.testing.assert_allclose(weight.grad, np.outer(x, slope))
