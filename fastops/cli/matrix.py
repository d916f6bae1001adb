"""``fastops verify --matrix``: every transform and wrapper of PyTorch around every operation, on every way down."""

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, Final, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import fastops
import fastops.functional as FF
from fastops.accuracy import float32_products
from fastops.cli.examples import Function, draw, torch_function
from fastops.cli.table import MarkdownTable
from fastops.cli.verify import NOTHING_RAN
from fastops.ops import OPS, Op
from fastops.ops.examples import TINY

NOT_IN_TORCH: Final = "not in torch"
Transform = Callable[[Function], Function]


class Subject(NamedTuple):
    """A function and its floating-point arguments. The first ``batched`` of them have a row for each sample."""

    function: Function
    tensors: tuple[Tensor, ...]
    batched: int


class Property(NamedTuple):
    """What ``of`` finds for a fastops function, it or ``expected`` finds for torch's."""

    of: Callable[[Subject], Any]
    expected: Callable[[Subject], Any] | None = None
    tolerance: float | None = None


def _gradients(subject: Subject) -> list[Tensor]:
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in subject.tensors)
    result = subject.function(*leaves)
    return [result.detach(), *torch.autograd.grad(result.sum(), leaves)]


def _scalar(function: Function) -> Function:
    return lambda *tensors: function(*tensors).square().sum()


def _arguments(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def _tangents(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().cos() for tensor in tensors)


def _stacked(function: Function) -> Function:
    return lambda *tensors: vmap(function)(*(torch.stack([tensor, tensor / 2]) for tensor in tensors))


def _gradients_of(transform: Transform) -> Callable[[Subject], list[Tensor]]:
    return lambda subject: _gradients(subject._replace(function=transform(subject.function)))


def _inside(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Subject], list[Tensor]]:
    """Value and gradients of a forward pass inside ``context``."""

    def transform(function: Function) -> Function:
        def run(*tensors: Tensor) -> Tensor:
            with context():
                return function(*tensors)

        return run

    return _gradients_of(transform)


# Higher order ---------------------------------------------------------------------------------------------------------


def _create_graph(subject: Subject) -> Any:
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in subject.tensors)
    first = torch.autograd.grad(_scalar(subject.function)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(_scalar(lambda *gradients: torch.cat([g.flatten() for g in gradients]))(*first), leaves)


def _forward_ad(subject: Subject) -> Any:
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, subject.tensors, _tangents(subject.tensors))
        return forward_ad.unpack_dual(subject.function(*duals)).tangent


def _forward_over_reverse(subject: Subject) -> Any:
    gradient = grad(_scalar(subject.function), _arguments(subject.tensors))
    return jvp(gradient, subject.tensors, _tangents(subject.tensors))


def _reverse_over_forward(subject: Subject) -> Any:
    def slope(*tensors: Tensor) -> Tensor:
        tangent: Tensor = jvp(_scalar(subject.function), tensors, _tangents(tensors))[1]
        return tangent

    return grad(slope, _arguments(subject.tensors))(*subject.tensors)


# torch.func -----------------------------------------------------------------------------------------------------------


def _first_batched(subject: Subject) -> Any:
    first, *others = subject.tensors
    return vmap(subject.function, (-1, *(None,) * len(others)), -1)(torch.stack([first, -first], -1), *others)


class _Module(nn.Module):
    """A function whose arguments but the batched ones are parameters."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.function = subject.function
        self.others = nn.ParameterList(subject.tensors[subject.batched :])

    def forward(self, *batched: Tensor) -> Tensor:
        # By number: Dynamo of torch 2.11 unpacks no such list.
        return self.function(*batched, *(self.others[n] for n in range(len(self.others))))


def _functional_call(subject: Subject) -> Any:
    module = _Module(subject)
    parameters = {name: 2 * parameter.detach() for name, parameter in module.named_parameters()}
    return functional_call(module, parameters, subject.tensors[: subject.batched])


# Compile and export ---------------------------------------------------------------------------------------------------


def _compiled(backend: str, transform: Transform = lambda function: function) -> Property:
    def compiled(function: Function) -> Function:
        torch._dynamo.reset()
        result: Function = torch.compile(transform(function), backend=backend, fullgraph=True)
        return result

    return Property(_gradients_of(compiled), _gradients_of(transform))


def _any_batch(subject: Subject) -> list[Tensor]:
    batched, others = subject.tensors[: subject.batched], subject.tensors[subject.batched :]
    return [subject.function(*(torch.cat([t] * times) for t in batched), *others) for times in (1, 2, 3, 5)]


def _any_batch_compiled(subject: Subject) -> list[Tensor]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    results = _any_batch(subject._replace(function=torch.compile(subject.function, backend=counter, fullgraph=True)))
    if counter.frame_count > 2:
        raise AssertionError(f"{counter.frame_count} compilations for 4 batch sizes")
    return results


def _exported(strict: bool = False, dynamic: bool = False, decomposed: bool = False) -> Property:
    def results(program: Callable[..., Tensor], subject: Subject) -> list[Tensor]:
        batched = subject.tensors[: subject.batched]
        return [program(*(torch.cat([t] * n) for t in batched)).detach() for n in ((2, 3, 5) if dynamic else (2,))]

    def exported(subject: Subject) -> list[Tensor]:
        example = tuple(torch.cat([tensor] * 2) for tensor in subject.tensors[: subject.batched])
        dimensions = [({0: torch.export.Dim("batch", min=2, max=10)},) * len(example)] if dynamic else None
        module = _Module(subject)
        program = torch.export.export(module, example, dynamic_shapes=dimensions, strict=strict)
        buffer = io.BytesIO()
        torch.export.save(program.run_decompositions() if decomposed else program, buffer)
        buffer.seek(0)
        return results(torch.export.load(buffer).module(), subject)

    return Property(exported, lambda subject: results(_Module(subject), subject))


# Memory and objects ---------------------------------------------------------------------------------------------------


def _by_backward(context: Callable[[], AbstractContextManager[Any]], transform: Transform, subject: Subject) -> Any:
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in subject.tensors)
    with context():
        transform(subject.function)(*leaves).sum().backward()
    return [leaf.grad for leaf in leaves]


def _compiled_autograd(subject: Subject) -> Any:
    torch._dynamo.reset()
    return _by_backward(
        lambda: compiled_autograd._enable(torch.compile(backend="aot_eager")), lambda function: function, subject
    )


class _NoSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for a device, and a CUDA graph impossible."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique"):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _without_synchronisation(subject: Subject) -> list[Tensor]:
    with _NoSynchronisation():  # type: ignore[no-untyped-call]
        return _gradients(subject)


def _without_values(convert: Callable[[Tensor], Tensor], subject: Subject) -> str:
    found = _gradients(subject._replace(tensors=tuple(map(convert, subject.tensors))))
    return "; ".join(f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}" for tensor in found)


def _fake(subject: Subject) -> str:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return _without_values(mode.from_tensor, subject)


def _autocast(dtype: torch.dtype) -> Property:
    def transform(function: Function) -> Function:
        def run(*tensors: Tensor) -> Tensor:
            with torch.autocast(tensors[0].device.type, dtype):
                return function(*tensors)

        return run

    return Property(_gradients_of(transform), tolerance=4 * torch.finfo(dtype).eps)


# The matrix -----------------------------------------------------------------------------------------------------------

FAMILIES: Final[dict[str, dict[str, Property]]] = {
    "higher order": {
        "backward": Property(_gradients),
        "create_graph": Property(_create_graph),
        "forward AD": Property(_forward_ad),
        "forward over reverse": Property(_forward_over_reverse),
        "reverse over forward": Property(_reverse_over_forward),
    },
    "torch.func": {
        "vmap": Property(lambda s: _stacked(s.function)(*s.tensors)),
        "in_dims, out_dims": Property(_first_batched),
        "grad": Property(lambda s: grad(_scalar(s.function), _arguments(s.tensors))(*s.tensors)),
        "vmap(grad)": Property(lambda s: _stacked(grad(_scalar(s.function)))(*s.tensors)),
        "jacrev": Property(lambda s: jacrev(s.function)(*s.tensors)),
        "jacfwd": Property(lambda s: jacfwd(s.function)(*s.tensors)),
        "hessian": Property(lambda s: hessian(_scalar(s.function))(*s.tensors)),
        "functional_call": Property(_functional_call),
        "linearize": Property(lambda s: linearize(s.function, *s.tensors)[1](*s.tensors)),
    },
    "torch.compile, fullgraph=True": {
        "eager": _compiled("eager"),
        "aot_eager": _compiled("aot_eager"),
        "inductor": _compiled("inductor"),
        "any batch": Property(_any_batch_compiled, _any_batch),
        "of grad": _compiled("aot_eager", lambda f: grad(_scalar(f))),
        "of vmap": _compiled("aot_eager", _stacked),
        "of jvp": _compiled("aot_eager", lambda f: lambda *t: jvp(f, t, tuple(x.cos() for x in t))[1]),
    },
    "torch.export, saved and loaded": {
        "strict": _exported(strict=True),
        "not strict": _exported(),
        "any batch": _exported(dynamic=True),
        "run_decompositions": _exported(decomposed=True),
    },
    "precision": {"autocast, float16": _autocast(torch.float16), "autocast, bfloat16": _autocast(torch.bfloat16)},
    "memory": {
        "checkpoint": Property(_gradients_of(lambda f: partial(checkpoint, f, use_reentrant=False)), _gradients),
        "reentrant": Property(
            partial(_by_backward, nullcontext, lambda f: partial(checkpoint, f, use_reentrant=True)),
        ),
        "saved_tensors_hooks": Property(_inside(lambda: saved_tensors_hooks(Tensor.clone, lambda t: t))),
        "save_on_cpu": Property(_inside(save_on_cpu)),
        "compiled autograd": Property(_compiled_autograd, partial(_by_backward, nullcontext, lambda f: f)),
    },
    "objects": {
        "meta device": Property(partial(_without_values, lambda tensor: tensor.to("meta"))),
        "FakeTensor": Property(_fake),
        "no synchronisation": Property(_without_synchronisation),
    },
}


def subjects_of(op: Op, device: torch.device) -> tuple[Subject, Subject, Callable[[], str]]:
    """Of fastops' function and of torch's, with the arguments of the op's first example; and which way it goes."""
    example = op.examples[0]
    variables, constants = draw(example, TINY, torch.Generator().manual_seed(0), torch.float32, device)

    def subject(original: Function) -> Subject:
        def call(*tensors: Tensor) -> Tensor:
            first = tensors[0]
            fixed = {name: tensor.to(first.device).repeat(5)[: first.shape[0]] for name, tensor in constants.items()}
            return original(**dict(zip(variables, tensors, strict=True)), **fixed, **example.options)

        return Subject(call, tuple(variables.values()), 1 if "weight" in variables else len(variables))

    def backend() -> str:
        return fastops.explain(op.name, **variables, **constants, **example.options).backend

    return subject(getattr(FF, op.name)), subject(torch_function(op)), backend


def _same_error(property: Property, ours: Subject, expected: NotImplementedError) -> str:
    try:
        property.of(ours)
    except NotImplementedError as error:
        if str(error) == str(expected):
            return NOT_IN_TORCH
        raise
    return f"no error, but torch: {expected}"


def expected_of(property: Property, torchs: Subject) -> Callable[[], Any]:
    """Finds out what torch's function has to say, once unless that is an error."""
    return cache(partial(property.expected or property.of, torchs))


@float32_products("ieee")  # as in `check_accuracy`
def failure_of(property: Property, ours: Subject, expect: Callable[[], Any]) -> str | None:
    """What is wrong, or `NOT_IN_TORCH` if torch lacks it and fastops says so in torch's words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", fastops.FallbackWarning)
            try:
                expected = expect()
            except NotImplementedError as error:
                return _same_error(property, ours, error)
            found = property.of(ours)
            if isinstance(found, str):
                return None if found == expected else f"{found}, not {expected}"
            scale = max(1.0, *(float(tensor.abs().max()) for tensor in tree_leaves(expected)))
            found, expected = tree_map(lambda tensor: tensor / scale, (found, expected))
            torch.testing.assert_close(found, expected, rtol=property.tolerance, atol=property.tolerance)
    except Exception as error:  # whatever a check raises is what it found
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def run(names: list[str], ways: Sequence[str], device: torch.device) -> int:
    """Print a table for each family, of all operations on all ways; return 1 unless fastops ran and all holds."""
    subjects = {name: subjects_of(OPS[name], device) for name in names}
    first = max(map(len, names))
    taken = {}
    print("**ways**\n")
    table = MarkdownTable({"": first} | {f"backend {way!r}": 0 for way in ways})
    for op, (_, _, backend) in subjects.items():
        for way in ways:
            with fastops.backend(way):
                taken[op, way] = backend()
        table.row([op, *(taken[op, way] for way in ways)])
    if set(taken.values()) <= {"torch"}:
        print(f"\n{NOTHING_RAN}")
        return 1
    failures, cells = [], 0
    for family, properties in FAMILIES.items():
        print(f"\n**{family}**\n")
        table = MarkdownTable({"": first} | {name: 0 for name in properties})
        for op, (ours, torchs, _) in subjects.items():
            row = [op]
            checked = [way for way in ways if taken[op, way] == way or way == "auto"]
            for name, property in properties.items():
                bad, good, expect = [], "yes", expected_of(property, torchs)
                for way in checked:
                    with fastops.backend(way):
                        failure = failure_of(property, ours, expect)
                    if failure == NOT_IN_TORCH:
                        good = NOT_IN_TORCH
                    elif failure is not None:
                        bad.append(way)
                        failures.append(f"{family} / {name} / {op} / {way}: {failure}")
                cells += len(checked)
                row.append(f"NOT ON {', '.join(bad)}" if bad else good if checked else "-")
            table.row(row)
    print()
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{cells} cells: {cells - len(failures)} hold, {len(failures)} do not")
    return 1 if failures else 0
