"""Each private interface of torch and Triton may be missing: the same results come another way."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import interpreter

import fastops
import fastops.distributed
import fastops.functional as FF
from fastops import backport
from fastops.kernels import private
from fastops.ops.conv import is_channels_last
from fastops.ops.op import OPS

pytestmark = no_fallback
SOURCE = Path(private.__file__)
ROOT = Path(fastops.__file__).parent
PATHS = re.findall(r'_torchs\(\s*"([\w.]+)"', SOURCE.read_text())
NAMES = re.findall(r"^(\w+): Final(?:\[Any\])? = ", SOURCE.read_text(), flags=re.MULTILINE)


def loaded(path: Path, **names: Any) -> ModuleType:
    """A module of its own from the source in ``path``, that finds these names instead of Python's."""
    spec = importlib.util.spec_from_file_location(f"another_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(names)
    sys.modules[spec.name] = module  # where dataclasses and Dynamo look for it
    spec.loader.exec_module(module)
    return module


def without(path: str) -> ModuleType:
    """The list where ``torch.<path>`` is missing."""
    owner: Any = torch
    *parents, last = path.split(".")
    for name in parents:
        owner = getattr(owner, name)

    def get(thing: Any, name: str, *otherwise: Any) -> Any:
        return otherwise[0] if thing is owner and name == last else getattr(thing, name, *otherwise)

    return loaded(SOURCE, getattr=get, hasattr=lambda thing, name: get(thing, name, None) is not None)


def put_in_place(monkeypatch: pytest.MonkeyPatch, other: ModuleType) -> None:
    """Of all that the package has from the list."""
    names = {id(getattr(private, name)): name for name in NAMES if getattr(private, name) not in (None, ())}
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "fastops"]:
        for attribute, value in list(vars(module).items()):
            if id(value) in names and attribute != "forward_ad":
                monkeypatch.setattr(module, attribute, getattr(other, names[id(value)]))


def network(images: Tensor, target: Tensor) -> list[Tensor]:
    """A training step and an evaluation of a swapped model."""
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)
    model = fastops.swap(nn.Sequential(*layers).double())
    loss = fastops.swap(nn.CrossEntropyLoss())(model(images), target)
    loss.backward()
    with torch.no_grad():
        return [loss.detach(), model(images), *(parameter.grad for parameter in model.parameters())]


def derivatives(x: Tensor, w: Tensor) -> list[Tensor]:
    """Recorded, transformed, forward-mode, batched and traced ones."""
    constant, x, w = w.clone(), x.requires_grad_(), w.requires_grad_()

    def loss(x: Tensor, w: Tensor = w) -> Tensor:
        return FF.mse_loss(FF.linear_relu(x, w), torch.ones(4, 3, dtype=x.dtype))

    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), w)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, x.detach().square()))).tangent
    both = torch.stack([torch.ones(4, 3), torch.zeros(4, 3)]).double()
    (batched,) = torch.autograd.grad(FF.linear(x, w), x, both, is_grads_batched=True)
    (twice,) = torch.autograd.grad(head := loss(x), x, retain_graph=True)
    (again,) = torch.autograd.grad(head, x)
    traced = torch.jit.trace(lambda x: loss(x, constant), x)(x)
    return [first, second, tangent, batched, twice, again, torch.func.grad(loss)(x), traced]


class Passing(torch.overrides.TorchFunctionMode):
    """Calls what it sees."""

    def __torch_function__(self, function: Any, types: Any, words: Any = (), options: Any = None) -> Any:
        return function(*words, **(options or {}))


def rest(x: Tensor, w: Tensor, target: Tensor) -> list[Tensor]:
    """Other ops, and others who look on: autocast, the profiler, a mode, a compiler."""
    losses = [FF.cross_entropy(x, target, size_average=False), FF.linear_cross_entropy(x, w, target)]
    with torch.autocast("cpu", torch.bfloat16):
        low = FF.linear(x.float(), w.float())
    assert low.dtype is torch.bfloat16
    with torch.profiler.profile():
        profiled = FF.linear_relu(x, w)
    with FlopCounterMode(display=False) as counter:
        counted = FF.linear(x, w)
    assert counter.get_total_flops() == 2 * 4 * 6 * 3
    with Passing():
        seen = FF.add_relu(x, x)
    compiled = torch.compile(FF.linear_relu, backend="eager", fullgraph=True)(x, w)
    return [*losses, low.double(), profiled, counted, seen, compiled]


def results() -> list[Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    images, x, w = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 3, 5, 5), (4, 6), (3, 6)))
    target = torch.tensor([0, 2, 1, 0])
    return [*network(images, target), *derivatives(x, w), *rest(x.detach(), w.detach(), target)]


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    with fastops.backend("torch"):
        return results()


@pytest.mark.filterwarnings("ignore")  # the tracer and the deprecated argument warn
@pytest.mark.parametrize("path", PATHS)
def test_torch_without(path: str, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    other = without(path)
    assert other.missing == [f"torch.{path}"] and not private.missing
    put_in_place(monkeypatch, other)
    for way in ("triton", "onednn"):
        with fastops.backend(way):
            torch.testing.assert_close(results(), expected)


@pytest.mark.filterwarnings("ignore")
def test_torch_without_levels_of_forward_ad(expected: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    real = hasattr
    other = loaded(SOURCE, hasattr=lambda thing, name: thing is not forward_ad and real(thing, name))
    put_in_place(monkeypatch, other)
    with fastops.backend("triton"):
        torch.testing.assert_close(results(), expected)


def test_every_path_is_there_and_in_use() -> None:
    """What the newest torch lacks, or nobody needs, has no place in the list."""
    assert private.missing == [] and len(PATHS) > 20
    sources = [path.read_text() for path in (*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py"))]
    used = {word for text in sources for word in re.findall(r"\bprivate(?:\.| import )(\w+)", text)}
    public = {name for name in vars(private) if not name.startswith("_") and name in SOURCE.read_text()}
    assert used <= public


def test_nobody_else_names_one() -> None:
    """What torch documents under such a name, as its pytrees, apart."""
    documented = "dynamo\\.reset|subclasses\\.|utils\\._py"
    names = re.compile(rf"\b(?:torch|triton)\.(?!_?(?:{documented}))(?:\w+\.)?_[a-zA-Z]\w+|forward_ad\._\w+")
    files = [path for folder in ("", "kernels", "nn", "ops") for path in (ROOT / folder).glob("*.py")]
    named = {path.name: names.findall(path.read_text()) for path in files if path.name != SOURCE.name}
    assert {name: found for name, found in named.items() if found} == {}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 2), (2, 1, 4, 1), (3, 4), (2, 3, 1, 1)])
def test_memory_formats(shape: tuple[int, ...]) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    tensors = [torch.randn(shape)]
    if len(shape) in formats:
        tensors.append(tensors[0].contiguous(memory_format=formats[len(shape)]))
    for tensor in tensors:
        assert private._memory_format(tensor) is private.memory_format(tensor)
        assert is_channels_last(tensor, tensor) == (private.memory_format(tensor) is not torch.contiguous_format)


def test_small_ones() -> None:
    """What `results` does not reach."""
    with pytest.raises(RuntimeError, match="out of bounds"):
        private._assert(torch.tensor(False), "out of bounds")
    private._assert(torch.tensor(True), "out of bounds")
    x, target = torch.randn(4, 3), torch.tensor([0, 2, 1, -100])
    for number, word in enumerate(("none", "mean", "sum")):
        found = private._cross_entropy(x, target, torch.rand(3).fill_(2), number, -100, 0.1)
        plain = F.cross_entropy(x, target, torch.rand(3).fill_(2), reduction=word, label_smoothing=0.1)
        assert torch.equal(found, plain)
    result = without("ops.aten._unsafe_view").unsafe_view(x, (12,))
    assert torch.equal(result, x.view(12)) and not result._is_view()
    assert without("ops.mkldnn._linear_pointwise").linear_pointwise is None
    assert private.chunk_rows(SimpleNamespace(), 4, 3, 2, x) is None


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_compilers(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor with the same configuration as by torch's wrapper, and any other."""
    options = {"epilogue_fusion": True}
    wrapper = private.compiler("inductor", mode, options)
    with monkeypatch.context() as patch:
        patch.delattr(torch, "_TorchCompileInductorWrapper")
        patch.delattr(torch, "_TorchCompileWrapper")
        found: Any = private.compiler("inductor", mode, options)
        eager = private.compiler("aot_eager", "default", {})
    assert found.keywords["config_patches"] == wrapper.config  # type: ignore[attr-defined]
    model, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.ones(1, 3)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend=eager)(x), model(x))


# linear_cross_entropy before torch 2.13 -------------------------------------------------------------------------------

since_2_13 = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch's own came with 2.13")


@pytest.fixture(scope="module")
def ours() -> ModuleType:
    """What takes its place."""
    return loaded(Path(backport.__file__), hasattr=lambda thing, name: False)


X, W, TARGET = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 4, 1, -100])
HEADS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((X, W, TARGET), {}),
    ((X, W, TARGET), {"linear_bias": torch.rand(5), "weight": torch.rand(5), "reduction": "sum"}),
    ((X, W, TARGET), {"ignore_index": 4, "label_smoothing": 0.1, "reduction": "none"}),
    ((X[0], W, TARGET[0]), {}),
    ((X, torch.randn(5, 2, 3), TARGET[:, None].expand(4, 2)), {"linear_bias": torch.rand(5, 2)}),
    ((X, W, torch.rand(4, 5)), {}),
    ((X, W, torch.rand(4, 5)), {"ignore_index": -100}),
    ((X[None], W, TARGET), {}),
    ((X, W[0], TARGET), {}),
    ((X, W[:, :2], TARGET), {}),
    ((X, W, TARGET), {"linear_bias": torch.rand(4)}),
    ((X[0], torch.randn(5, 2, 3), TARGET), {}),
    ((X, W, TARGET[:3]), {}),
    ((X, W, TARGET), {"reduction": "all"}),
]


def outcome(function: Callable[..., Tensor], *words: Any, **options: Any) -> Any:
    try:
        return function(*words, **options)
    except Exception as error:  # whatever torch raises is what is compared
        return type(error), str(error)


@since_2_13
@pytest.mark.parametrize("call", HEADS)
def test_linear_cross_entropy(call: tuple[tuple[Any, ...], dict[str, Any]], ours: ModuleType) -> None:
    words, options = call
    found = outcome(ours.linear_cross_entropy, *words, **options)
    torchs = outcome(F.linear_cross_entropy, *words, **options)
    assert torch.equal(found, torchs) if isinstance(torchs, Tensor) else found == torchs


@since_2_13
@pytest.mark.parametrize(
    "options",
    [{"out_features": (2,), "bias": True}, {"weight": torch.rand(5)}, {"weight": W}, {"label_smoothing": 2.0}],
)
def test_linear_cross_entropy_loss(options: dict[str, Any], ours: ModuleType) -> None:
    found = outcome(ours.LinearCrossEntropyLoss, 3, 5, **options)
    torchs = outcome(nn.LinearCrossEntropyLoss, 3, 5, **options)
    if isinstance(torchs, tuple):
        assert found == torchs
        return
    found.load_state_dict(torchs.state_dict())
    target = TARGET[:, None].expand(4, 2) if "out_features" in options else TARGET
    assert torch.equal(found(X, target), torchs(X, target))
    assert repr(found) == repr(torchs)


@since_2_13
def test_linear_cross_entropy_options(ours: ModuleType) -> None:
    assert repr(ours.LinearCrossEntropyOptions()) == repr(nn.LinearCrossEntropyOptions())


def test_swap_knows_it() -> None:
    """Whosever it is."""
    assert OPS["linear_cross_entropy"].module is backport.LinearCrossEntropyLoss
    criterion = fastops.swap(backport.LinearCrossEntropyLoss(3, 5))
    assert type(criterion) is fastops.nn.LinearCrossEntropyLoss
    with fastops.backend("triton"):
        expected = backport.linear_cross_entropy(X, criterion.linear.weight, TARGET)
        torch.testing.assert_close(criterion(X, TARGET), expected)
    assert type(fastops.unswap(criterion)) is backport.LinearCrossEntropyLoss


# Triton ---------------------------------------------------------------------------------------------------------------


def test_triton_that_cannot_compile_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime._async_compile", None)
    ran: list[int] = []
    ended: list[object] = []

    def fails() -> None:
        raise ValueError("no code")

    errors = private.compile_all([lambda: ran.append(1), fails, lambda: ran.append(2)], ended.append)
    assert ran == [1, 2] and len(ended) == 3 and [str(error) for error in errors] == ["no code"]


def test_triton_that_looks_at_arguments_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("triton.runtime.jit.create_function_from_signature")
    with pytest.raises(RuntimeError, match=r"no way to ask Triton \d+\.\d+ what a launch compiles"):
        private.binder(SimpleNamespace(), None)


@pytest.mark.parametrize("debug", [False, True])
def test_interpreter_computes_overflow_only_where_it_is_an_error(debug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", interpreter.InterpreterOptions(debug=debug))
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", interpreter._patch_lang_tensor)
    private.prepare_interpreter.__wrapped__()
    assert builder.options.sanitize_overflow is debug
