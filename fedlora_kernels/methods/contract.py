"""What an aggregation method is, and the registry of them.

A method is a frozen dataclass of its options. It sees groups of equally shaped modules as batched tensors and knows
no files; the engine (`engine/`) owns them. `combine` is required. `survey` and `decide` exist only for methods that need a
decision over the whole model, and cost a second pass over the data.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.errors import InputError
from fedlora_kernels.linalg.rules import RankRule

__all__ = [
    "Census",
    "Group",
    "Memory",
    "Method",
    "Outcome",
    "Pair",
    "Previous",
    "Spectrum",
    "Sums",
    "Survey",
    "Turn",
    "make_method",
    "method_class",
    "method_names",
    "register",
]

ENTRY_POINT_GROUP = "fedlora_kernels.methods"


class Pair(NamedTuple):
    """One low-rank pair for each of N modules: ``B`` (N, m, P), ``A`` (N, P, n), cut per module to ``rank`` (N,) int64 on the host."""

    B: Tensor
    A: Tensor
    rank: Tensor


@dataclass(frozen=True)
class Group:
    """N modules of one shape, all clients side by side, on one device.

    ``B[k]`` is (N, m, r_k) and ``A[k]`` is (N, r_k, n) in the client's stored dtype; r_k = 0 where a client lacks the
    modules. ``scale`` and ``weight`` are (N, K) host float64: scale is s_k (clipping multiplies it), weight is w_k after
    policy and normalisation. A client that lacks the modules has weight 0 under missing="renormalize" and keeps its w_k
    under missing="zero". ``clients`` are positions in the caller's order. ``dtype`` is that of the answer.
    ``measure`` asks for the distance from D where it costs more than the method itself. ``carry`` is what `survey` kept of
    each module. ``starts``: how many of the last columns of each client are what it started from, subtracted; none says 0 of all.
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
    measure: bool = True
    carry: tuple[Mapping[str, Tensor], ...] = ()
    starts: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        """Number of modules N."""
        return len(self.modules)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_k of each client."""
        return tuple(block.shape[-1] for block in self.B)

    @property
    def trained(self) -> tuple[int, ...]:
        """The rank that each client trained, 0 where it lacks the modules."""
        starts = self.starts or (0,) * len(self.B)
        return tuple(max(rank - start, 0) for rank, start in zip(self.ranks, starts, strict=True))

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.B[0].device if self.B else torch.device("cpu")

    def part(self, start: int, stop: int) -> Group:
        """Modules ``start`` to ``stop``, without copies."""
        return dataclasses.replace(
            self,
            modules=self.modules[start:stop],
            B=tuple(B[start:stop] for B in self.B),
            A=tuple(A[start:stop] for A in self.A),
            scale=self.scale[start:stop],
            weight=self.weight[start:stop],
            carry=self.carry[start:stop],
        )


@dataclass(frozen=True)
class Previous:
    """What the round before left of the N modules of a group.

    ``B`` (N, m, P), ``A`` (N, P, n): the common pair as it was broadcast, for a method with ``reads_previous = "pair"``.
    ``state``: the method's own tensors of each module, for ``reads_previous = "state"``.
    """

    round: int
    B: Tensor | None = None
    A: Tensor | None = None
    state: tuple[Mapping[str, Tensor], ...] = ()


@dataclass(frozen=True)
class Memory:
    """What a method remembers of the whole model from round to round: ``tensors`` on the host and ``facts`` as text, by name."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Survey:
    """What a first pass keeps: ``stats``, small arrays of leading dimension N, for `decide`; tensors ``carry`` for `combine`."""

    stats: Mapping[str, np.ndarray]
    carry: tuple[Mapping[str, Tensor], ...] = ()


@dataclass(frozen=True)
class Census:
    """The whole model as `decide` sees it: L modules, K clients, never a factor.

    ``gram`` is (L, K, K) float64, <D_i, D_j> per module with scales folded in and no weights (None without a survey, or where the
    method does not ask for it), ``squares`` (L, K) its diagonal (None without a survey); ``ranks`` (L, K), 0 where a client lacks
    the module; ``weight`` (K,) float64 as the caller gave it, normalised; ``shapes`` (L, 2). The K clients, ``clients`` by name,
    are those of ``Group.clients``, in the same order, after the policy. ``memory`` is what `remember` kept in the round before;
    ``client_state`` what clients report, by name.
    """

    modules: tuple[str, ...]
    clients: tuple[str, ...]
    gram: np.ndarray | None
    ranks: np.ndarray
    weight: np.ndarray
    shapes: np.ndarray
    round: int = 0
    memory: Memory | None = None
    client_state: Mapping[str, Any] | None = None
    squares: np.ndarray | None = None


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
class Turn:
    """A rotation of every client's pair: its factor ``side`` towards that of the previous pair, as `procrustes_rotation` does."""

    side: Literal["B", "A"]
    special: bool
    blend: float


@dataclass(frozen=True)
class Sums:
    """A pair that is no more than two sums of the clients' factors, padded to the largest rank of the group.

    ``B`` and ``A`` are the coefficients (N, K), host float64: ``sum_k B[:, k] B_k`` and ``sum_k A[:, k] A_k``. What has coefficient
    0 does not enter. With a ``turn``, all clients have one rank, and the pairs are turned first.
    """

    B: Tensor
    A: Tensor
    turn: Turn | None = None


@dataclass(frozen=True)
class Outcome:
    """What a method made of a group.

    Common pair: ``B`` (N, m, P), ``A`` (N, P, n), cut per module to ``rank`` (N,); None where the method has none.
    A module of rank 0 is left out of the output; rank 1 with B = 0 and A = e_1 keeps a zero update in it.
    ``error`` and ``error_bound`` (N,) float64: |D - B A|_F / |D|_F, NaN where it is not measured or there is no common pair.
    ``notes`` (N,) int, facts; ``info`` (N,) int, trouble (None: none), on which the engine raises. ``energy`` (N,) float64:
    |D|_F^2, where no spectrum says it.
    ``personal``: for each client of the group its own pair, None where it lacks the modules; ``personal_error`` (N, K)
    float64: what a cap took away of it, relative, NaN where there is none. ``residual``: what the base weight gains beside the
    common pair; rank 0 where nothing. ``state``: tensors of each module for the next round.
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
    personal: tuple[Pair | None, ...] | None = None
    personal_error: Tensor | None = None
    residual: Pair | None = None
    state: tuple[Mapping[str, Tensor], ...] = ()


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses are frozen dataclasses; their fields are their options, checked in ``__post_init__``.

    What a class declares of itself: ``gives``, some of common, personal, residual and state; ``equal_ranks``, one rank for all
    clients of a module; ``frozen``, the factor that clients do not train ("A", "B" or "alternating"; see `frozen_factor`);
    ``reads_previous``, what it takes of the round before ("pair" or "state"), and ``needs_previous``, that it refuses to go on
    without from round 1 on; ``needs_round``; ``uses_weights``; ``takes_rule``; ``takes_client_state``; ``needs_decision``, that `decide` is
    called; ``own_extras``, that tensors which are no factors stay on their client. ``product_only``: factors enter through
    ``s_k B_k A_k`` alone, so a client of scale 0 need not be read. ``columnwise``: column j of one client meets column j of the others.
    ``sorted_pair``: the common pair is an SVD, so that its prefixes are its best approximations. ``streams``: the work on a module is
    small beside reading it, so the fewer modules a group has the better they stay in the caches.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    exact: ClassVar[str] = "no"
    broadcast: ClassVar[str] = ""
    download: ClassVar[str] = ""
    equal_ranks: ClassVar[bool] = False
    frozen: ClassVar[str | None] = None
    reads_previous: ClassVar[str | None] = None
    needs_previous: ClassVar[bool] = False
    needs_round: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = True
    takes_rule: ClassVar[bool] = False
    takes_client_state: ClassVar[bool] = False
    product_only: ClassVar[bool] = False
    columnwise: ClassVar[bool] = True
    sorted_pair: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    needs_decision: ClassVar[bool] = False
    own_extras: ClassVar[bool] = False
    gives: ClassVar[tuple[str, ...]] = ("common",)

    def combine(self, group: Group, plan: Any, previous: Previous | None) -> Outcome:
        """Combine one group. ``plan`` is what `decide` returned (None without), ``previous`` what the round before left of it."""
        raise NotImplementedError

    def sums(self, group: Group, plan: Any) -> Sums | None:
        """What `combine` makes of the group without being measured, where it is no more than sums of factors; else None.

        Such sums are taken while the factors are read. The factors of ``group`` have shapes and no numbers (device "meta"); where
        the method has a frozen factor, all clients hold the same, and scales of a frozen B are equal and not 0.
        """
        return None

    def surveys(self, memory: Memory | None) -> bool:
        """Whether `decide` needs a pass over all data; ``memory`` is that of the round before."""
        return self.needs_decision

    def needs_gram(self) -> bool:
        """Whether `decide` reads the update Gram of the census."""
        return False

    def survey(self, group: Group) -> Survey | None:
        """Small per-module arrays for `decide`, beyond the update Gram that the engine surveys itself."""
        return None

    def decide(self, stats: Mapping[str, np.ndarray], census: Census) -> Any:
        """Decide over the whole model, on the host. Called only if ``needs_decision``."""
        return None

    def remember(self, plan: Any) -> Memory | None:
        """What of the plan the next round's `decide` needs."""
        return None

    def describe(self, plan: Any, clients: Sequence[str]) -> dict[str, Any]:
        """The plan as plain values for the report; ``clients`` are the names in the order of the census."""
        return {}

    def frozen_factor(self, round: int) -> str | None:  # noqa: A002
        """The factor, "A" or "B", that all clients must hold identical in this round."""
        return self.frozen

    def client_rank(self, client_rank: int, rank: int) -> int:
        """Rank that ``for_client`` hands a client that trained ``client_rank``, of a common pair of rank ``rank``."""
        return rank

    def own_rank(self, trained: int, held: int) -> int:
        """The rank that counts as a client's own, of what it ``trained`` and what it ``held`` with its start beside it.

        Only an SVD can be cut to what was trained: a prefix of other pairs loses the start.
        """
        return trained if self.sorted_pair else held

    def broadcast_rank(self, ranks: Sequence[int], rank: int, residual: int) -> float:
        """What is sent to a client of the module, counted as ranks, for the report; a single factor counts half.

        The mean over the clients that train it, of ``ranks``: each receives what the pair has of its `client_rank`.
        """
        prefixes = [min(self.client_rank(own, rank), rank) for own in ranks if own > 0]
        return sum(prefixes) / len(prefixes) if prefixes else rank

    def options(self) -> dict[str, Any]:
        """Options as plain values, for the report."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


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
    """Make a method from its name and options; numbers of NumPy are as good as plain ones.

    InputError lists the known options; ValueErrors of the options pass through.
    """
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    given = {option: _plain(value) for option, value in options.items()}
    if rule is not None:
        if not cls.takes_rule:
            raise InputError(f"method {name!r} does not choose its rank by a rule; remove rule=")
        given["rule"] = rule
    if unknown := sorted(set(given) - set(known)):
        listing = ", ".join(known) or "none"
        raise InputError(f"method {name!r} has no option {unknown[0]!r}; known options: {listing}")
    build: Callable[..., Method] = cls
    return build(**given)


def _plain(value: Any) -> Any:
    """An int or float for a number of any other type, anything else as it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational) else value
