"""What is timed: every op at the sizes of real models, and reference models, in training and inference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastops
from fastops.cli.examples import draw, torch_function
from fastops.cli.tasks import squared_error
from fastops.models import CIFARNet, FashionMLP, LeNet, TwoLayerNet
from fastops.ops import OPS, Op
from fastops.ops.examples import SMALL, Example, Named
from fastops.ops.linear_cross_entropy import timed as timed_head
from fastops.timing import Call
from fastops.tuning import Example as ModelExample
from fastops.tuning import calls_of

from .contestants import OF_MODELS, functions_of, made_when_called, models_of

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Contest:
    """The same work by each contestant, on equal values, and what says which way fastops takes."""

    calls: dict[str, Call]
    way: Callable[[], str]


@dataclass(frozen=True)
class Case:
    """What is timed. ``prepare`` draws inputs on a device: in a dtype, or for a model under autocast to it."""

    name: str
    prepare: Callable[[torch.device, torch.dtype], Contest]
    contestants: tuple[str, ...] = OF_MODELS

    @property
    def family(self) -> str:
        """The name of the op, or of the model with its batch."""
        return self.name.split("/")[0]


# Ops ------------------------------------------------------------------------------------------------------------------


FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


def op_call(
    function: Callable[..., Tensor], arguments: Named, leaves: Sequence[Tensor], grad_output: Tensor, part: str
) -> Call:
    """The call of an op without gradients, with its backward pass to ``leaves``, or that alone, its graph kept."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(**arguments)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(**arguments), leaves, grad_output)

    if part == BACKWARD:
        output = function(**arguments)
        return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
    return forward if part == FORWARD else forward_backward


def _op_case(op: Op, example: Example, part: str) -> Case:
    """A part of the op, beside torch's own function."""
    backward = part != FORWARD

    def prepare(device: torch.device, dtype: torch.dtype) -> Contest:
        variables, constants = draw(example, SMALL, torch.default_generator, dtype, device)
        with torch.no_grad():
            result = torch_function(op)(**variables, **constants, **example.options)
            grad_output = torch.ones_like(result)

        def call_of(make: Callable[[], Callable[..., Tensor]]) -> Call:
            """On values of its own: there are functions that overwrite their arguments."""
            function = make()
            own = {name: tensor.clone().requires_grad_(backward) for name, tensor in variables.items()}
            return op_call(function, {**own, **constants, **example.options}, [*own.values()], grad_output, part)

        def way() -> str:
            asked = {name: tensor.detach().requires_grad_(backward) for name, tensor in variables.items()}
            return fastops.explain(op.name, **asked, **constants, **example.options).way

        calls = {name: made_when_called(partial(call_of, make)) for name, make in functions_of(op).items()}
        return Contest(calls, way)

    return Case(f"{op.name}/{example.name}/{part}", prepare, (*functions_of(op),))


# Models ---------------------------------------------------------------------------------------------------------------


def model_call(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    inputs: tuple[Any, ...],
    training: bool,
    lr: float = 1e-3,
    momentum: float = 0.0,
    autocast: torch.dtype = torch.float32,
) -> Call:
    """A whole training step with SGD on the ``loss`` of the output, or inference. float32 is no autocast."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum) if training else None
    kind = next((leaf.device.type for leaf in (*inputs, *parameters) if isinstance(leaf, Tensor)), "cpu")

    def surroundings() -> torch.autocast:
        return torch.autocast(kind, autocast, enabled=autocast is not torch.float32)

    def step() -> Tensor:
        assert optimizer is not None
        with surroundings():
            value = loss(model(*inputs))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end: a call leaves the memory as it was
        return value

    def predict() -> Any:
        with torch.inference_mode(), surroundings():
            return model(*inputs)

    return step if training else predict


def mean_of(output: Any) -> Tensor:
    """A loss where there is none: the mean of all outputs that are differentiable."""
    return torch.stack([leaf.float().mean() for leaf in differentiable(output)]).sum()


def differentiable(output: Any) -> list[Tensor]:
    """The tensors in an output that a loss can be made of."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]


def way_of(model: nn.Module, inputs: tuple[Any, ...], training: bool, autocast: torch.dtype) -> str:
    """The ways of the calls of fastops in a swapped model, joined by a plus."""
    kind = next((leaf.device.type for leaf in (*inputs, *model.parameters()) if isinstance(leaf, Tensor)), "cpu")
    with torch.autocast(kind, autocast, enabled=autocast is not torch.float32):
        calls = calls_of(model, ModelExample(inputs, None))
    with torch.set_grad_enabled(training):
        return "+".join(sorted({call.way().way for call in calls})) or "none"


def model_contest(
    model: nn.Module,
    inputs: tuple[Any, ...],
    criterion: nn.Module | None,
    loss: Callable[[nn.Module | None], Callable[[Any], Tensor]],
    training: bool,
    autocast: torch.dtype,
    copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    swap_options: dict[str, Any] | None = None,
    sgd: dict[str, float] | None = None,
) -> Contest:
    """Each contestant's copy of the model and its criterion; ``loss(criterion)`` makes a loss of an output."""
    options = swap_options or {}
    model = copied(model).train(training)

    def call_of(make: Callable[[], nn.Module], ours: bool) -> Call:
        own = fastops.swap(copy.deepcopy(criterion)) if ours and criterion is not None else criterion
        return model_call(make(), loss(own), inputs, training, autocast=autocast, **(sgd or {}))

    calls = {
        name: made_when_called(partial(call_of, make, name.startswith("fastops")))
        for name, make in models_of(model, copied, **options).items()
    }
    return Contest(calls, lambda: way_of(fastops.swap(copied(model), **options), inputs, training, autocast))


def _model_cases(
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    classes: int,
    criterion: Callable[[], nn.Module] = nn.CrossEntropyLoss,
    lr: float = 1e-3,
    momentum: float = 0.0,
    **options: Any,
) -> list[Case]:
    """A whole training step with SGD, and inference, of a model and of its copy, which is swapped with ``options``.

    Inputs have this ``shape``; targets are class indices for cross-entropy, and numbers for other losses.
    """

    def prepare(training: bool, device: torch.device, dtype: torch.dtype) -> Contest:
        indices = criterion is nn.CrossEntropyLoss
        inputs = torch.randn(shape).to(device)
        targets = (torch.randint(classes, shape[:1]) if indices else torch.randn(shape[0], classes)).to(device)

        def loss(of: nn.Module | None) -> Callable[[Any], Tensor]:
            assert of is not None
            return lambda output: of(output, targets)

        model = build().to(device)
        sgd = {"lr": lr, "momentum": momentum}
        return model_contest(model, (inputs,), criterion(), loss, training, dtype, swap_options=options, sgd=sgd)

    return [Case(f"{name}/step", partial(prepare, True)), Case(f"{name}/inference", partial(prepare, False))]


def _wide_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 1000))


def _resnet18(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18().to(memory_format=memory_format)
    return model


def _resnet_cases(*shape: int) -> list[Case]:
    """ResNet-18 swapped plainly, with channels_last, and for inference with both models in that format."""

    def cases(suffix: str, build: Callable[[], nn.Module] = _resnet18, **options: Any) -> list[Case]:
        name = f"ResNet18-{'x'.join(map(str, shape))}{suffix}"
        return _model_cases(name, build, shape, 1000, lr=1e-4, momentum=0.9, **options)

    last = torch.channels_last
    both_last = cases("-both_channels_last", lambda: _resnet18(last))
    return [*cases(""), *cases("-channels_last", memory_format=last), both_last[1]]


# The lists ------------------------------------------------------------------------------------------------------------

OP_CASES = [
    _op_case(op, example, part) for op in OPS.values() for example in op.timed for part in (FORWARD, BACKWARD, BOTH)
]
# The same rows and features with more and more classes: what a head's memory grows with.
OP_CASES += [
    _op_case(OPS["linear_cross_entropy"], timed_head(1024, 256, classes), BOTH) for classes in (2000, 8000, 32000)
]
MODEL_CASES = [
    *_model_cases("TwoLayerNet-64", TwoLayerNet, (64, 1000), 10, squared_error, 1e-6),
    *_model_cases("FashionMLP-64", FashionMLP, (64, 784), 10),
    *_model_cases("FashionMLP-512", FashionMLP, (512, 784), 10),
    *_model_cases("WideMLP-256", _wide_mlp, (256, 1024), 1000),
    *_model_cases("LeNet-64", LeNet, (64, 1, 32, 32), 10, nn.MSELoss, 0.1),
    *_model_cases("CIFARNet-64", CIFARNet, (64, 3, 32, 32), 10, momentum=0.9),
    *_model_cases(
        "CIFARNet-64-channels_last", CIFARNet, (64, 3, 32, 32), 10, momentum=0.9, memory_format=torch.channels_last
    ),
]
if find_spec("torchvision") is not None:  # whose model it is
    MODEL_CASES += [*_resnet_cases(4, 3, 64, 64), *_resnet_cases(8, 3, 224, 224)]
CASES = [*OP_CASES, *MODEL_CASES]
QUICK: Final = (  # a model of each kind, a head at two sizes, and what swap fuses most
    "FashionMLP-64/step",
    "FashionMLP-64/inference",
    "LeNet-64/step",
    "linear_cross_entropy/1024x256-2000/forward+backward",
    "linear_cross_entropy/1024x256-16000/forward+backward",
    "linear_relu/64x784-512/forward+backward",
    "conv_relu2d/64x6x15x15-16k3/forward+backward",
    "batch_norm_relu/8x512x7x7/forward+backward",
    "cross_entropy/256x1000/forward+backward",
)
