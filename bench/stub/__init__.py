"""Triton on a GPU that is not there: kernels are compiled for sm90, bound and launched into a driver that does nothing.

Call `activate` before anything of Triton is imported, in a process without ``TRITON_INTERPRET``. Tensors are on the
CPU; their addresses are never read.
"""

import ctypes
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path


def activate() -> ctypes.CDLL:
    """Build the driver with the C compiler (that Triton itself needs on a GPU), load it and make it Triton's."""
    folder = tempfile.mkdtemp()
    library = Path(folder, "libcuda.so.1")
    compiler = os.environ.get("CC", sysconfig.get_config_var("CC") or "cc").split()
    source = Path(__file__).with_name("libcuda.c")
    subprocess.run([*compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    Path(folder, "libcuda.so").symlink_to(library.name)  # what Triton 3.6 and older link to
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    os.environ["TRITON_CACHE_DIR"] = folder  # what is linked to this library is of no use to others
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    driver.stub_handed.restype = ctypes.c_void_p

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime.driver import driver as active

    class StubDriver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    active.set_active(StubDriver())
    return driver
