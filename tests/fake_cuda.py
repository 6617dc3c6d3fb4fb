"""Gives a torch that was built without CUDA a CUDA device without memory or kernels; see fake_cuda.cpp."""

import ctypes
import importlib.util
import subprocess
import tempfile
from pathlib import Path


def load_device() -> None:
    """Torch looks for its devices when it is imported: this comes first. Needs a C++ compiler."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    include = [f"-I{torch / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_cuda.so"
        source = Path(__file__).with_name("fake_cuda.cpp")
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", *include, str(source), "-o", str(library), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
        for path in (torch / "lib/libc10.so", torch / "lib/libtorch_cpu.so", library):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
