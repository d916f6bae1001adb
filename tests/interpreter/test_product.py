"""The patched interpreter's matrix product has the same bits on every processor."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from interpreter.product import product

# Prints for which processor numpy's OpenBLAS has chosen its kernels, and a digest of our product.
PROGRAM = """
import ctypes, glob, hashlib, os
import numpy as np
from product import product

libraries = glob.glob(os.path.join(os.path.dirname(np.__file__), "..", "numpy.libs", "libscipy_openblas64_*"))
chosen = ctypes.CDLL(libraries[0]).scipy_openblas_get_corename64_ if libraries else None
if chosen:
    chosen.restype = ctypes.c_char_p
a, b = (np.random.RandomState(0).standard_normal(shape).astype(np.float32) for shape in ((64, 48), (48, 32)))
print(chosen().decode() if chosen else "unknown", hashlib.sha256(product(a, b, a.dtype).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_element_is_summed_up_in_order(dtype: type) -> None:
    """With all roundings, whatever the layouts of the operands and the sizes of the tile."""
    a, b = np.random.standard_normal((48, 40)).astype(dtype), np.random.standard_normal((40, 32)).astype(dtype)
    expected = np.zeros((48, 32), dtype)
    for k in range(40):
        expected += a[:, k, None] * b[k]
    for left in (a, np.asfortranarray(a), np.repeat(a, 2, axis=1)[:, ::2]):
        for right in (b, np.asfortranarray(b), np.repeat(b, 2, axis=1)[:, ::2]):
            assert np.array_equal(product(left, right, a.dtype), expected)
    assert np.array_equal(product(a[16:32], b[:, 16:], a.dtype), expected[16:32, 16:])
    assert np.array_equal(product(np.stack((a, -a)), np.stack((b, b)), a.dtype), np.stack((expected, -expected)))


def test_narrow_operands_are_summed_up_in_the_wider_dtype() -> None:
    a, b = np.full((16, 16), 0.1, np.float16), np.ones((16, 16), np.float16)
    total = product(a, b, np.dtype(np.float32))
    assert total.dtype == np.float32 and (total == 16 * a.astype(np.float32)).all()


def test_no_choice_of_openblas_changes_the_bits() -> None:
    """Of two whose kernels run on any x86-64 processor that numpy runs on, and of its own for this one.

    A processor of another family knows neither, and has the same choice three times.
    """
    found = {}
    for core in ("Prescott", "Nehalem", None):
        environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
        environment |= {"PYTHONPATH": str(Path(__file__).parent)} | ({"OPENBLAS_CORETYPE": core} if core else {})
        output = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, check=True)
        found[core] = output.stdout.decode().split()
    if platform.machine() in ("x86_64", "AMD64"):
        assert found["Nehalem"][0] in ("Nehalem", "unknown")
    assert len({digest for _, digest in found.values()}) == 1
