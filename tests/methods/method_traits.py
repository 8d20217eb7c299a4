"""What every method owes the numbered identities between methods, and what each client receives from it, as one tensor."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from clair_problems import contaminated
from common_problems import common_A
from method_problems import Problem, distance, normalised, standard

from fedlora_kernels import backends
from fedlora_kernels.errors import BackendError
from fedlora_kernels.linalg.rules import Energy
from fedlora_kernels.methods.contract import Census, Group, Method, Outcome, Pair, Previous, make_method
from fedlora_kernels.methods.factors import client_gram, client_squares
from fedlora_kernels.methods.robust import RobustRule

SCALE = (2.0, 0.5, 4.0, 1.0, 0.25)
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass(frozen=True)
class Traits:
    """What a method is bound by; no field may be left out, so that a new method has to say.

    ``clients``: of "mixed" ranks, of "equal" ranks, holding one frozen A of "nested" ranks or one "frozen" A, or "shared", one
    column space. ``exact``: pair and residual are D (``cuts``: only while the rank of D is at most the largest r_k).
    ``identical``: one client, or several identical ones, are returned. ``levels``: two levels of aggregation are one.
    ``split``: a client as two of half its weight is the "same", or the method "counts" clients. ``gauge``: (B G, G^-1 A) per
    client is the "same", must be seen ("changes"), or is "refused" since a factor is frozen. ``linear``: c D_k for all k gives
    c times the answer.
    """

    clients: Literal["mixed", "equal", "nested", "frozen", "shared"]
    exact: bool
    identical: bool
    levels: bool
    split: Literal["same", "counts"]
    gauge: Literal["same", "changes", "refused"]
    linear: bool
    cuts: bool = False
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def _exact(clients: Any, gauge: Any = "same", **more: Any) -> Traits:
    return Traits(clients, True, True, more.pop("levels", True), "same", gauge, True, **more)


def _mean(clients: Any, split: Any = "same", linear: bool = True, levels: bool = False, **more: Any) -> Traits:
    return Traits(clients, False, True, levels, split, "changes", linear, **more)


def _rule(split: Any = "counts", **more: Any) -> Traits:
    return Traits("mixed", False, True, False, split, "same", True, **more)


TRAITS: dict[str, Traits] = {
    "florist": _exact("mixed", options={"rule": Energy(1.0)}),
    "flora": _exact("mixed"),
    "flexlora": _exact("mixed", cuts=True),
    "fedex": _exact("equal"),
    "fedmomentum": _exact("equal", options={"energy": 1.0}),
    "ffa": _exact("nested", "refused"),
    "rolora": _exact("frozen", "refused"),
    # the halves of two levels no longer hold one A
    "fedsvd": _exact("frozen", "refused", levels=False),
    "fedit": _mean("equal", levels=True),
    "zero_pad": _mean("mixed", levels=True),
    "hetlora": _mean("mixed", "counts"),
    "prelort": _mean("mixed"),
    "raflora": _mean("mixed"),
    "fedrot": _mean("equal"),
    "lora_fair": _mean("equal", linear=False),
    "lora_fair_closed": _mean("equal", method="lora_fair", options={"solver": "closed"}),
    "fedsa": _mean("equal"),
    "fedtree": _mean("equal", "counts"),
    "clair": Traits("shared", False, True, False, "counts", "same", True, options={"shared_rank": 2}),
    "krum": _rule(options={"f": 1}),
    "multi_krum": _rule(options={"f": 1}),
    "geometric_median": _rule("same"),
    "trimmed_mean": _rule(options={"beta": 0.2}),
    "norm_clip": _rule(),
}


def chosen(**wanted: Any) -> list[str]:
    """The entries of the table that have these traits; a tuple means any of its values."""
    return [
        name
        for name, traits in TRAITS.items()
        if all(
            getattr(traits, key) in value if isinstance(value, tuple) else getattr(traits, key) == value
            for key, value in wanted.items()
        )
    ]


def typical(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Problem:
    """Five clients of unequal weights and scales that the method accepts, m != n."""
    clients = TRAITS[name].clients
    fields = {"m": 41, "n": 31, "scale": SCALE, "dtype": dtype, **fields}
    if clients == "mixed":
        return standard(**fields)
    if clients == "equal":
        return standard(ranks=(6,) * 5, **fields)
    if clients == "shared":
        return shared(**fields)
    return common_A(ranks=(4, 4, 8, 8, 12) if clients == "nested" else (6,) * 5, **fields)


def shared(K: int = 5, scale: tuple[float, ...] = SCALE, dtype: torch.dtype = torch.float64, **fields: Any) -> Problem:
    """Clients of one two-dimensional column space and some noise, the first one not."""
    problem = contaminated(K, 1, noise=0.3, r=2, rank=3, mixed=True, **fields).problem
    B, A = ([x.to(dtype) for x in factor] for factor in (problem.B, problem.A))
    return Problem(B, A, list(scale[:K]), normalised(range(2, 2 + K)))


@dataclass(frozen=True)
class Answer:
    """What a method made of a problem: its outcome, what `decide` planned, and the problem behind a robust rule."""

    outcome: Outcome
    plan: Any
    behind: Problem

    @property
    def pair(self) -> torch.Tensor:
        """The product of the common pair."""
        return product_of(Pair(self.outcome.B, self.outcome.A, self.outcome.rank))  # type: ignore[arg-type]

    @property
    def updates(self) -> list[torch.Tensor]:
        """What the weight of each client gains in all: its personal pair, or the common pair and the residual."""
        K = len(self.behind.B)
        if self.outcome.personal is not None:
            return [product_of(pair) for pair in self.outcome.personal if pair is not None]
        return [self.pair + self.residual] * K

    @property
    def residual(self) -> torch.Tensor:
        made = self.outcome.residual
        return torch.zeros(()) if made is None else product_of(made)


def product_of(pair: Pair) -> torch.Tensor:
    p = int(pair.rank[0])
    return pair.B[0, :, :p].double() @ pair.A[0, :p].double()


def answer(
    problem: Problem,
    name: str,
    *,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    previous: Previous | None = None,
    measure: bool = True,
    **options: Any,
) -> Answer:
    """Run an entry of the table as the engine does: rule, survey, decision, combine."""
    traits = TRAITS[name]
    method = make_method(traits.method or name, {**traits.options, **options})
    fields = {"backend": backend, "round": 0 if previous is None else previous.round + 1, "measure": measure}
    group = problem.group(dtype, **fields)
    if isinstance(method, RobustRule):
        verdict = method.coefficients(client_gram(group)[0].numpy(), np.array(problem.weight))
        scale = [float(s * x) for s, x in zip(problem.scale, verdict.factor, strict=True)]
        problem = replace(problem, weight=verdict.weight.tolist(), scale=scale)
        group = problem.group(dtype, **fields)
    group, plan = planned(method, group)
    return Answer(method.combine(group, plan, previous), plan, problem)


def planned(method: Method, group: Group) -> tuple[Group, Any]:
    """The group with what a survey carried, and what the method decides on it as the whole model."""
    if not method.needs_decision:
        return group, None
    survey = method.survey(group) if method.surveys(None) else None
    gram = client_gram(group).numpy() if method.needs_gram() else None
    if survey is not None:
        group = replace(group, carry=survey.carry)
    return group, method.decide({} if survey is None else survey.stats, census(group, gram))


def census(group: Group, gram: np.ndarray | None) -> Census:
    L, K = group.weight.shape
    return Census(
        modules=group.modules,
        clients=tuple(f"client_{k}" for k in range(K)),
        gram=gram,
        ranks=np.tile(group.ranks, (L, 1)),
        weight=group.weight[0].numpy(),
        shapes=np.tile([group.m, group.n], (L, 1)),
        squares=client_squares(group).numpy(),
    )


def _serves(name: str, backend: str) -> bool:
    """Whether a backend named explicitly computes all that an entry needs; here; "auto", "torch" and "reference" do."""
    if backend in ("auto", "torch", "reference"):
        return True
    try:
        answer(typical(name), name, backend=backend)
    except BackendError:
        return False
    return True


SERVED = [(name, backend) for name in TRAITS for backend in ("auto", *backends.names()) if _serves(name, backend)]


def over(names: Any, dtypes: Any = (torch.float64, torch.float32)) -> Any:
    """Parametrise a test over entries of the table, every backend here that serves them, and dtypes of the factors."""
    cases = [
        pytest.param(name, backend, dtype, id=f"{name}-{backend}-{str(dtype).removeprefix('torch.')}")
        for name, backend in SERVED
        if name in names
        for dtype in dtypes
    ]
    return pytest.mark.parametrize(("name", "backend", "dtype"), cases)


def monomial(problem: Problem, seed: int = 0) -> Problem:
    """Another factorisation of every client's update, exact in any dtype: columns permuted, signed, scaled by powers of two."""
    made = torch.Generator().manual_seed(seed)
    B, A = [], []
    for b, a in zip(problem.B, problem.A, strict=True):
        r = b.shape[1]
        order = torch.randperm(r, generator=made)
        size = 2.0 ** torch.randint(-3, 4, (r,), generator=made) * (1 - 2 * torch.randint(0, 2, (r,), generator=made))
        B.append(b[:, order] * size.to(b))
        A.append(a[order] / size.to(a)[:, None])
    return replace(problem, B=B, A=A)


def split(problem: Problem, k: int) -> Problem:
    """Client k as two of half its weight, side by side."""
    order = sorted([*range(len(problem.B)), k])
    return replace(problem.permuted(order), weight=[problem.weight[j] / (2 if j == k else 1) for j in order])


def rotated_copies(K: int = 5, r: int = 6, m: int = 41, n: int = 31, dtype: torch.dtype = torch.float64) -> Problem:
    """K clients that hold one update in rotated factors, of determinant +1."""
    one = standard(m=m, n=n, ranks=(r,), scale=(2.0,))
    made = torch.Generator().manual_seed(2)
    turns = [torch.linalg.qr(torch.randn(r, r, generator=made, dtype=torch.float64))[0] for _ in range(K)]
    turns = [q * torch.tensor([math.copysign(1.0, float(torch.linalg.det(q)))] + [1.0] * (r - 1)) for q in turns]
    B, A = [(one.B[0] @ q).to(dtype) for q in turns], [(q.T @ one.A[0]).to(dtype) for q in turns]
    return Problem(B, A, [2.0] * K, normalised(range(1, K + 1)))


def clients_of(problem: Problem) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """The clients of a problem as `aggregate` takes them, one module."""
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    base = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "bias": "none"}
    return [
        (
            {f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b},
            {**base, "r": b.shape[1], "lora_alpha": s * b.shape[1], "target_modules": ["q_proj"]},
        )
        for b, a, s in zip(problem.B, problem.A, problem.scale, strict=True)
    ]


def furthest(found: Any, wanted: Any) -> float:
    """The largest of the relative distances of tensors, one by one."""
    return max(distance(x, y) for x, y in zip(found, wanted, strict=True))
