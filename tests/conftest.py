"""All tests run with Triton's interpreter on: CPU tensors reach the kernels. What tests the plain CPU way says so.

`TRITON_INTERPRET` counts when a kernel module is imported: hence before everything else. One thread for each test
process, and for those that it starts: tests run side by side, and threads that wait for each other's core are slow.
What the user tuned does not count either: the cache folder is one that nobody makes.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FASTOPS_CACHE_DIR"] = "/nowhere/fastops"

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import BACKENDS
from hypothesis import HealthCheck, Phase, settings
from interpreter import bf16, overhead, product

import fastops
from fastops import dispatch, tuning_cache
from fastops.kernels import configs
from fastops.ops.op import failed

product.install()
bf16.install()
overhead.install()

# An example takes longer than hypothesis expects where a kernel is interpreted; CI draws the same ones each time.
settings.register_profile(
    "default", max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("mutants", settings.get_profile("default"), max_examples=12, phases=[Phase.generate])
settings.register_profile("deep", settings.get_profile("default"), max_examples=1000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    """A kernel that fails is a failure here, not a fallback. (In the configuration file this would import fastops.)"""
    config.addinivalue_line("filterwarnings", "error::fastops.FallbackWarning")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def plans() -> None:
    """None is left that a test before has made with tables of its own, and no kernel of it has failed."""
    configs.forget_plans()
    failed.clear()


@pytest.fixture
def others_frozen() -> Iterator[None]:
    """`gc.collect` looks at what the test itself made alone: at all objects of a session it takes half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch as on a machine where nobody asked for the interpreter."""
    monkeypatch.setattr(dispatch, "_INTERPRETER", False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the three ways down in turn."""
    with fastops.backend(request.param):
        yield request.param


@pytest.fixture
def exact() -> Iterator[None]:
    """Every call takes the torch expression, whose bits are eager's."""
    with fastops.backend("torch"):
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled is there before, or left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def tuning_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder of the test's own, and nothing tuned before and after."""
    monkeypatch.setenv("FASTOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "tuned", False)
    tuning_cache._of.cache_clear()
    yield tmp_path / "cache"
    tuning_cache._of.cache_clear()
