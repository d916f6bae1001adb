"""The head and the loss of a causal language model of Hugging Face's transformers as one call, without its logits.

The model's own forward runs, whatever its architecture, with a stand-in for ``self``: there the head gives `_Logits`,
which remember its input, and the loss function makes the loss of that. Whatever else a forward does with logits
computes them first. Nothing is imported from transformers, nothing is stored on the model but its class, and threads
share nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import functional as FF
from . import nn as fnn
from .disguise import set_class
from .nn.overrides import overrides, replaced
from .recognition import untouched, user_class
from .source import LeftAlone
from .swap import check, site_class, subclass, with_bases

_Model = TypeVar("_Model", bound=nn.Module)
_FUSED: Final = "_fastops_lm_head"


def fuse_lm_head(model: _Model, *, evaluation: bool = True) -> _Model:
    """Let a causal language model of transformers compute its loss without logits, in place.

    Called with ``labels`` its forward returns the loss of `functional.linear_cross_entropy` and ``logits=None``;
    called without, what it always did. Both ways are run once on a batch of eight tokens: loss and gradients must
    agree. The model stays the same object with the same parameters; only its class changes, to a subclass.

    Args:
        model: the model itself, in its dtype and on its device, before it is wrapped or sharded.
        evaluation: whether in evaluation mode too. False leaves logits there, for metrics.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: with the reason, if its loss is anything but the plain one of a linear head. The model is what it
            was.
    """
    check("fuse_lm_head", model)
    found = type(model)
    unfuse_lm_head(model)
    try:
        plain, name = user_class(type(model)), _head_name(model)
        with torch.inference_mode(False):
            _compare(model, plain, name)
        _set_class(model, _fused_class(plain, name, evaluation))
    except LeftAlone as reason:
        set_class(model, found)
        raise ValueError(f"the head of {found.__name__} cannot be fused with its loss: {reason}") from None
    except BaseException:  # an interrupt too: a model must not stay without its class; it is raised again
        set_class(model, found)
        raise
    return model


def unfuse_lm_head(model: _Model) -> _Model:
    """Give ``model`` its own class back, in place: the reverse of `fuse_lm_head`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    check("unfuse_lm_head", model)
    _set_class(model, _plain_class(user_class(type(model))))
    return model


def _set_class(model: nn.Module, new: type) -> None:
    """Give ``model`` a class, rewritten by `fastops.swap` if the one that it has is."""
    if new is user_class(type(model)):
        return
    if user_class(type(model)) is not type(model):
        with suppress(LeftAlone):
            new = site_class(new)
    set_class(model, new)


def _plain_class(found: type) -> type:
    """``found`` without what `fuse_lm_head` made of it, also where something else derived a class from that."""
    if _FUSED in vars(found):
        return found.__bases__[-1]
    bases = tuple(_plain_class(base) for base in found.__bases__)
    return found if bases == found.__bases__ else with_bases(found, bases)


# What a model must be -------------------------------------------------------------------------------------------------


def _head_name(model: Any) -> str:
    """The attribute of ``model`` that is its head.

    Raises:
        LeftAlone: if the loss is not that of a linear layer, as far as can be seen without running it.
    """
    if not callable(getattr(model, "get_output_embeddings", None)):
        raise LeftAlone("it is no language model of transformers (it has no get_output_embeddings)")
    head = model.get_output_embeddings()
    if head is None:
        raise LeftAlone("it has no head (get_output_embeddings() is None)")
    name = next((name for name, child in model.named_children() if child is head), None)
    if name is None:
        path = next((path for path, module in model.named_modules() if module is head), "of another model")
        raise LeftAlone(f"its head {path} is not its own child (fuse a model before it is wrapped)")
    if (reason := _not_linear(head)) is not None:
        raise LeftAlone(f"its head {name} {reason}")
    if not _is_causal(model):
        raise LeftAlone(f"its loss_function is {getattr(model, 'loss_function', None)}, not ForCausalLMLoss")
    if "forward" in model.__dict__:
        raise LeftAlone("its forward was replaced on the object")
    if "labels" not in inspect.signature(type(model).forward).parameters:
        raise LeftAlone("its forward takes no labels")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise LeftAlone("its weights are on the meta device")
    if any(hasattr(tensor, "full_tensor") for tensor in model.parameters()):
        raise LeftAlone("its weights are sharded: fuse it before")
    return name


def _not_linear(head: Any) -> str | None:
    """Why a call of ``head`` is not `torch.nn.functional.linear` of its weight and bias, or nothing."""
    if not isinstance(head, nn.Linear):
        return f"is no linear layer, but {type(head).__name__}"
    if type(head).forward not in _FORWARDS or replaced(nn.Linear):
        return "computes something of its own"
    if not untouched(head):
        return "has hooks, or a forward of its own"
    return "has weights of a tensor subclass" if overrides(head.weight, head.bias) else None


_FORWARDS: Final = (nn.Linear.forward, fnn.Linear.forward)


def _is_causal(model: Any) -> bool:
    """Whether its loss is ForCausalLMLoss of transformers, without importing that."""
    loss = getattr(model, "loss_function", None)
    return (
        getattr(loss, "__name__", None) == "ForCausalLMLoss"
        and getattr(loss, "__module__", None) == "transformers.loss.loss_utils"
    )


# A forward whose logits wait ------------------------------------------------------------------------------------------


class _Logits:
    """``head(hidden)``, in float32 if ``upcast``, which is computed when anything but the fused loss wants it."""

    value: Any = None

    def __init__(self, head: Any, hidden: Tensor, upcast: bool, log: list[Any]) -> None:
        self.head, self.hidden, self.upcast, self.log, self.is_loss = head, hidden, upcast, log, False

    def now(self, use: str) -> Any:
        """The logits, for ``use``."""
        self.log.append(use)
        if self.value is None:
            logits = self.head(self.hidden)
            self.value = logits.float() if self.upcast else logits
        return self.value

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def contiguous(self) -> _Logits:
        return self

    def float(self) -> _Logits:
        return _Logits(self.head, self.hidden, True, self.log)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now(name), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.now(func.__name__) if type(x) is cls else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.now(name.strip("_")), name)(*others)


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    for _method in (f"__{_name}__", f"__r{_name}__"):
        setattr(_Logits, _method, _operator(_method))
for _name in ("neg", "abs", "len", "iter", "getitem", "setitem", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Logits, f"__{_name}__", _operator(f"__{_name}__"))


class _Head:
    """The head as the model's forward sees it."""

    def __init__(self, head: Any, log: list[Any]) -> None:
        self._head, self._log = head, log

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or _not_linear(self._head) is not None:
            return self._head(*args, **kwargs)
        self._log.append(args[0])
        return _Logits(self._head, args[0], False, self._log)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


class _Stand:
    """``self`` in the model's forward: the model, but for its head and its loss function.

    ``_log`` gets the inputs of the head, and names for what was done with its logits.
    """

    def __init__(self, model: Any, name: str) -> None:
        vars(self).update(_model=model, _name=name, _log=[])

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for isinstance() and super()
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        return _Head(value, self._log) if name == self._name else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value.now(f"attribute {name}") if type(value) is _Logits else value)

    def loss_function(self, logits: Any, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Any:
        if type(logits) is _Logits:
            loss = _loss(logits, labels, vocab_size, *args, **kwargs) if _is_causal(self._model) else None
            if loss is not None:
                logits.is_loss = True
                self._log.append("loss")
                return loss
            logits = logits.now("another loss, or labels of another size")
        return self._model.loss_function(logits, labels, vocab_size, *args, **kwargs)


def _loss(
    logits: _Logits,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """What ForCausalLMLoss of transformers makes of the logits, None where they do not fit together."""
    head, hidden = logits.head, logits.hidden
    weight, bias = head.weight, head.bias
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    target = shift_labels.view(-1).to(hidden.device)
    rows = hidden.reshape(-1, hidden.shape[-1])
    is_alike = hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type)
    if len(weight) != vocab_size or len(rows) != len(target) or not is_alike:
        return None
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = float32_loss(rows, weight, target, linear_bias=bias, ignore_index=ignore_index, reduction=reduction)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def float32_loss(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """`functional.linear_cross_entropy` in float32, as of logits that were upcast."""
    device, dtype = input.device.type, input.dtype
    is_lower = dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(device)
    with torch.autocast(device, dtype) if is_lower else nullcontext():  # there the loss is in float32
        return FF.linear_cross_entropy(input, linear_weight, target, **options).float()


def _finished(output: Any) -> Any:
    """``output`` with logits where they are wanted, and None in the place of those that became the loss."""

    def value(item: Any) -> Any:
        if type(item) is not _Logits:
            return item
        return None if item.is_loss else item.now("output")

    if type(output) is tuple:
        output = tuple(item for item in output if type(item) is not _Logits or not item.is_loss)
    return tree_map(value, output)


def _fused_class(user: Any, head: str, evaluation: bool) -> type:
    """A subclass of ``user`` whose forward fuses the loss; the same one for the same arguments."""
    for known in type.__subclasses__(user):
        if vars(known).get(_FUSED) == (head, evaluation):
            return known
    place = list(inspect.signature(user.forward).parameters).index("labels") - 1

    @functools.wraps(user.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[place] if len(args) > place else kwargs.get("labels")
        if labels is None or not (self.training or evaluation):
            return user.forward(self, *args, **kwargs)
        return _finished(user.forward(_Stand(self, head), *args, **kwargs))

    try:
        return subclass(user, (), {"forward": forward, _FUSED: (head, evaluation)})
    except TypeError as error:
        raise LeftAlone(f"its class cannot be subclassed ({error})") from None


# Both ways ------------------------------------------------------------------------------------------------------------


def _compare(model: Any, plain: Any, name: str) -> None:
    """Run both ways on eight tokens.

    Raises:
        LeftAlone: if the fused one makes logits, or its loss or the gradients of the head and its input differ.
    """
    head, stand = getattr(model, name), _Stand(model, name)
    tokens = (len(head.weight) // 2 + torch.arange(8).view(2, 4)) % len(head.weight)
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    labels = tokens.clone()
    labels[0, -1] = -100

    def run(itself: Any, inputs: list[Any]) -> list[Tensor]:
        """The loss, and the gradients of the head and of its inputs, which the run notes in ``inputs``."""
        with _unchanged(model), torch.enable_grad():
            output = _finished(plain.forward(itself, input_ids=tokens, labels=labels))
            loss = output if isinstance(output, Tensor) else output["loss" if isinstance(output, dict) else 0]
            leaves = [x for x in (*inputs, *head.parameters()) if isinstance(x, Tensor) and x.requires_grad]
            return [loss.detach(), *(torch.autograd.grad(loss, leaves) if leaves and loss.requires_grad else ())]

    inputs: list[Any] = []
    hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        expected = run(model, inputs)
    except Exception as error:
        raise LeftAlone(f"its forward fails on eight tokens and labels ({error})") from error
    finally:
        hook.remove()
    try:
        found = run(stand, stand._log)
    except Exception as error:
        raise LeftAlone(f"its forward fails without logits ({error})") from error
    uses = [use for use in stand._log if isinstance(use, str)]
    if uses != ["loss"]:
        use = next((use for use in uses if use != "loss"), None)
        if use is None:
            raise LeftAlone("its forward does not call its head and its loss_function")
        if use not in ("mul", "rmul", "truediv"):
            raise LeftAlone(f"its forward does more with the logits than hand them to its loss: {use}")
        options = {key: value for key, value in vars(model.config).items() if "logit" in key and type(value) is float}
        raise LeftAlone(f"its forward scales or caps the logits before the loss: {options}")
    device, dtypes = head.weight.device.type, [torch.float32, head.weight.dtype]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    # Half the digits: a loss of another kind is further away, another order of sums is not.
    share = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    names = ("loss", *(f"gradient {number} of the head" for number in range(1, len(expected))))
    for what, ours, torchs in zip(names, found, expected, strict=True):
        allowed = share * torchs.abs().nan_to_num(0, 0, 0).max().item()
        if not torch.allclose(ours, torchs, rtol=0, atol=allowed, equal_nan=True):
            raise LeftAlone(f"its {what} would be another one")


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Random numbers, buffers and gradient checkpointing, which is off meanwhile, are afterwards what they were."""
    modules = list(model.modules())
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    checkpointed = [module for module in modules if getattr(module, "gradient_checkpointing", False) is True]
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    with torch.random.fork_rng(devices, device_type=next((d.type for d in devices), "cuda")):
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True  # type: ignore[assignment]
            for own_buffers, before in buffers:
                own_buffers.clear()
                own_buffers.update(before)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
