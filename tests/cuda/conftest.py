"""The CUDA backend under test: on the simulated device everywhere, and on a GPU where there is one."""

import os
import sys
from pathlib import Path

import pytest
import simulated
import torch

from fedlora_kernels.backends.cuda import BACKEND, CudaBackend

# the matrices and checks that tests of all backends share
sys.path.append(str(Path(__file__).resolve().parents[1] / "backends"))


@pytest.fixture(scope="session")
def simt():
    """The CUDA backend over the library of the simulated device, which takes CPU tensors."""
    if reason := simulated.missing():
        pytest.skip(reason)
    # the sanitizers' runs and those of kernels with faults bring their own
    library = Path(os.environ["SIMT_LIBRARY"]) if "SIMT_LIBRARY" in os.environ else simulated.build()
    return CudaBackend(library, [simulated.HEADER], device="cpu")


@pytest.fixture(params=["simulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request):
    """A CUDA backend and the device of its tensors: the simulated one, and a real one under the mark gpu."""
    if request.param == "simulated":
        return request.getfixturevalue("simt"), torch.device("cpu")
    ok, reason = BACKEND.available()
    assert ok, reason
    return BACKEND, torch.device("cuda")
