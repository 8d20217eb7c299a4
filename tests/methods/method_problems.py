"""Problems for methods: clients of one matrix as a `Group`, and what they amount to, densely in float64."""

from dataclasses import dataclass, replace

import torch

from fedlora_kernels.methods.contract import Group, Outcome, make_method

RANKS = (4, 4, 8, 8, 12)
COUNTS = (10, 20, 30, 40, 50)


@dataclass
class Problem:
    """K clients of one m x n matrix. ``weight`` is normalised unless a test says otherwise."""

    B: list
    A: list
    scale: list
    weight: list

    def group(self, dtype=None, **fields) -> Group:
        return Group(
            modules=("layers.0.q_proj",),
            kind="linear",
            m=self.B[0].shape[0],
            n=self.A[0].shape[1],
            B=tuple(b[None] for b in self.B),
            A=tuple(a[None] for a in self.A),
            scale=torch.tensor([self.scale], dtype=torch.float64),
            weight=torch.tensor([self.weight], dtype=torch.float64),
            clients=tuple(range(len(self.B))),
            dtype=dtype or self.B[0].dtype,
            backend=fields.pop("backend", "torch"),
            **fields,
        )

    def updates(self) -> list:
        return [s * b.double() @ a.double() for b, a, s in zip(self.B, self.A, self.scale, strict=True)]

    def dense(self) -> torch.Tensor:
        return sum(w * d for w, d in zip(self.weight, self.updates(), strict=True))

    def run(
        self, method="florist", plan=None, dtype=None, rule=None, backend="torch", previous=None, **options
    ) -> Outcome:
        group = self.group(dtype, backend=backend, round=0 if previous is None else previous.round + 1)
        return make_method(method, options, rule).combine(group, plan, previous)

    def gauged(self, seed=5) -> "Problem":
        """Another factorisation of every client's same update."""
        made = torch.Generator().manual_seed(seed)
        B, A = [], []
        for b, a in zip(self.B, self.A, strict=True):
            G = torch.randn(b.shape[1], b.shape[1], generator=made, dtype=b.dtype) + 3 * torch.eye(
                b.shape[1], dtype=b.dtype
            )
            B.append(b @ G)
            A.append(torch.linalg.solve(G, a))
        return replace(self, B=B, A=A)

    def permuted(self, order) -> "Problem":
        return Problem(*([field[k] for k in order] for field in (self.B, self.A, self.scale, self.weight)))


def normalised(counts) -> list:
    return [count / sum(counts) for count in counts]


def standard(m=48, n=40, ranks=RANKS, counts=None, scale=None, seed=0, dtype=torch.float64) -> Problem:
    """The standard problem: mixed ranks, unequal counts, s_k = 16 / r_k, standard normal factors."""
    made = torch.Generator().manual_seed(seed)
    counts = COUNTS[: len(ranks)] if counts is None else counts
    B = [torch.randn(m, r, generator=made, dtype=torch.float64).to(dtype) for r in ranks]
    A = [torch.randn(r, n, generator=made, dtype=torch.float64).to(dtype) for r in ranks]
    return Problem(B, A, [16 / r for r in ranks] if scale is None else list(scale), normalised(counts))


def with_spectrum(values, m=31, n=23, seed=1) -> Problem:
    """One client whose update has these singular values."""
    made = torch.Generator().manual_seed(seed)
    k = len(values)
    U = torch.linalg.qr(torch.randn(m, k, generator=made, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=made, dtype=torch.float64))[0]
    root = torch.tensor(values, dtype=torch.float64).sqrt()
    return Problem([U * root], [(V * root).T.contiguous()], [1.0], [1.0])


def product(outcome: Outcome) -> torch.Tensor:
    p = int(outcome.rank[0])
    return outcome.B[0, :, :p].double() @ outcome.A[0, :p].double()


def distance(x, y) -> float:
    """Relative Frobenius distance; absolute where y = 0."""
    size = float(torch.linalg.norm(y))
    return float(torch.linalg.norm(x - y)) / (size or 1.0)


VARIANTS = {
    "standard": standard,
    "m_below_R": lambda: standard(m=19, n=41),
    "n_below_R": lambda: standard(m=53, n=17),
    "both_below_half_R": lambda: standard(m=13, n=11),
    "m_is_rank": lambda: standard(m=8, n=29, ranks=(8, 8, 8)),
    "n_is_rank": lambda: standard(m=29, n=12, ranks=(12, 4, 12)),
    "one_client": lambda: standard(m=37, n=29, ranks=(5,)),
    "rank_one": lambda: standard(m=7, n=5, ranks=(1, 1)),
    "row": lambda: standard(m=1, n=17, ranks=(2, 1, 3)),
    "column": lambda: standard(m=17, n=1, ranks=(2, 1, 3)),
    "duplicates": lambda: duplicated(standard()),
    "one_zero_client": lambda: zero_client(standard(), 2),
    "gauge_imbalanced": lambda: imbalanced(standard()),
}


def duplicated(problem: Problem) -> Problem:
    pair = ([*problem.B, problem.B[2]], [*problem.A, problem.A[2]], [*problem.scale, problem.scale[2]])
    return Problem(*pair, normalised([*COUNTS, 30]))


def zero_client(problem: Problem, k: int) -> Problem:
    return replace(problem, B=[torch.zeros_like(b) if i == k else b for i, b in enumerate(problem.B)])


def imbalanced(problem: Problem) -> Problem:
    factors = [1e4, 1.0, 1e-4, 1e4, 1e-4]
    B = [b * t for b, t in zip(problem.B, factors, strict=True)]
    A = [a / t for a, t in zip(problem.A, factors, strict=True)]
    return replace(problem, B=B, A=A)
