"""Agglomerative clustering, its cuts and silhouettes, against SciPy and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_samples, silhouette_score

from fedlora_kernels.methods.tree import LINKAGES, choose_cuts, cut, merge_tree, silhouette

seeds = st.integers(0, 2**32 - 1)
exact = settings(derandomize=True, deadline=None, max_examples=30)


def distances(N, seed=0, groups=0):
    """Euclidean distances of N points in the plane, around ``groups`` centres."""
    made = np.random.default_rng(seed)
    points = made.standard_normal((N, 2))
    if groups:
        points += 6.0 * made.standard_normal((groups, 2))[np.arange(N) % groups]
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def same(labels, others):
    """Whether two labellings are one partition."""
    return np.array_equal(labels[:, None] == labels, others[:, None] == others)


@exact
@given(N=st.integers(2, 40), seed=seeds, method=st.sampled_from(LINKAGES))
def test_cuts_match_an_independent_implementation(N, seed, method):
    D = distances(N, seed, groups=seed % 4)
    merges = merge_tree(D, method)
    theirs = linkage(squareform(D, checks=False), method)
    for c in range(1, N + 1):
        assert same(cut(merges, c), cut_tree(theirs, n_clusters=c)[:, 0])


@pytest.mark.full
@pytest.mark.parametrize("method", LINKAGES)
def test_cuts_of_hundreds_of_clients_match_an_independent_implementation(method):
    D = distances(400, 3, groups=9)
    merges, theirs = merge_tree(D, method), linkage(squareform(D, checks=False), method)
    for c in (1, 2, 9, 50, 399, 400):
        assert same(cut(merges, c), cut_tree(theirs, n_clusters=c)[:, 0])


@exact
@given(N=st.integers(1, 25), seed=seeds)
def test_partitions_are_nested(N, seed):
    merges = merge_tree(distances(N, seed))
    for c in range(1, N):
        coarse, fine = cut(merges, c), cut(merges, c + 1)
        assert fine.max() + 1 == c + 1
        assert all(len(set(coarse[fine == label])) == 1 for label in range(c + 1))


def test_clusters_are_numbered_by_their_lowest_members():
    D = np.abs(np.subtract.outer([9.0, 0.0, 9.1, 0.1, 20.0], [9.0, 0.0, 9.1, 0.1, 20.0]))
    np.testing.assert_array_equal(cut(merge_tree(D), 3), [0, 1, 0, 1, 2])
    np.testing.assert_array_equal(cut(merge_tree(D), 1), [0, 0, 0, 0, 0])


@pytest.mark.parametrize("method", LINKAGES)
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-300, 7e200])
def test_ties_go_to_the_lowest_members_and_rounding_breaks_none(method, value):
    D = np.full((9, 9), value)
    np.testing.assert_array_equal(merge_tree(D, method), [(0, b) for b in range(1, 9)])


def test_the_tree_leaves_its_input_alone():
    D = distances(6)
    kept = D.copy()
    merge_tree(D)
    np.testing.assert_array_equal(D, kept)


@exact
@given(N=st.integers(3, 30), seed=seeds)
def test_relabelling_points_relabels_the_cuts(N, seed):
    D = distances(N, seed)
    order = np.random.default_rng(seed).permutation(N)
    merges, moved = merge_tree(D), merge_tree(D[np.ix_(order, order)])
    for c in range(1, N + 1):
        assert same(cut(merges, c)[order], cut(moved, c))


@exact
@given(N=st.integers(3, 40), seed=seeds)
def test_silhouette_matches_an_independent_implementation(N, seed):
    D = distances(N, seed, groups=3)
    merges = merge_tree(distances(N, seed + 1))
    for c in range(2, N):
        assert silhouette(D, cut(merges, c)) == pytest.approx(
            silhouette_score(D, cut(merges, c), metric="precomputed"), abs=1e-13
        )


def test_singletons_have_silhouette_zero():
    D = distances(4)
    assert silhouette(D, np.array([0, 1, 2, 3])) == 0.0
    labels = np.array([0, 0, 0, 1])
    assert silhouette(D, labels) == pytest.approx(silhouette_samples(D, labels, metric="precomputed")[:3].sum() / 4)


def test_distances_of_zero_have_silhouette_zero():
    assert silhouette(np.zeros((5, 5)), np.array([0, 0, 1, 1, 1])) == 0.0


def wanted_cuts(layers, merges, min_silhouette, window):
    """The definition, word for word, with scikit-learn's silhouette."""
    N, c, cuts = len(merges) + 1, 1, []
    for D in layers:
        omega = [k for k in range(1, N + window) if c <= k < min(N, c + window)] or [c]
        phi = {
            k: min_silhouette if k == 1 else silhouette_score(D, cut(merges, k), metric="precomputed") for k in omega
        }
        c = max(omega, key=lambda k, phi=phi: (phi[k], -k))
        cuts.append(c)
    return cuts


@exact
@given(
    N=st.integers(2, 20),
    L=st.integers(1, 6),
    seed=seeds,
    window=st.integers(1, 5),
    min_silhouette=st.floats(-1.0, 1.0, allow_nan=False),
)
def test_cuts_follow_the_definition_and_its_bounds(N, L, seed, window, min_silhouette):
    layers = np.stack([distances(N, seed + i, groups=1 + i) for i in range(L)])
    merges = merge_tree(layers.mean(0))
    cuts = choose_cuts(layers, merges, min_silhouette, window)
    assert cuts.tolist() == wanted_cuts(layers, merges, min_silhouette, window)
    steps = np.diff(np.concatenate([[1], cuts]))
    assert (steps >= 0).all()
    assert (steps <= window - 1).all()
    assert cuts.min() >= 1
    assert cuts.max() <= max(1, N - 1)


@exact
@given(N=st.integers(3, 20), window=st.integers(2, 5), seed=seeds)
def test_the_lowest_min_silhouette_splits_in_the_first_layer(N, window, seed):
    layers = np.stack([distances(N, seed + i) for i in range(3)])
    assert choose_cuts(layers, merge_tree(layers.mean(0)), -1.0, window)[0] >= 2


@pytest.mark.parametrize(("min_silhouette", "window"), [(1.0, 3), (2.5, 9), (-1.0, 1), (0.3, 1)])
def test_min_silhouette_of_one_or_window_one_never_splits(min_silhouette, window):
    D = np.kron(1.0 - np.eye(2), np.ones((4, 4)))  # two groups, silhouette 1
    assert choose_cuts([D] * 4, merge_tree(D), min_silhouette, window).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("N", [1, 2])
def test_one_or_two_points_are_one_cluster_for_ever(N):
    D = distances(N)
    assert choose_cuts([D] * 3, merge_tree(D), -1.0, 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("min_silhouette", "cuts"), [(0.0, [1, 1]), (0.3, [1, 1]), (-0.1, [2, 2])])
def test_identical_points_stay_one_cluster(min_silhouette, cuts):
    D = np.zeros((6, 6))
    assert choose_cuts([D, D], merge_tree(D), min_silhouette, 3).tolist() == cuts


def test_two_groups_split_in_the_first_layer_that_shows_them():
    groups = np.kron(1.0 - np.eye(2), np.ones((3, 3)))
    layers = [np.zeros((6, 6)), np.zeros((6, 6)), groups, groups]
    assert choose_cuts(layers, merge_tree(np.mean(layers, 0)), 0.3, 3).tolist() == [1, 1, 2, 2]


def test_min_silhouette_acts_only_before_the_first_split():
    """From two clusters on the best partition counts, however poor."""
    groups = np.kron(1.0 - np.eye(2), np.ones((3, 3)))
    noise = distances(6, 4)
    layers = [groups, noise]
    merges = merge_tree(groups + 1e-3 * noise)
    scores = [silhouette(noise, cut(merges, c)) for c in (2, 3, 4)]
    assert max(scores) < 0.9
    assert choose_cuts(layers, merges, 0.9, 3).tolist() == [2, 2 + int(np.argmax(scores))]


def test_silhouettes_that_only_rounding_parts_go_to_fewer_clusters():
    """Two clusters of equal distances: three clusters differ from two by rounding alone."""
    D = np.full((3, 3), 0.1) - 0.1 * np.eye(3)
    np.testing.assert_array_equal(choose_cuts([D, D, D], merge_tree(D), -1.0, 3), [2, 2, 2])
    near = np.zeros((4, 4))
    assert choose_cuts([near], merge_tree(near), -5e-13, 3).tolist() == [1]
