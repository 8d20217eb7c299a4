"""FedTreeLoRA: for each client the mean pair of its cluster and of all others, clusters cut from one tree (arXiv 2603.13282)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora_kernels.backends.contract import U64, Note
from fedlora_kernels.errors import InputError, MismatchError
from fedlora_kernels.linalg import update_gram, weighted_sum
from fedlora_kernels.methods.contract import Census, Group, Memory, Method, Outcome, Pair, Previous, Survey, register
from fedlora_kernels.methods.factors import FAR, GRAM_ERROR, chunked, chunks, require_equal_ranks, rounded
from fedlora_kernels.methods.layers import layers_of
from fedlora_kernels.methods.robust import NOISE
from fedlora_kernels.methods.tree import LINKAGES, choose_cuts, merge_tree
from fedlora_kernels.methods.tree import cut as cut_tree
from fedlora_kernels.methods.tree_plan import TreePlan, quoted

__all__ = ["FedTree"]

METRICS = ("frobenius", "cosine", "product")
FACTORS = ("cluster_B", "cluster_A", "outside_B", "outside_A")
START_LAM = 0.5
"""Share of the cluster pair until a client reports its own."""
SAME = 4 * U64
"""Distance, relative to the norms, that folding one scale two ways (0.3 B or 0.1 (3 B)) may leave between equal clients."""


@register
@dataclass(frozen=True)
class FedTree(Method):
    """Personal pairs ``B = [lam B_clus | (1 - lam) B_ext]``, ``A = [A_clus ; A_ext]``: shallow layers shared by many, deep by few.

    Means are uniform over the clients that are present: B_clus, A_clus over the client's cluster in the layer, B_ext, A_ext over
    all other clients. Round 0 settles the clusters: a merge tree on the mean over layers of the distances between clients, cut
    per layer by the silhouette. Later rounds keep them. A cluster, or the outside of one, of which nobody is present keeps its
    last means. Where a layer has one cluster nobody is outside: lam is 1 there and the pair has rank r instead of 2r.

    ``lam`` comes from ``client_state``: for each client a number, or numbers by module or layer; unreported, it stays at what
    it was, at first 0.5. Distances are those of the folded B, so that clients that turn their factors may change the tree; it
    stands on a common initialisation of A. Clients that lack a module are refused.

    Linkage, ties, defaults, the static tree, layers by the first integer of the name and all of a layer's matrices side by side
    are our reading; the paper leaves them open.

    Attributes:
        min_silhouette: what the best partition must exceed before the first split.
        window: at most ``window - 1`` more clusters per layer.
        linkage: "average", "complete" or "single".
        metric: "frobenius", ``|B_i - B_j|_F``; "cosine", ``1 - cos(B_i, B_j)``; "product", ``|D_i - D_j|_F``, which no gauge changes.
    """

    name: ClassVar[str] = "fedtree"
    summary: ClassVar[str] = "mean pair of a client's cluster and of all others, mixed per client"
    exact: ClassVar[str] = "not applicable (personal pair)"
    broadcast: ClassVar[str] = "cluster pair + external pair"
    download: ClassVar[str] = "2r(m+n)"
    streams: ClassVar[bool] = True
    equal_ranks: ClassVar[bool] = True
    reads_previous: ClassVar[str | None] = "state"
    needs_previous: ClassVar[bool] = True
    uses_weights: ClassVar[bool] = False
    takes_client_state: ClassVar[bool] = True
    needs_decision: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("personal", "state")

    min_silhouette: float = 0.3
    window: int = 3
    linkage: Literal["average", "complete", "single"] = "average"
    metric: Literal["frobenius", "cosine", "product"] = "frobenius"

    def __post_init__(self) -> None:
        found = self.min_silhouette
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            raise InputError(f"fedtree: min_silhouette is {self.min_silhouette!r}; a finite number is needed")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise InputError(f"fedtree: window is {self.window!r}; a whole number of at least 1 is needed")
        for option, choice, choices in (("linkage", self.linkage, LINKAGES), ("metric", self.metric, METRICS)):
            if choice not in choices:
                raise InputError(f"fedtree: {option} is {choice!r}; one of {', '.join(choices)} is needed")

    def surveys(self, memory: Memory | None) -> bool:
        """Only the round that settles the tree looks at all data first."""
        return memory is None

    def needs_gram(self) -> bool:
        """Distances of updates come from their inner products."""
        return self.metric == "product"

    def survey(self, group: Group) -> Survey | None:
        """Per module (N, K, K) float64 of folded B: squared distances, from differences, or inner products for "cosine"."""
        if self.metric == "product":
            return None
        require_equal_ranks(group, self.name)
        return Survey({self.metric: _compared(group, self.metric).numpy()})

    def decide(self, stats: Mapping[str, np.ndarray], census: Census) -> TreePlan:
        """Cluster and cut, or recall what was settled, and take in the shares that clients report.

        Raises InputError for a client that lacks a module or is not in the tree, for a module that is not, and for shares outside
        [0, 1].
        """
        _require_owners(census)
        if census.memory is None:
            plan = self._settled(stats, census)
        else:
            plan = TreePlan.recall(census.memory).attended(census.clients, census.modules)
        return plan.reported(census.client_state)

    def remember(self, plan: TreePlan) -> Memory:
        """Clusters and shares of the whole federation, by name."""
        return plan.memory()

    def describe(self, plan: TreePlan, clients: Sequence[str]) -> dict[str, Any]:
        """Number of clusters and their clients, by layer; shares of the clients that are present, by module."""
        clusters = {}
        for layer, labels in zip(plan.layers, plan.labels, strict=True):
            members = [np.flatnonzero(labels == c).tolist() for c in range(int(labels.max()) + 1)]
            clusters[layer] = [[plan.clients[k] for k in cluster] for cluster in members]
        lam = {
            client: dict(zip(plan.modules, plan.lam[:, k].tolist(), strict=True))
            for client, k in zip(clients, plan.present, strict=True)
        }
        return {"cuts": dict(zip(plan.layers, plan.cuts.tolist(), strict=True)), "clusters": clusters, "lam": lam}

    def combine(self, group: Group, plan: TreePlan, previous: Previous | None) -> Outcome:
        """Combine one group; a client of weight 0 in a module counts as absent there.

        Raises MismatchError where ranks differ, or where a mean to be kept has another shape, InputError where there is none.
        """
        require_equal_ranks(group, self.name)
        kept = {} if previous is None else dict(zip(group.modules, previous.state, strict=False))
        return chunked(group, lambda part: _combined(part, plan, kept))

    def _settled(self, stats: Mapping[str, np.ndarray], census: Census) -> TreePlan:
        layers, layer = layers_of(census.modules)
        K, L = len(census.clients), len(census.modules)
        with np.errstate(over="ignore", invalid="ignore"):  # what leaves float64 is refused by name below
            compared = census.gram if self.metric == "product" else stats[self.metric]
            assert compared is not None
            assert compared.shape == (L, K, K), "the survey is not that of the clients of the census"
            summed = np.zeros((len(layers), K, K))
            # module by module: a survey of many clients may lie in a file
            for row, values in zip(layer, compared, strict=True):
                summed[row] += _product_squares(values) if self.metric == "product" else values
            distances = _cosine_distances(summed) if self.metric == "cosine" else np.sqrt(summed)
        _require_finite(distances, layers, census.clients)
        merges = merge_tree(distances.mean(0), self.linkage) if layers else np.empty((K - 1, 2), dtype=np.int64)
        cuts = choose_cuts(distances, merges, self.min_silhouette, self.window)
        labels = np.array([cut_tree(merges, int(c)) for c in cuts], dtype=np.int64).reshape(len(layers), K)
        return TreePlan(
            tuple(census.clients),
            tuple(census.modules),
            layers,
            layer,
            labels,
            np.full((L, K), START_LAM),
            np.arange(K),
        )


def _compared(group: Group, metric: str) -> Tensor:
    """Squared distances, or inner products, of the folded B of all clients, (N, K, K) float64 on the host."""
    if 0 in group.ranks:
        return torch.cat([_from_differences(group.part(*bounds), metric) for bounds in chunks(group)])
    inner = _inner_products(group)
    if metric == "cosine":
        return inner
    size = inner.diagonal(dim1=1, dim2=2)
    sums = size[:, :, None] + size[:, None, :]
    squares = sums - 2.0 * inner
    far = squares > FAR * 4 * GRAM_ERROR * sums
    far.diagonal(dim1=1, dim2=2)[:] = True
    squares.diagonal(dim1=1, dim2=2)[:] = 0.0
    # where inner products cancel, or are not finite
    for i in (~(far & torch.isfinite(squares)).flatten(1).all(1)).nonzero()[:, 0].tolist():
        squares[i] = _from_differences(group.part(i, i + 1), metric)[0]
    return squares


def _inner_products(group: Group) -> Tensor:
    """Inner products of the folded B, (N, K, K): those of updates ``B_k 1`` of one column."""
    columns = [block.reshape(group.batch, -1, 1) for block in group.B]
    one = torch.ones(group.batch, 1, 1, device=group.device)
    options: dict[str, Any] = {"weights": group.scale, "check": False, "backend": group.backend}
    gram: Tensor = update_gram(columns, [one] * len(columns), **options).cpu()
    return gram


def _from_differences(group: Group, metric: str) -> Tensor:
    """The same without cancellation, of a few modules: in float64, and squared distances from differences."""
    scale = group.scale.to(group.device)[:, :, None]
    r = max(group.ranks)  # a block of no columns, of a client that `decide` refuses by name, counts as zero
    blocks = [pad(block.to(torch.float64), (0, r - block.shape[-1])) for block in group.B]
    B = torch.stack([block.flatten(1) for block in blocks], 1) * scale
    if metric == "cosine":
        return (B @ B.mT).cpu()
    distance = torch.cdist(B, B, compute_mode="donot_use_mm_for_euclid_dist")
    norm = torch.linalg.vector_norm(B, dim=2)
    apart = distance > SAME * (norm[:, :, None] + norm[:, None, :])
    return torch.where(apart | ~torch.isfinite(distance), distance.square(), 0.0).cpu()


def _product_squares(gram: np.ndarray) -> np.ndarray:
    """``|D_i - D_j|_F^2`` (K, K) from inner products, 0 where it is rounding: noise has silhouettes too."""
    squares = gram.diagonal()
    sums = squares[:, None] + squares[None, :]
    apart: np.ndarray = sums - (gram + gram.T)
    return np.where(apart < NOISE * sums, 0.0, apart)


def _cosine_distances(inner: np.ndarray) -> np.ndarray:
    """``1 - cos`` (layers, K, K), 0 where it is rounding; 0 between two zeros, 1 between a zero and another."""
    norm = np.sqrt(np.einsum("lkk->lk", inner))
    zero = norm == 0.0
    unit = inner / np.where(zero, 1.0, norm)[:, :, None] / np.where(zero, 1.0, norm)[:, None, :]
    distance = 1.0 - (unit + unit.swapaxes(1, 2)) / 2.0
    distance[zero[:, :, None] & zero[:, None, :]] = 0.0
    return np.where(distance < NOISE, 0.0, distance)


def _require_owners(census: Census) -> None:
    for i, k in np.argwhere(np.asarray(census.ranks) == 0).tolist():
        raise InputError(
            f"client {quoted(census.clients[k])}, module {quoted(census.modules[i])}: the client lacks it; method 'fedtree' "
            "compares clients layer by layer and needs every module in every client. Leave the client or the module out"
        )


def _require_finite(distances: np.ndarray, layers: Sequence[str], clients: Sequence[str]) -> None:
    for i, j, k in np.argwhere(~np.isfinite(distances)).tolist():
        raise InputError(
            f"client {quoted(clients[j])}, layer {quoted(layers[i])}: its distance from client {quoted(clients[k])} is no finite "
            "number; method 'fedtree' needs factors whose squares stay within float64. Rescale or leave the client out"
        )


class _Means(NamedTuple):
    """Means of one factor, (N, C, p, q) float64: of each cluster, and of all clients outside of it."""

    cluster: Tensor
    outside: Tensor


def _combined(group: Group, plan: TreePlan, kept: Mapping[str, Mapping[str, Tensor]]) -> Outcome:
    layer = plan.layer[[plan.row[module] for module in group.modules]]
    cuts = torch.from_numpy(plan.cuts[layer])
    labels = torch.from_numpy(plan.labels[layer][:, plan.present])
    there = (group.weight != 0.0).to(torch.float64)
    count = torch.zeros(group.batch, int(cuts.max()), dtype=torch.float64).scatter_add_(1, labels, there)
    total = count.sum(1, keepdim=True)
    share = there / total.clamp(min=1.0)
    B = _means(group.B, share * group.scale, labels, count, group.backend)
    A = _means(group.A, share, labels, count, group.backend)
    real = torch.arange(count.shape[1]) < cuts[:, None]
    _restore(group.modules, B.cluster, A.cluster, (count == 0) & real, kept, "cluster")
    _restore(group.modules, B.outside, A.outside, (count == total) & real & (cuts > 1)[:, None], kept, "outside")
    made = [rounded(group, mean.flatten(1, 2)) for mean in (B.cluster, A.cluster, B.outside, A.outside)]
    info = functools.reduce(torch.bitwise_or, (sums.info.cpu() for sums in made))
    zero = (made[0].notes | made[1].notes).cpu() & int(Note.ZERO)
    C = count.shape[1]
    means = {name: sums.sum.unflatten(1, (C, -1)) for name, sums in zip(FACTORS, made, strict=True)}
    unknown = torch.full((group.batch,), math.nan, dtype=torch.float64)
    lam = torch.from_numpy(plan.lam[[plan.row[module] for module in group.modules]][:, plan.present])
    personal = [_mixed(B, A, labels[:, k], lam[:, k], cuts, group.dtype) for k in range(len(group.B))]
    return Outcome(
        B=None,
        A=None,
        rank=None,
        error=unknown,
        error_bound=unknown,
        notes=zero,
        info=info,
        personal=tuple(personal),
        state=tuple(_state_of(means, i, c) for i, c in enumerate(cuts.tolist())),
    )


def _means(blocks: Sequence[Tensor], share: Tensor, labels: Tensor, count: Tensor, backend: str) -> _Means:
    """Means of ``blocks``, K times (N, p, q), within each cluster and outside of it; 0 where nobody is.

    ``share`` (N, K) is 1 / (number of present clients), the scale times it, or 0; ``count`` (N, C) float64 are the present members.
    Sums run in client order; those outside are sums of the other clusters' sums, never the whole less one.
    """
    device, clusters = blocks[0].device, range(count.shape[1])
    options: dict[str, Any] = {"dtype": torch.float64, "check": False, "backend": backend}
    of_cluster = [weighted_sum(list(blocks), weights=share * (labels == c), **options).sum for c in clusters]
    sums = torch.stack(of_cluster, 1)
    others = torch.zeros_like(sums)
    for order in (clusters, reversed(clusters)) if len(clusters) > 1 else ():
        running = torch.zeros_like(sums[:, 0])
        for c in order:
            others[:, c] += running
            running += sums[:, c]
    total = count.sum(1, keepdim=True)
    inside = total / count.clamp(min=1.0)
    outside = total / (total - count).clamp(min=1.0)
    return _Means(sums * inside.to(device)[:, :, None, None], others * outside.to(device)[:, :, None, None])


def _restore(
    modules: Sequence[str], B: Tensor, A: Tensor, lacking: Tensor, kept: Mapping[str, Mapping[str, Tensor]], which: str
) -> None:
    """Put the last means where nobody is present: ``lacking`` (N, C) of B (N, C, m, r) and A (N, C, r, n)."""
    for i, c in lacking.nonzero().tolist():
        for name, mean in ((f"{which}_B", B), (f"{which}_A", A)):
            last = kept.get(modules[i], {}).get(name)
            if last is None or c >= len(last):
                raise InputError(
                    f"module {quoted(modules[i])}: no client {'of' if which == 'cluster' else 'outside of'} cluster {c} is present, "
                    "and previous holds no mean of them; give the result of the round before as previous="
                )
            if last.shape[1:] != mean.shape[2:]:
                shapes = " x ".join(map(str, last.shape[1:])), " x ".join(map(str, mean.shape[2:]))
                raise MismatchError(
                    f"module {quoted(modules[i])}: the {name} kept is {shapes[0]}, this round's are {shapes[1]}; method 'fedtree' "
                    "needs one shape and one rank in all rounds"
                )
            mean[i, c] = last[c].to(mean)


def _mixed(B: _Means, A: _Means, label: Tensor, lam: Tensor, cuts: Tensor, dtype: torch.dtype) -> Pair:
    """The pair of one client in N modules; ``label``, ``lam`` (N,) are its cluster and share, ``cuts`` (N,) the clusters there are."""
    device = B.cluster.device
    every, own = torch.arange(len(label), device=device), label.to(device)
    share = lam.to(device)[:, None, None]
    r = B.cluster.shape[-1]
    if int(cuts.max()) == 1:
        left, right = B.cluster[every, own] * share, A.cluster[every, own]
    else:
        left = torch.cat([B.cluster[every, own] * share, B.outside[every, own] * (1.0 - share)], 2)
        right = torch.cat([A.cluster[every, own], A.outside[every, own]], 1)
    return Pair(left.to(dtype), right.to(dtype), torch.where(cuts > 1, 2 * r, r))


def _state_of(means: Mapping[str, Tensor], i: int, clusters: int) -> dict[str, Tensor]:
    """The means of module i; those outside only where there is more than one cluster."""
    names: Iterable[str] = means if clusters > 1 else ("cluster_B", "cluster_A")
    return {name: means[name][i, :clusters] for name in names}
