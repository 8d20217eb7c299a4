"""Arrays of any framework in, arrays of the same framework out. The only file that touches DLPack.

Frameworks are recognised by the module of an array's type and never imported: who passes a CuPy array has loaded CuPy.
torch's own DLPack exchange orders the streams: importing makes our stream wait for the producer, exporting makes the
caller's stream wait for us, neither stops the host, and so an input freed right after the call is not overwritten early.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from fedlora_kernels.errors import BackendError, InputError

__all__ = ["Array", "Caller", "parse_dtype", "promote"]

Array = Any
"""An array of any framework that speaks DLPack: torch, NumPy, CuPy, JAX, ..."""

_FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NEEDED = "float64, float32, float16 or bfloat16 is needed"
_log = logging.getLogger("fedlora_kernels")


def promote(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the common dtype, by ``torch.promote_types``: float16 beside bfloat16 is float32."""
    return functools.reduce(torch.promote_types, dtypes)


def parse_dtype(function: str, dtype: Any) -> torch.dtype:
    """Return a floating dtype given as torch dtype, NumPy dtype or name. InputError on any other."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else _dtype_name(dtype)
    if name not in _FLOATS:
        raise InputError(f"{function}: dtype is {dtype!r}; {_NEEDED}")
    return _FLOATS[name]


def _dtype_name(dtype: Any) -> str:
    try:
        return str(np.dtype(dtype).name)
    except TypeError:
        return str(dtype)


class Caller:
    """One call's view of who called it: the framework and device of its arrays, which the answers share.

    ``framework`` is empty until the first array was taken. Arrays of two frameworks or on two devices are refused.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self.framework = ""
        self.device = torch.device("cpu")
        self._first = ""
        self._root = ""
        self._tracked: list[Tensor] = []

    def take(self, name: str, array: Array) -> Tensor:
        """Return an array as a detached torch tensor that shares its memory; ``name`` is the argument in messages.

        Raises:
            TypeError: not an array, a JAX tracer, or of another framework than the arrays before it.
            InputError: a dtype other than float64, float32, float16, bfloat16.
            BackendError: on another device than the arrays before it.
        """
        framework = self._framework_of(name, array)
        if self.framework and framework != self.framework:
            raise TypeError(
                f"{self.function}: {self._first} is a {self.framework} array and {name} a {framework} array; "
                "one framework per call is needed. Convert one of them"
            )
        tensor = self._import(name, framework, array)
        if tensor.dtype not in _FLOATS.values():
            raise self._wrong_dtype(name, tensor.dtype)
        if not self.framework:
            self.framework, self.device, self._first = framework, tensor.device, name
            self._root = type(array).__module__.partition(".")[0]
        elif tensor.device != self.device:
            raise BackendError(
                f"{self.function}: {self._first} is on {self.device} and {name} on {tensor.device}; "
                "one device per call is needed. Move one of them"
            )
        return tensor

    def give(self, tensor: Tensor) -> Array:
        """Return a tensor as an array of the caller's framework. Backward through it raises if an input wanted gradients."""
        if self.framework == "numpy":
            return _to_numpy(tensor)
        if self.framework == "jax":
            return self._to_jax(tensor)
        if self.framework == "torch":
            if self._tracked and tensor.is_floating_point():
                return _NoBackward.apply(self.function, tensor, *self._tracked)  # type: ignore[no-untyped-call]
            return tensor
        export = getattr(sys.modules.get(self._root), "from_dlpack", None)
        return tensor if export is None else export(tensor)

    def answer_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which inputs of ``dtype`` are answered: float32 for NumPy's guest bfloat16, else the same."""
        return torch.float32 if self.framework == "numpy" and dtype == torch.bfloat16 else dtype

    def _framework_of(self, name: str, array: Array) -> str:
        if isinstance(array, Tensor):
            return "torch"
        if isinstance(array, np.ndarray):
            return "numpy"
        root = type(array).__module__.partition(".")[0]
        if root in ("jax", "jaxlib"):
            return "jax"
        if hasattr(array, "__dlpack__"):
            return root
        raise TypeError(f"{self.function}: {name} is {_describe(array)}; an array is needed (torch, NumPy, CuPy, JAX)")

    def _import(self, name: str, framework: str, array: Array) -> Tensor:
        if framework == "torch":
            return self._from_torch(name, array)
        if framework == "numpy":
            return self._from_numpy(name, array)
        if framework == "jax" and "Tracer" in type(array).__name__:
            raise TypeError(
                f"{self.function}: {name} is a JAX tracer; concrete arrays are needed. Call it outside jit, grad, vmap"
            )
        try:
            return torch.utils.dlpack.from_dlpack(array)
        except (BufferError, RuntimeError) as error:
            raise InputError(f"{self.function}: {name} cannot be read through DLPack: {error}") from error

    def _from_torch(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            raise InputError(
                f"{self.function}: {name} has layout {tensor.layout}; a dense tensor is needed. Use .to_dense()"
            )
        if tensor.requires_grad:
            if torch.is_grad_enabled():
                self._tracked.append(tensor)
            tensor = tensor.detach()
        # A kernel that is handed a pointer cannot see the lazy minus sign of a conjugate's imaginary part.
        return tensor.resolve_neg() if tensor.is_neg() else tensor

    def _from_numpy(self, name: str, array: np.ndarray[Any, Any]) -> Tensor:
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{self.function}: {name} is a masked array; a plain array is needed. Fill it first")
        kind = array.dtype.name
        if kind not in _FLOATS:
            raise self._wrong_dtype(name, array.dtype)
        item = array.dtype.itemsize
        if not array.dtype.isnative or any(step < 0 or step % item for step in array.strides):
            array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        if not array.flags.writeable:
            array = np.asarray(_Writable(array)).view(array.dtype)
        if kind == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def _to_jax(self, tensor: Tensor) -> Array:
        jax = sys.modules["jax"]
        if not jax.config.jax_enable_x64 and tensor.dtype in (torch.float64, torch.int64):
            tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int32)
            _say_once(f"{self.function}: JAX runs without x64, so 64-bit answers are given in 32 bits")
        return jax.dlpack.from_dlpack(tensor)

    def _wrong_dtype(self, name: str, dtype: Any) -> InputError:
        return InputError(f"{self.function}: {name} has dtype {dtype}; {_NEEDED}. Convert it first")


class _Writable:
    """A read-only NumPy array under a writable face: torch warns about read-only memory, and we never write to inputs."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        face = array.view(f"V{array.dtype.itemsize}").__array_interface__
        self.__array_interface__ = {**face, "data": (face["data"][0], False)}


def _describe(thing: object) -> str:
    if isinstance(thing, (list, tuple)):
        return f"a {type(thing).__name__} of {len(thing)}"
    return f"of type {type(thing).__name__}"


def _to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    try:
        import ml_dtypes
    except ImportError as error:
        raise InputError(
            "NumPy has no bfloat16; ml_dtypes is needed for it. Install ml_dtypes or ask for float32"
        ) from error
    bits = tensor.contiguous().view(torch.int16).numpy()
    bfloat16: np.ndarray[Any, Any] = bits.view(ml_dtypes.bfloat16)
    return bfloat16


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


class _NoBackward(torch.autograd.Function):
    """Ties an answer to inputs that want gradients, so that backward fails loudly instead of stopping short in silence."""

    @staticmethod
    def forward(ctx: Any, function: str, answer: Tensor, *inputs: Tensor) -> Tensor:  # noqa: ARG004 - they make the graph
        ctx.function = function
        return answer.view_as(answer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            f"{ctx.function} has no backward: its inputs are detached. Use it outside the training graph"
        )
