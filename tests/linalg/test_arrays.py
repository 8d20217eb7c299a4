"""Arrays in, arrays out: frameworks, dtypes, devices, memory."""

import sys
import types

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedlora_kernels.errors import BackendError, InputError
from fedlora_kernels.linalg.arrays import Caller, parse_dtype, promote


def take(array):
    return Caller("f").take("X", array)


class Alien:
    """An array of a framework nobody has heard of: DLPack and nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def framework(monkeypatch, name, **attributes):
    """A module of that name in sys.modules with an array type of its own."""
    array = type("Array", (Alien,), {"__module__": f"{name}.core"})
    module = types.ModuleType(name)
    module.from_dlpack = array
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return array


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_shares_memory_and_is_given_back_as_it_is(dtype):
    x = torch.ones(3, 5, dtype=dtype)
    caller = Caller("f")
    t = caller.take("X", x)
    assert t.data_ptr() == x.data_ptr()
    assert caller.give(t) is t
    assert caller.framework == "torch"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numpy_shares_memory(dtype):
    x = np.arange(15, dtype=dtype).reshape(3, 5)
    caller = Caller("f")
    t = caller.take("X", x)
    assert t.data_ptr() == x.ctypes.data
    answer = caller.give(t + 1)
    assert isinstance(answer, np.ndarray)
    assert answer.dtype == x.dtype
    np.testing.assert_array_equal(answer, x + 1)


def test_numpy_read_only_is_read_without_a_warning_or_a_copy():
    x = np.arange(15.0).reshape(3, 5)
    x.flags.writeable = False
    t = take(x)
    assert t.data_ptr() == x.ctypes.data
    assert t.tolist() == x.tolist()
    assert not x.flags.writeable


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::-1, ::-2],
        lambda x: x[1:, 3:],
        lambda x: np.broadcast_to(x[0], (4, 7)),
        lambda x: x.astype(">f8"),
        lambda x: np.rec.fromarrays([x.astype(np.int8), x], names="tag,x").x,
        np.asfortranarray,
        lambda x: x[:0],
        lambda x: x[None, :, None, :],
    ],
    ids=["transposed", "reversed", "offset", "expanded", "byte order", "field", "fortran", "empty", "batch"],
)
def test_numpy_views_are_read_right(view):
    x = view(np.arange(35.0).reshape(5, 7))
    before = x.copy()
    assert take(x).tolist() == before.tolist()
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("writeable", [True, False])
def test_numpy_bfloat16_enters_by_its_bits_and_answers_in_float32(writeable):
    x = np.array([[1.5, -0.0, 3e38], [np.inf, 1e-40, 0.1]]).astype(ml_dtypes.bfloat16)
    x.flags.writeable = writeable
    caller = Caller("f")
    t = caller.take("X", x)
    assert t.dtype == torch.bfloat16
    assert t.to(torch.float64).tolist() == x.astype(np.float64).tolist()
    assert caller.answer_dtype(torch.bfloat16) == torch.float32
    assert caller.answer_dtype(torch.float16) == torch.float16
    asked = caller.give(t)
    assert asked.dtype == ml_dtypes.bfloat16
    assert asked.astype(np.float64).tolist() == x.astype(np.float64).tolist()


def test_torch_bfloat16_answers_in_bfloat16():
    caller = Caller("f")
    caller.take("X", torch.ones(2, dtype=torch.bfloat16))
    assert caller.answer_dtype(torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(
    "array",
    [
        np.ones(3, dtype=np.int64),
        np.ones(3, dtype=bool),
        np.ones(3, dtype=np.complex128),
        np.ones(3, dtype=np.longdouble),
        np.array(["a"]),
        np.array([None]),
        np.ones(3).astype(ml_dtypes.float8_e4m3fn),
        torch.ones(3, dtype=torch.int8),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to(torch.float8_e4m3fn),
        Alien(torch.ones(3, dtype=torch.int32)),
    ],
    ids=lambda x: f"{type(x).__module__}-{getattr(x, 'dtype', 'int32')}",
)
def test_other_dtypes_are_refused_by_name(array):
    dtype = str(array.dtype) if not isinstance(array, Alien) else "torch.int32"
    with pytest.raises(InputError, match=r"^f: B\[2\] has dtype ") as caught:
        Caller("f").take("B[2]", array)
    assert dtype in str(caught.value)
    assert "Convert" in str(caught.value)


@pytest.mark.parametrize("thing", [None, 3.0, "x", [1.0], (torch.ones(2),), {}, np.float64(3.0)], ids=repr)
def test_things_that_are_no_arrays(thing):
    with pytest.raises(TypeError, match=r"f: X is .*an array is needed"):
        take(thing)


def test_masked_and_sparse_arrays_are_refused():
    with pytest.raises(TypeError, match="masked"):
        take(np.ma.masked_array(np.ones(3), mask=[0, 1, 0]))
    with pytest.raises(InputError, match="to_dense"):
        take(torch.eye(3).to_sparse())


def test_lazy_negation_is_resolved():
    x = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    assert x.is_neg()
    t = take(x)
    assert not t.is_neg()
    assert t.tolist() == [-1.0] * 3


def test_subclasses_of_torch_tensors():
    assert take(torch.nn.Parameter(torch.ones(3))).tolist() == [1.0] * 3


def test_fake_tensors_pass_through():
    with FakeTensorMode() as mode:
        x = torch.ones(3, 5, dtype=torch.bfloat16)
        caller = Caller("f")
        t = caller.take("X", x)
        assert t.fake_mode is mode
        assert caller.give(t).shape == (3, 5)


def test_mixed_frameworks_name_both():
    caller = Caller("f")
    caller.take("B[0]", torch.ones(3))
    with pytest.raises(TypeError, match=r"B\[0\] is a torch array and A\[1\] a numpy array"):
        caller.take("A[1]", np.ones(3))


def test_mixed_devices_name_both():
    caller = Caller("f")
    caller.take("B", torch.ones(3))
    with pytest.raises(BackendError, match=r"B is on cpu and A on meta; one device"):
        caller.take("A", torch.ones(3, device="meta"))


def test_a_foreign_framework_by_protocol(monkeypatch):
    array = framework(monkeypatch, "kupy")
    x = torch.arange(6.0).reshape(2, 3)
    caller = Caller("f")
    t = caller.take("X", array(x))
    assert t.data_ptr() == x.data_ptr()
    answer = caller.give(t * 2)
    assert type(answer) is array
    assert answer.tensor.tolist() == (x * 2).tolist()
    with pytest.raises(TypeError, match="X is a kupy array and Y a torch array"):
        caller.take("Y", x)


def test_a_protocol_without_a_way_back_answers_in_torch():
    caller = Caller("f")
    t = caller.take("X", Alien(torch.ones(3)))
    assert caller.give(t) is t


def test_an_export_that_fails_names_the_argument():
    class Stuck(Alien):
        def __dlpack__(self, **kwargs):
            raise BufferError("pinned elsewhere")

    with pytest.raises(InputError, match="X cannot be read through DLPack: pinned elsewhere"):
        take(Stuck(torch.ones(3)))


@pytest.mark.parametrize("x64", [True, False])
def test_jax_answers_64_bits_only_with_x64(monkeypatch, caplog, x64):
    array = framework(monkeypatch, "jax", config=types.SimpleNamespace(jax_enable_x64=x64))
    sys.modules["jax"].dlpack = types.SimpleNamespace(from_dlpack=array)
    caller = Caller(f"f{x64}")
    t = caller.take("X", array(torch.ones(2, 3)))
    with caplog.at_level("WARNING", logger="fedlora_kernels"):
        wide, count = caller.give(t.double()), caller.give(torch.ones(2, dtype=torch.int64))
        half = caller.give(t.bfloat16())
    assert type(wide) is array
    assert wide.tensor.dtype == (torch.float64 if x64 else torch.float32)
    assert count.tensor.dtype == (torch.int64 if x64 else torch.int32)
    assert half.tensor.dtype == torch.bfloat16
    assert len(caplog.records) == (0 if x64 else 1)


def test_jax_tracers_are_refused():
    tracer = type("DynamicJaxprTracer", (Alien,), {"__module__": "jax._src.interpreters.partial_eval"})
    with pytest.raises(TypeError, match="X is a JAX tracer"):
        take(tracer(torch.ones(3)))


def test_backward_through_an_answer_names_the_function():
    x = torch.ones(3, requires_grad=True)
    caller = Caller("core_svd")
    t = caller.take("C", x)
    assert not t.requires_grad
    answer = caller.give(t * 2)
    assert answer.requires_grad
    with pytest.raises(NotImplementedError, match="core_svd has no backward"):
        answer.sum().backward()
    assert not caller.give(torch.ones(3, dtype=torch.int64)).requires_grad


def test_no_graph_where_none_is_wanted():
    with torch.no_grad():
        caller = Caller("f")
        t = caller.take("X", torch.ones(3, requires_grad=True))
    assert not caller.give(t).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16", ml_dtypes.bfloat16])
def test_parse_dtype(dtype):
    assert parse_dtype("f", dtype) == torch.bfloat16
    assert parse_dtype("f", np.float32) == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, "int8", np.int8, "f4x", 3, torch.float8_e5m2, object()])
def test_parse_dtype_refuses(dtype):
    with pytest.raises(InputError, match="f: dtype is "):
        parse_dtype("f", dtype)


def test_promote_is_exact_for_halves():
    assert promote([torch.float16, torch.bfloat16]) == torch.float32
    assert promote([torch.float16, torch.float64, torch.bfloat16]) == torch.float64
    assert promote([torch.bfloat16]) == torch.bfloat16
