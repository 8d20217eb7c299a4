"""What an aggregation method is, and the registry of them.

A method is a frozen dataclass of its options. It sees groups of equally shaped modules as batched tensors and knows
neither files nor clients' names; the engine (`engine/`) owns both. `combine` is required. `survey` and `decide` exist
only for methods that need a decision over the whole model, and cost a second pass over the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import RankRule

__all__ = [
    "Census",
    "Group",
    "Method",
    "Outcome",
    "Spectrum",
    "Survey",
    "make_method",
    "method_class",
    "method_names",
    "register",
]

ENTRY_POINT_GROUP = "fedlora_kernels.methods"


@dataclass(frozen=True)
class Group:
    """N modules of one shape, all clients side by side, on one device.

    ``B[k]`` is (N, m, r_k) and ``A[k]`` is (N, r_k, n) in the client's stored dtype; r_k = 0 where a client lacks the
    modules. ``scale`` and ``weight`` are (N, K) host float64: scale is s_k (clipping multiplies it), weight is w_k after
    policy and normalisation. A client that lacks the modules has weight 0 under missing="renormalize" and keeps its w_k
    under missing="zero". ``clients`` are positions in the caller's order. ``dtype`` is that of the answer.
    """

    modules: tuple[str, ...]
    kind: str
    m: int
    n: int
    B: tuple[Tensor, ...]
    A: tuple[Tensor, ...]
    scale: Tensor
    weight: Tensor
    clients: tuple[int, ...]
    dtype: torch.dtype
    backend: str = "auto"
    seed: int = 0
    round: int = 0

    @property
    def batch(self) -> int:
        """Number of modules N."""
        return len(self.modules)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_k of each client."""
        return tuple(block.shape[-1] for block in self.B)


@dataclass(frozen=True)
class Survey:
    """What a first pass keeps of a group: small arrays with leading dimension N."""

    stats: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Census:
    """The whole model as `decide` sees it: L modules, K clients, never a factor.

    ``gram`` is (L, K, K) float64, <D_i, D_j> per module with scales folded in and no weights; ``finite`` (L, K) bool;
    ``ranks`` (L, K); ``weight`` (K,) float64 as the caller gave it, normalised; ``shapes`` (L, 2). The K clients are those of
    ``Group.clients``, in the same order, after the policy.
    """

    modules: tuple[str, ...]
    gram: np.ndarray
    finite: np.ndarray
    ranks: np.ndarray
    weight: np.ndarray
    shapes: np.ndarray


@dataclass(frozen=True)
class Spectrum:
    """Certified spectrum of the aggregate of N modules; all float64 on the host, padded with zeros to equal length."""

    S: Tensor
    energy: Tensor
    numerical_rank: Tensor
    rho: Tensor
    sigma_err: Tensor
    passes: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a method made of a group.

    Common pair: ``B`` (N, m, P), ``A`` (N, P, n), cut per module to ``rank`` (N,); None where the method has none.
    A module of rank 0 is left out of the output; rank 1 with B = 0 and A = e_1 keeps a zero update in it.
    ``error`` and ``error_bound`` (N,) float64: |D - B A|_F / |D|_F. ``notes`` (N,) int, facts; ``info`` (N,) int, trouble
    (None: none), on which the engine raises. ``energy`` (N,) float64: |D|_F^2, where no spectrum says it.
    """

    B: Tensor | None
    A: Tensor | None
    rank: Tensor | None
    error: Tensor
    error_bound: Tensor
    notes: Tensor
    info: Tensor | None = None
    energy: Tensor | None = None
    spectrum: Spectrum | None = None


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses are frozen dataclasses; their fields are their options, checked in ``__post_init__``.

    ``product_only``: factors enter through ``s_k B_k A_k`` alone, so a client of scale 0 need not be read.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    exact: ClassVar[str] = "no"
    broadcast: ClassVar[str] = ""
    download: ClassVar[str] = ""
    equal_ranks: ClassVar[bool] = False
    needs_previous: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = True
    takes_rule: ClassVar[bool] = False
    product_only: ClassVar[bool] = False
    needs_decision: ClassVar[bool] = False
    gives: ClassVar[tuple[str, ...]] = ("common",)

    def combine(self, group: Group, plan: Any, previous: Mapping[str, Any] | None) -> Outcome:
        """Combine one group. ``plan`` is what `decide` returned (None without), ``previous`` the state of these modules."""
        raise NotImplementedError

    def survey(self, group: Group) -> Survey | None:
        """Small per-module arrays for `decide`, beyond the update Gram that the engine surveys itself."""
        return None

    def decide(self, stats: Mapping[str, np.ndarray], census: Census) -> Any:
        """Decide over the whole model, on the host. Called only if ``needs_decision``."""
        return None

    def client_rank(self, client_rank: int, rank: int) -> int:
        """Rank that ``for_client`` hands a client that trained ``client_rank``, of a common pair of rank ``rank``."""
        return rank

    def options(self) -> dict[str, Any]:
        """Options as plain values, for the report."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


_REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: add a method under its ``name``. Two methods of one name raise ValueError."""
    if not cls.name or cls.name in _REGISTRY:
        raise ValueError(f"method name {cls.name!r} is empty or taken")
    _REGISTRY[cls.name] = cls
    return cls


def method_names() -> list[str]:
    """Return the names of all methods, our own first."""
    return list(dict.fromkeys([*_REGISTRY, *(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))]))


def method_class(name: str) -> type[Method]:
    """Return the class of a method by name. InputError lists the known names, or names a package that cannot be loaded."""
    if name not in _REGISTRY:
        _load(name)
    if name not in _REGISTRY:
        raise InputError(f"unknown method {name!r}; known methods: {', '.join(sorted(method_names()))}")
    return _REGISTRY[name]


def _load(name: str) -> None:
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        package = entry.dist.name if entry.dist else "an unknown package"
        try:
            entry.load()
        except Exception as error:
            raise InputError(
                f"method {name!r} of {package} cannot be loaded from {entry.value}: {error}. Repair or uninstall {package}"
            ) from error


def make_method(name: str, options: Mapping[str, Any], rule: RankRule | None = None) -> Method:
    """Make a method from its name and options. InputError lists the known options; ValueErrors of the options pass through."""
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    given = dict(options)
    if rule is not None:
        if not cls.takes_rule:
            raise InputError(f"method {name!r} does not choose its rank by a rule; remove rule=")
        given["rule"] = rule
    if unknown := sorted(set(given) - set(known)):
        listing = ", ".join(known) or "none"
        raise InputError(f"method {name!r} has no option {unknown[0]!r}; known options: {listing}")
    build: Callable[..., Method] = cls
    return build(**given)
