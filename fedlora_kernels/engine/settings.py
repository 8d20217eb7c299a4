"""The arguments of an aggregation, checked before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.engine.state import State
from fedlora_kernels.errors import BackendError, InputError
from fedlora_kernels.linalg.rules import Budget, Energy, RankRule, parse_size
from fedlora_kernels.methods.contract import Method, make_method
from fedlora_kernels.methods.robust import RobustRule

__all__ = [
    "Progress",
    "Settings",
    "budget_of",
    "check_delivery",
    "client_state_of",
    "count_of",
    "device_of",
    "dtype_of",
    "memory_of",
    "method_of",
    "options_of",
    "robust_of",
    "round_of",
]

Progress = Callable[[str, int, int], None]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MEMORY = 1 << 30
Options = TypeVar("Options", ReadOptions, WriteOptions)


@dataclass(frozen=True)
class Settings:
    """The arguments of `aggregate`, checked. Where the rule is a ``budget``, the method keeps all that it may leave."""

    method: Method
    policy: Policy
    read: ReadOptions
    write: WriteOptions
    normalize: bool
    dtype: torch.dtype | None
    device: torch.device
    backend: str
    memory: int
    seed: int
    round: int
    progress: Progress
    robust: RobustRule | None = None
    budget: Budget | None = None
    state: State | None = None
    client_state: Mapping[str, Any] | None = None
    per_client: bool = False
    measure: bool = True
    compare: bool = False

    @property
    def rule(self) -> RankRule | None:
        """The rank rule that was asked for; None for a method without one."""
        return self.budget or getattr(self.method, "rule", None)


def method_of(method: str | Method, rule: RankRule | None, write: WriteOptions, options: Mapping[str, Any]) -> Method:
    """The method, with its rule and options, and the place of the singular values that the output asks for."""
    made = _made(method, rule, options)
    if isinstance(method, Method) or "output" in options or write.output == "left":
        return made
    if not hasattr(made, "output"):
        raise InputError(
            f"WriteOptions(output={write.output!r}): method {method!r} has no singular values to place; leave it out"
        )
    return dataclasses.replace(made, output=write.output)  # type: ignore[call-arg]


def _made(method: str | Method, rule: RankRule | None, options: Mapping[str, Any]) -> Method:
    if isinstance(method, Method):
        if rule is not None or options:
            raise InputError(
                f"method is of type {type(method).__name__} already; give its options to it, not to aggregate"
            )
        return method
    if not isinstance(method, str):
        raise InputError(f"method is of type {type(method).__name__}; a method's name needed, such as 'florist'")
    return make_method(method, options, rule)


def budget_of(method: Method) -> tuple[Method, Budget | None]:
    """The method with a rule for one matrix that keeps whatever a budget may leave, and that budget; None if it has another rule."""
    rule = getattr(method, "rule", None)
    if not isinstance(rule, Budget):
        return method, None
    return dataclasses.replace(method, rule=Energy(1.0, cap=rule.cap)), rule  # type: ignore[call-arg]


def options_of(name: str, value: Any, kind: type[Options]) -> Options:
    """A record of options; its defaults where None. InputError for anything else."""
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{name} is of type {type(value).__name__}; {kind.__name__}(...) needed")
    return kind() if value is None else value


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of the answer; None leaves it to the clients."""
    made = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if made is not None and made not in DTYPES:
        listing = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise InputError(f"dtype is {dtype!r}; one of {listing} needed")
    return made


def device_of(device: str | torch.device | None, backend: str) -> torch.device:
    """Where to compute: what is asked, else the GPU if there is one that the backend can use."""
    if device is None:
        on_gpu = torch.cuda.is_available() and backend in ("auto", "cuda", "triton", "torch")
        return torch.device("cuda" if on_gpu else "cpu")
    try:
        made = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {device!r}; 'cpu' or 'cuda' needed") from error
    if made.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {device!r}: torch {torch.__version__} finds no GPU here. Use device='cpu'")
    if made.type not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}; 'cpu' or 'cuda' needed")
    return made


def memory_of(memory: int | str | None) -> int:
    """Bytes for data in flight."""
    if memory is None:
        return MEMORY
    try:
        return parse_size(memory)
    except ValueError as error:
        raise InputError(f"memory: {error}") from None


def count_of(name: str, value: int) -> int:
    """An integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{name} is {value!r}; an integer of at least 0 needed")
    return value


def round_of(value: int | None, state: State | None) -> int:
    """The 0-based round: as given, else the one after ``state``, else 0."""
    if value is not None:
        return count_of("round", value)
    if state is None:
        return 0
    if state.round < 0:
        where = printable(getattr(state.adapter, "label", "state"))
        raise InputError(f"previous {where} does not say its round; give round=, counted from 0")
    return state.round + 1


def robust_of(robust: Any, method: Method) -> RobustRule | None:
    """The robust rule in front of ``method``, or the one that it is; a name stands for the rule with its defaults."""
    if isinstance(method, RobustRule):
        if robust is not None:
            raise InputError(f"method {method.name!r} is a robust rule already; leave robust= out")
        return method
    if isinstance(robust, str):
        robust = make_method(robust, {})
    if robust is not None and not isinstance(robust, RobustRule):
        raise InputError(
            f"robust is {printable(robust)}; a robust rule such as fk.Krum(f=1) or 'geometric_median' needed"
        )
    if robust is not None and not method.uses_weights and isinstance(robust, RobustRule) and robust.scope == "matrix":
        raise InputError(
            f"robust: method {method.name!r} uses no weights, so a rule cannot choose per matrix; scope='model' needed"
        )
    return robust


def client_state_of(value: Any, method: Method, names: Sequence[str]) -> Mapping[str, Any] | None:
    """What clients report, by name; a list is in the order of the clients."""
    if value is None:
        return None
    if not method.takes_client_state:
        raise InputError(f"method {method.name!r} takes no client_state; leave it out")
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(names):
            raise InputError(f"client_state holds {len(value)} entries for {len(names)} clients; one per client needed")
        return dict(zip(names, value, strict=True))
    if not isinstance(value, Mapping):
        raise InputError(
            f"client_state is of type {type(value).__name__}; a mapping by client name, or a list in their order, needed"
        )
    if unknown := [name for name in value if name not in names]:
        raise InputError(f"client_state: no client {printable(unknown[0])!r} in this round; leave it out")
    return value


def check_delivery(method: Method, out: Any, per_client: bool) -> None:
    """Raise InputError where the output folder would hold nothing of what the method gives."""
    if out is not None and "common" not in method.gives and not per_client:
        raise InputError(
            f"method {method.name!r} has no common pair; per_client=True writes each client's own under OUT/clients/"
        )
    if out is None and per_client:
        raise InputError("per_client=True writes folders; give out=, or take for_client of the result in memory")
