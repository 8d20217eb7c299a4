"""Agglomerative clustering: one merge tree, its nested partitions, and a cut of it for every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["LINKAGES", "choose_cuts", "cut", "merge_tree", "silhouette"]

LINKAGES = ("average", "complete", "single")
TIE = 1e-12
"""Distances, relative, and silhouettes closer than this are tied: far above what rounding does to either, so that equal
clients are merged, and layers are cut, alike on every machine."""


def merge_tree(distance: np.ndarray, linkage: str = "average") -> np.ndarray:
    """Merges of agglomerative clustering, (N - 1, 2) int64, in the order they are made.

    Each step joins the two closest clusters (a, b), a < b, named by their lowest members; ties go to the lowest a, then b. The
    distance of two clusters is the mean of all pairwise distances ("average"), the largest ("complete") or the smallest
    ("single"). O(N^3) comparisons, N array operations.

    Args:
        distance: (N, N) float64, symmetric, finite, at least 0.
        linkage: one of `LINKAGES`.
    """
    N = len(distance)
    between = np.array(distance, dtype=np.float64)
    np.fill_diagonal(between, np.inf)
    size = np.ones(N)
    merges = np.empty((max(0, N - 1), 2), dtype=np.int64)
    for step in range(N - 1):
        # the first in row order is the lowest a with its lowest b
        a, b = divmod(int(np.argmax(between <= between.min() * (1.0 + TIE))), N)
        merges[step] = a, b
        if linkage == "average":
            joined = (size[a] * between[a] + size[b] * between[b]) / (size[a] + size[b])
        else:
            joined = (np.maximum if linkage == "complete" else np.minimum)(between[a], between[b])
        between[a] = between[:, a] = joined
        between[b] = between[:, b] = np.inf
        between[a, a] = np.inf
        size[a] += size[b]
    return merges


def cut(merges: np.ndarray, clusters: int) -> np.ndarray:
    """Labels (N,) int64 of the partition into ``clusters``: the state after N - ``clusters`` merges.

    Clusters are numbered by their lowest members. Each partition refines those of fewer clusters.
    """
    N = len(merges) + 1
    lowest = np.arange(N)
    for a, b in merges[: N - clusters]:
        lowest[lowest == b] = a
    labels: np.ndarray = np.unique(lowest, return_inverse=True)[1].astype(np.int64)
    return labels


def silhouette(distance: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette of a partition under ``distance`` (N, N); ``labels`` (N,) run from 0 to c - 1, c >= 2.

    ``(b - a) / max(a, b)`` of each point, a its mean distance to the other members of its cluster, b the smallest mean distance
    to another cluster; 0 for a point alone in its cluster, and where a = b = 0.
    """
    member = labels[:, None] == np.arange(labels.max() + 1)
    size = member.sum(0)
    sums = distance @ member
    own = sums[member] / np.maximum(size[labels] - 1, 1)
    other = np.where(member, np.inf, sums / size).min(1)
    largest = np.maximum(own, other)
    flat = (size[labels] == 1) | (largest == 0.0)
    values = np.where(flat, 0.0, (other - own) / np.where(flat, 1.0, largest))
    return float(values.mean())


def choose_cuts(
    distances: Sequence[np.ndarray] | np.ndarray, merges: np.ndarray, min_silhouette: float, window: int
) -> np.ndarray:
    """Number of clusters of each layer, (L,) int64, from shallow to deep; it never falls.

    ``c_l`` is the best of ``c_{l-1} <= c < min(N, c_{l-1} + window)``, with c_0 = 1: the partition of largest mean silhouette under
    the distances of the layer, where one cluster counts ``min_silhouette``; ties go to the fewest clusters.

    Args:
        distances: (L, N, N) float64, those of each layer.
        merges: of `merge_tree`.
        min_silhouette: what the best partition must exceed before the first split.
        window: at most ``window - 1`` clusters are added per layer.
    """
    N = len(merges) + 1
    cuts = np.ones(len(distances), dtype=np.int64)
    c = 1
    for layer, distance in enumerate(distances):
        candidates = range(c, max(c + 1, min(N, c + window)))
        scores = [min_silhouette if k == 1 else silhouette(distance, cut(merges, k)) for k in candidates]
        c = next(k for k, score in zip(candidates, scores, strict=True) if score >= max(scores) - TIE)
        cuts[layer] = c
    return cuts
