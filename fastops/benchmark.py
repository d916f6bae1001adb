"""Fixtures for pytest-benchmark: `fastops_compare` times a model of yours, eager and with fastops.

Import it into a test file or a ``conftest.py``; it needs the extra ``torch-fastops[bench]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .bench.cases import Contest, mean_of, model_contest
from .bench.contestants import OF_MODELS, OURS, NotRun, forget_compiled, tried
from .bench.counting import cost_of, operations_of
from .cli.bench import refuse_interpreter
from .timing import synchronized

__all__ = ["fastops_compare"]


@pytest.fixture(params=OF_MODELS)
def fastops_compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Time a model as each contestant in turn: a test that takes this fixture runs once for each, in one group.

    The fixture is a function ``(model, *inputs, training=False, loss=None, autocast=torch.float32)``. It times copies:
    ``model(*inputs)`` in inference mode, or with ``training`` a step: forward, ``loss`` of the output (a function that
    returns a scalar; without it the mean of all outputs), backward, and SGD with a learning rate of 0. ``autocast`` is
    the dtype of autocast, float32 is none. ``extra_info`` gets the way of fastops, and the bytes, launches and peak
    memory of a call where they can be told. A contestant that cannot run here is skipped with the reason. Which way
    fastops takes says ``fastops.backend`` around the call, or ``FASTOPS_BACKEND``.
    """
    contestant: str = request.param

    def compare(
        model: nn.Module,
        *inputs: Any,
        training: bool = False,
        loss: Callable[[Any], Tensor] | None = None,
        autocast: torch.dtype = torch.float32,
    ) -> None:
        refuse_interpreter()
        places = [t.device for t in (*model.parameters(), *model.buffers(), *inputs) if isinstance(t, Tensor)]
        contest = model_contest(model, inputs, None, lambda _: loss or mean_of, training, autocast, sgd={"lr": 0.0})
        others = [word for word in request.node.callspec.id.split("-") if word != contestant]
        group = "-".join([request.node.originalname, *others])
        run_contestant(benchmark, group, contest, contestant, places[0] if places else torch.device("cpu"))

    return compare


def run_contestant(benchmark: Any, group: str, contest: Contest, name: str, device: torch.device) -> None:
    """Time one contestant, and tell in ``extra_info`` what it does; skip the test if it cannot run."""
    forget_compiled()
    try:
        able, left_out = tried({name: contest.calls[name]}, device, (OURS,))
    except NotRun as error:
        pytest.skip(str(error))
    if left_out:
        pytest.skip(left_out[name])
    benchmark.group = group
    benchmark(synchronized(able[name], device))
    cost = cost_of(able[name], operations_of(name, able[name]), device)
    way = contest.way() if name == OURS else ""
    benchmark.extra_info.update(way=way, **cost._asdict())
