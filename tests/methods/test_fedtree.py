"""FedTreeLoRA: clusters per layer from one tree, means within and outside of them, mixed per client."""

import dataclasses
import json
import reprlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_problems import distance

from fedlora_kernels.backends.contract import Info, Note
from fedlora_kernels.errors import InputError, MismatchError
from fedlora_kernels.methods import factors
from fedlora_kernels.methods.contract import Census, Group, Memory, Previous, make_method
from fedlora_kernels.methods.factors import client_gram
from fedlora_kernels.methods.tree import cut, merge_tree, silhouette
from fedlora_kernels.methods.tree_plan import TreePlan, experts

BACKENDS = ("torch", "reference", "auto")
METRICS = ("frobenius", "cosine", "product")
SHAPES = {"q_proj": (9, 7), "v_proj": (6, 7)}
MODULES = {**{f"model.layers.{i}.{name}": SHAPES[name] for i in range(4) for name in SHAPES}, "lm_head": (9, 7)}


@dataclass
class Round:
    """What a round left."""

    plan: TreePlan
    memory: Memory
    personal: dict  # (client, module) -> (B, A), cut to rank, float64
    tensors: dict = field(default_factory=dict)
    outcomes: list = field(default_factory=list)
    round: int = 0


@dataclass
class Federation:
    """Factors of K clients in several modules, ``B[module][k]``, and rounds of them as the engine would run them."""

    B: dict
    A: dict
    scale: list
    names: list

    def only(self, *keep) -> "Federation":
        B, A = ({name: [blocks[k] for k in keep] for name, blocks in factor.items()} for factor in (self.B, self.A))
        return Federation(B, A, [self.scale[k] for k in keep], [self.names[k] for k in keep])

    def groups(self, dtype=torch.float64, weight=None, backend="torch", number=0):
        by_shape = {}
        for module, blocks in self.B.items():
            by_shape.setdefault((blocks[0].shape[0], self.A[module][0].shape[1]), []).append(module)
        K = len(self.names)
        for (m, n), modules in by_shape.items():
            yield Group(
                modules=tuple(modules),
                kind="linear",
                m=m,
                n=n,
                B=tuple(torch.stack([self.B[module][k] for module in modules]) for k in range(K)),
                A=tuple(torch.stack([self.A[module][k] for module in modules]) for k in range(K)),
                scale=torch.tensor([self.scale] * len(modules), dtype=torch.float64),
                weight=torch.full((len(modules), K), 1.0 / K, dtype=torch.float64)
                if weight is None
                else weight(modules),
                clients=tuple(range(K)),
                dtype=dtype,
                backend=backend,
                round=number,
            )

    def run(self, last=None, client_state=None, dtype=torch.float64, weight=None, backend="torch", **options) -> Round:
        method = make_method("fedtree", options)
        number = 0 if last is None else last.round + 1
        groups = list(self.groups(dtype, weight, backend, number))
        memory = None if last is None else last.memory
        stats, gram = {}, None
        if method.surveys(memory):
            order = {module: i for i, module in enumerate(self.B)}
            for group in groups:
                rows = [order[module] for module in group.modules]
                if method.needs_gram():
                    gram = np.zeros((len(order), *[len(self.names)] * 2)) if gram is None else gram
                    gram[rows] = client_gram(group).numpy()
                survey = method.survey(group)
                for name, values in (survey.stats if survey else {}).items():
                    stats.setdefault(name, np.zeros((len(order), *values.shape[1:])))[rows] = values
        census = Census(
            modules=tuple(self.B),
            clients=tuple(self.names),
            gram=gram,
            ranks=np.array([[block.shape[1] for block in blocks] for blocks in self.B.values()]),
            weight=np.full(len(self.names), 1.0 / len(self.names)),
            shapes=np.array([(9, 7)] * len(self.B)),
            round=number,
            memory=memory,
            client_state=client_state,
        )
        plan = method.decide(stats, census)
        result = Round(plan, method.remember(plan), {}, round=number)
        for group in groups:
            previous = None
            if last is not None:
                state = [
                    {key.rpartition(".")[2]: x for key, x in last.tensors.items() if key.rpartition(".")[0] == module}
                    for module in group.modules
                ]
                previous = Previous(round=last.round, state=tuple(state))
            outcome = method.combine(group, plan, previous)
            result.outcomes.append(outcome)
            for i, module in enumerate(group.modules):
                result.tensors.update({f"{module}.{name}": x for name, x in outcome.state[i].items()})
                for k, name in enumerate(self.names):
                    pair = outcome.personal[k]
                    p = int(pair.rank[i])
                    assert not pair.B[i, :, p:].any()
                    result.personal[name, module] = pair.B[i, :, :p].double(), pair.A[i, :p].double()
        return result

    def folded(self, module):
        return [s * b.double() for s, b in zip(self.scale, self.B[module], strict=True)]

    def mean(self, module, members):
        """Dense means of B, folded, and A over clients."""
        B = sum(self.folded(module)[k] for k in members) / len(members)
        return B, sum(self.A[module][k].double() for k in members) / len(members)


def federation(K=7, r=3, seed=0, modules=MODULES, dtype=torch.float64, groups=0, scale=None, shared=0) -> Federation:
    """Random clients; ``groups`` make them vary around so many centres from layer ``shared`` on."""
    made = torch.Generator().manual_seed(seed)
    B, A = {}, {}
    for module, (m, n) in modules.items():
        centres = 5.0 * torch.randn(max(1, groups), m, r, generator=made, dtype=torch.float64)
        depth = int(module.split(".")[2]) if "layers" in module else 99
        near = [centres[k % groups if groups and depth >= shared else 0] for k in range(K)]
        B[module] = [(c + torch.randn(m, r, generator=made, dtype=torch.float64)).to(dtype) for c in near]
        start = torch.randn(r, n, generator=made, dtype=torch.float64)  # all train from one A
        A[module] = [(start + 0.2 * torch.randn(r, n, generator=made, dtype=torch.float64)).to(dtype) for _ in range(K)]
    return Federation(B, A, [1.0] * K if scale is None else list(scale), [f"c{k}" for k in range(K)])


def clusters_of(round_, module):
    """Members of each cluster in a module."""
    labels = round_.plan.labels[round_.plan.layer[round_.plan.row[module]]]
    return [np.flatnonzero(labels == c).tolist() for c in range(labels.max() + 1)]


LAYERS = [*([f"model.layers.{i}.{name}" for name in SHAPES] for i in range(4)), ["lm_head"]]


# the tree


def dense_distances(fed, metric):
    """Distances by layer, each pair of clients on its own, densely."""
    K = len(fed.names)
    layers = []
    for modules in LAYERS:
        D = np.zeros((K, K))
        for i in range(K):
            for j in range(i):
                if metric == "product":
                    x, y = (
                        torch.cat([(fed.folded(name)[k] @ fed.A[name][k].double()).flatten() for name in modules])
                        for k in (i, j)
                    )
                else:
                    x, y = (torch.cat([fed.folded(name)[k].flatten() for name in modules]) for k in (i, j))
                cosine = 1.0 - float(torch.nn.functional.cosine_similarity(x, y, dim=0, eps=0.0))
                D[i, j] = D[j, i] = cosine if metric == "cosine" else float(torch.linalg.norm(x - y))
        layers.append(D)
    return np.stack(layers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_tree_is_that_of_the_dense_distances(metric, dtype, backend):
    fed = federation(K=9, groups=3, shared=2, dtype=dtype, scale=[1.0, 2.0, 0.5] * 3)
    D = dense_distances(fed, metric)
    merges = merge_tree(D.mean(0))
    plan = fed.run(dtype=torch.float32, metric=metric, backend=backend).plan
    c = 1
    for layer, wanted in zip(plan.labels, D, strict=True):
        omega = range(c, max(c + 1, min(9, c + 3)))
        phi = [0.3 if k == 1 else silhouette(wanted, cut(merges, k)) for k in omega]
        c = omega[int(np.argmax(phi))]
        np.testing.assert_array_equal(layer, cut(merges, c))
    assert len(set(plan.cuts)) > 1


def test_the_survey_holds_distances_from_differences():
    """Two clients that differ by 1e-9: inner products in float64 would not see it."""
    fed = federation(K=3)
    for module in fed.B:
        fed.B[module][1] = fed.B[module][0] * (1.0 + 1e-9)
    group = next(fed.groups())
    squares = make_method("fedtree", {}).survey(group).stats["frobenius"]
    for i, module in enumerate(group.modules):
        wanted = float(torch.linalg.norm(fed.B[module][0] - fed.B[module][1]))
        assert np.sqrt(squares[i, 0, 1]) == pytest.approx(wanted, rel=1e-12)


def test_scale_is_folded_before_clients_are_compared():
    fed = federation(K=6, groups=2)
    stretched = dataclasses.replace(fed, scale=[1.0, 2.0, 4.0, 0.5, 8.0, 0.25])
    stretched.B = {name: [b / s for b, s in zip(bs, stretched.scale, strict=True)] for name, bs in fed.B.items()}
    np.testing.assert_array_equal(stretched.run().plan.labels, fed.run().plan.labels)
    group, other = next(fed.groups()), next(stretched.groups())
    for metric in ("frobenius", "cosine"):
        method = make_method("fedtree", {"metric": metric})
        np.testing.assert_array_equal(method.survey(group).stats[metric], method.survey(other).stats[metric])


def test_equal_clients_that_fold_one_scale_differently_are_equal():
    """3 x 0.1 is not 0.3 in float64; the silhouettes of rounding noise would split identical clients."""
    fed = federation(K=6, seed=4)
    for module in fed.B:
        fed.B[module] = [fed.B[module][0] * f for f in (3.0, 1.0, 7.0, 1.0, 1.1, 0.7)]
        fed.A[module] = fed.A[module][:1] * 6
    fed.scale = [0.1, 0.3, 0.3 / 7, 0.3, 0.3 / 1.1, 0.3 / 0.7]
    for metric in METRICS:
        assert fed.run(metric=metric, min_silhouette=0.0).plan.cuts.tolist() == [1] * 5


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("min_silhouette", [0.0, 0.3])
def test_identical_clients_are_one_cluster_and_receive_their_update(metric, min_silhouette):
    one = federation(K=1)
    fed = Federation({m: b * 5 for m, b in one.B.items()}, {m: a * 5 for m, a in one.A.items()}, [2.0] * 5, [*"abcde"])
    result = fed.run(metric=metric, min_silhouette=min_silhouette)
    assert result.plan.cuts.tolist() == [1] * 5
    for (_, module), (B, A) in result.personal.items():
        assert distance(B @ A, 2.0 * one.B[module][0] @ one.A[module][0]) < 1e-14


def test_gauged_copies_of_one_update_are_one_cluster_under_the_product_metric():
    """Distances below what inner products resolve count as 0: noise has silhouettes too."""
    fed = federation(K=6, seed=3)
    made = torch.Generator().manual_seed(1)
    for module in fed.B:
        turns = [torch.randn(3, 3, generator=made, dtype=torch.float64) + 3 * torch.eye(3).double() for _ in range(6)]
        fed.B[module], fed.A[module] = (
            [fed.B[module][0] @ G for G in turns],
            [torch.linalg.solve(G, fed.A[module][0]) for G in turns],
        )
    assert fed.run(metric="product", min_silhouette=0.0).plan.cuts.tolist() == [1] * 5
    assert fed.run(metric="frobenius", min_silhouette=-1.0).plan.cuts.max() > 1


def test_cosine_of_zeros():
    """Two zero matrices are at distance 0, a zero and another at distance 1."""
    fed = federation(K=6)
    for blocks in fed.B.values():
        for k in (0, 2, 4):
            blocks[k] = torch.zeros_like(blocks[k])
        for k in (3, 5):
            blocks[k] = blocks[1] * (k + 0.1)
    plan = fed.run(metric="cosine").plan
    np.testing.assert_array_equal(plan.labels[0], [0, 1, 0, 1, 0, 1])


def test_two_groups_of_identical_B_split_in_the_first_layer_that_shows_them():
    fed = federation(K=6)
    for module, blocks in fed.B.items():
        depth = int(module.split(".")[2]) if "layers" in module else 9
        fed.B[module] = [blocks[k % 2 if depth >= 2 else 0] for k in range(6)]
    for metric in ("frobenius", "cosine"):
        plan = fed.run(metric=metric).plan
        assert plan.cuts.tolist() == [1, 1, 2, 2, 2]
        np.testing.assert_array_equal(plan.labels[2], [0, 1, 0, 1, 0, 1])


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    K=st.integers(1, 9), seed=st.integers(0, 999), window=st.integers(1, 4), lowest=st.sampled_from([-1.0, 0.0, 0.3])
)
def test_cuts_keep_their_bounds_and_partitions_nest_over_depth(K, seed, window, lowest):
    modules = {name: shape for name, shape in MODULES.items() if "q_proj" in name}
    plan = federation(K=K, seed=seed, modules=modules).run(window=window, min_silhouette=lowest).plan
    steps = np.diff(np.concatenate([[1], plan.cuts]))
    assert (steps >= 0).all()
    assert (steps <= window - 1).all()
    assert plan.cuts.max() <= max(1, K - 1)
    for coarse, fine in zip(plan.labels, plan.labels[1:], strict=False):
        assert all(len(set(coarse[fine == label])) == 1 for label in set(fine))
    if lowest == -1.0 and K >= 3 and window >= 2:
        assert plan.cuts[0] >= 2


@pytest.mark.parametrize("metric", METRICS)
def test_relabelling_clients_relabels_the_result(metric):
    fed = federation(K=8, groups=3)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    one, other = fed.run(metric=metric), fed.only(*order).run(metric=metric)
    assert one.plan.cuts.max() > 1
    for labels, moved in zip(one.plan.labels, other.plan.labels, strict=True):
        np.testing.assert_array_equal((labels[:, None] == labels)[np.ix_(order, order)], moved[:, None] == moved)
    for key, (B, A) in one.personal.items():
        assert distance(other.personal[key][0] @ other.personal[key][1], B @ A) < 1e-13


def turned(fed, k, seed=2):
    """Another factorisation of client k's updates: orthogonal, so that norms stay."""
    made = torch.Generator().manual_seed(seed)
    moved = fed.only(*range(len(fed.names)))
    for module in fed.B:
        Q = torch.linalg.qr(torch.randn(3, 3, generator=made, dtype=torch.float64))[0]
        moved.B[module][k], moved.A[module][k] = fed.B[module][k] @ Q, Q.T @ fed.A[module][k]
    return moved


@pytest.mark.parametrize("backend", BACKENDS)
def test_turning_a_client_changes_the_frobenius_tree_and_not_the_product_tree(backend):
    fed = federation(K=6, groups=2, modules={name: shape for name, shape in MODULES.items() if "layers" in name})
    for module in fed.A:  # all from one A, as after a common initialisation
        fed.A[module] = fed.A[module][:1] * 6
    moved = turned(fed, 2)
    plain = [p.run(backend=backend).plan.labels for p in (fed, moved)]
    assert not np.array_equal(*plain)
    gauged = [p.run(backend=backend, metric="product") for p in (fed, moved)]
    np.testing.assert_array_equal(gauged[0].plan.labels, gauged[1].plan.labels)
    np.testing.assert_array_equal(plain[0], gauged[0].plan.labels)
    B, A = gauged[0].personal["c0", "model.layers.0.q_proj"]
    C, E = gauged[1].personal["c0", "model.layers.0.q_proj"]
    assert distance(B @ A, C @ E) > 1e-3, "factor means do change with the gauge"


# means


@pytest.mark.parametrize("options", [{"min_silhouette": 1.0}, {"window": 1}, {"min_silhouette": 7}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_cluster_is_fedit_with_uniform_weights_bitwise(options, dtype):
    fed = federation(groups=2, dtype=dtype, scale=[1.0, 2.0, 3.0, 0.5, 1.0, 7.0, 0.1])
    result = fed.run(dtype=torch.float32, **options)
    assert result.plan.cuts.tolist() == [1] * 5
    for group in fed.groups(torch.float32):
        fedit = make_method("fedit", {}).combine(group, None, None)
        for i, module in enumerate(group.modules):
            for name in fed.names:
                B, A = result.personal[name, module]
                assert torch.equal(B, fedit.B[i].double())
                assert torch.equal(A, fedit.A[i].double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_pairs_are_the_dense_means_of_the_cluster_and_of_all_others(dtype):
    fed = federation(K=7, groups=3, dtype=dtype, shared=1, scale=[1.0, 1.1, 0.9, 1.05, 1.2, 1.0, 0.85])
    state = {"c1": 0.25, "c2": {"1": 0.75, "lm_head": 0.125}}
    result = fed.run(client_state=state)
    seen = set()
    for (name, module), (B, A) in result.personal.items():
        k = fed.names.index(name)
        inside = next(cluster for cluster in clusters_of(result, module) if k in cluster)
        others = [j for j in range(7) if j not in inside]
        lam = float(result.plan.lam[result.plan.row[module], k])
        seen.add((lam, len(inside)))
        own_B, own_A = fed.mean(module, inside)
        if not others:
            assert distance(B, own_B) < 1e-14
            assert distance(A, own_A) < 1e-14
            continue
        out_B, out_A = fed.mean(module, others)
        assert distance(B, torch.cat([lam * own_B, (1.0 - lam) * out_B], 1)) < 1e-14
        assert distance(A, torch.cat([own_A, out_A], 0)) < 1e-14
        stacked = lam * own_B @ own_A + (1.0 - lam) * out_B @ out_A
        assert distance(B @ A, stacked) < 1e-14, "the stacked pair is the weighted sum of both products"
    assert {lam for lam, _ in seen} == {0.5, 0.25, 0.75, 0.125, 1.0}
    assert len({size for _, size in seen}) > 2


def test_cluster_and_external_means_recombine_to_the_global_mean():
    fed = federation(K=8, groups=3, scale=[1.0, 2.0, 0.5, 3.0, 1.0, 1.5, 4.0, 1.0])
    result = fed.run()
    checked = 0
    for module in MODULES:
        whole = dict(zip("BA", fed.mean(module, range(8)), strict=True))
        for c, members in enumerate(clusters_of(result, module)):
            for factor in "BA" if len(members) < 8 else "":
                inside = result.tensors[f"{module}.cluster_{factor}"][c]
                outside = result.tensors[f"{module}.outside_{factor}"][c]
                mixed = (len(members) * inside + (8 - len(members)) * outside) / 8
                assert distance(mixed, whole[factor]) < 1e-14
                checked += 1
    assert checked > 10


def test_external_means_do_not_cancel():
    """A cluster of huge factors must not leave its rounding in the mean of the others."""
    fed = federation(K=6, groups=2)
    for module in fed.B:
        fed.B[module] = [b * (1e12 if k % 2 else 1.0) for k, b in enumerate(fed.B[module])]
    result = fed.run(metric="cosine", window=2)
    module = "model.layers.0.q_proj"
    assert clusters_of(result, module) == [[0, 2, 4], [1, 3, 5]]
    for c, others in enumerate(reversed(clusters_of(result, module))):
        assert distance(result.tensors[f"{module}.outside_B"][c], fed.mean(module, others)[0]) < 1e-14


def test_a_weight_is_not_used_but_zero_means_absent():
    fed = federation(K=7, groups=2)
    plain = fed.run()

    def unequal(modules):
        return torch.arange(1.0, 8.0, dtype=torch.float64).expand(len(modules), 7) / 28.0

    assert all(torch.equal(x, plain.tensors[key]) for key, x in fed.run(weight=unequal).tensors.items())
    module = "model.layers.3.v_proj"

    def without_first(modules):
        table = torch.full((len(modules), 7), 1.0 / 7.0, dtype=torch.float64)
        table[[i for i, name in enumerate(modules) if name == module], 0] = 0.0
        return table

    result = fed.run(weight=without_first)
    members = clusters_of(result, module)[0]
    assert 0 in members
    kept = [k for k in members if k != 0]
    assert distance(result.tensors[f"{module}.cluster_B"][0], fed.mean(module, kept)[0]) < 1e-14
    neighbour = "model.layers.2.v_proj"
    assert torch.equal(result.tensors[f"{neighbour}.cluster_B"], plain.tensors[f"{neighbour}.cluster_B"])


def test_splitting_a_client_into_two_counts_it_twice():
    fed = federation(K=6, groups=2)
    module = "model.layers.0.q_proj"
    one, two = (p.run(window=1).tensors[f"{module}.cluster_B"] for p in (fed, fed.only(0, 0, 1, 2, 3, 4, 5)))
    assert distance(two[0], (6 * one[0] + fed.B[module][0]) / 7) < 1e-14
    assert distance(two, one) > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_a_gpu_computes_what_the_host_does(metric):
    fed = federation(K=7, groups=3, shared=1)
    host = fed.run(metric=metric)
    moved = Federation(
        *({m: [x.cuda() for x in xs] for m, xs in f.items()} for f in (fed.B, fed.A)), fed.scale, fed.names
    )
    device = moved.run(metric=metric)
    np.testing.assert_array_equal(device.plan.labels, host.plan.labels)
    assert all(distance(device.tensors[key].cpu(), x) < 1e-14 for key, x in host.tensors.items())
    last = moved.only(0, 3).run(device)
    assert all(x.is_cuda for x in last.tensors.values())
    assert (
        distance(last.tensors["lm_head.cluster_B"].cpu(), fed.only(0, 3).run(host).tensors["lm_head.cluster_B"]) < 1e-14
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_at_either_end_leaves_one_product(share):
    fed = federation(K=6, groups=2)
    result = fed.run(client_state=dict.fromkeys(fed.names, share))
    for (name, module), (B, A) in result.personal.items():
        inside = next(c for c in clusters_of(result, module) if fed.names.index(name) in c)
        others = [k for k in range(6) if k not in inside]
        own_B, own_A = fed.mean(module, inside if share or not others else others)
        assert distance(B @ A, own_B @ own_A) < 1e-13


def test_one_client_receives_its_own_pair():
    fed = federation(K=1, scale=[3.0])
    result = fed.run(min_silhouette=-1.0, client_state={"c0": 0.25})
    for (_, module), (B, A) in result.personal.items():
        assert torch.equal(B, 3.0 * fed.B[module][0])
        assert torch.equal(A, fed.A[module][0])
    assert (result.plan.lam == 1.0).all(), "nobody is outside: the share is fixed at 1"


def test_two_clients_are_one_cluster_for_ever():
    result = federation(K=2).run(min_silhouette=-1.0, window=9)
    assert result.plan.cuts.tolist() == [1] * 5


def test_rank_is_doubled_only_where_somebody_is_outside():
    fed = federation(K=6, groups=2, shared=2, seed=1)
    result = fed.run()
    assert result.plan.cuts[0] == 1
    assert result.plan.cuts[-1] >= 2
    for (_, module), (B, A) in result.personal.items():
        wanted = 3 if result.plan.cuts[result.plan.layer[result.plan.row[module]]] == 1 else 6
        assert (B.shape[1], A.shape[0]) == (wanted, wanted)
        outside = f"{module}.outside_B" in result.tensors
        assert outside == (wanted == 6), "means of nobody are not kept"


def test_small_chunks_change_nothing(monkeypatch):
    fed = federation(K=7, groups=3, shared=2)
    plain = fed.run()
    monkeypatch.setattr(factors, "CHUNK", 1)
    small = fed.run()
    np.testing.assert_array_equal(small.plan.labels, plain.plan.labels)
    assert all(torch.equal(x, small.tensors[key]) for key, x in plain.tensors.items())
    assert all(
        torch.equal(x, y)
        for key in plain.personal
        for x, y in zip(plain.personal[key], small.personal[key], strict=True)
    )


def test_nothing_common_is_claimed():
    method = make_method("fedtree", {})
    for outcome in federation(groups=2).run().outcomes:
        assert outcome.B is outcome.A is outcome.rank is None
        assert outcome.error.isnan().all()
        assert not outcome.info.any()
    assert method.gives == ("personal", "state")
    # both pairs, and one where nobody is outside
    assert [method.broadcast_rank([4, 4], rank, 0) for rank in (8, 4)] == [8, 4]


# later rounds


def mixed_rounds(seed=0):
    """Round 0 of seven clients in three groups, and the factors of the round after."""
    first = federation(K=7, groups=3, seed=seed, shared=1)
    return first, first.run(), federation(K=7, groups=3, seed=seed + 100, shared=1)


def test_later_rounds_keep_the_clusters_and_need_no_survey():
    _, zero, later = mixed_rounds()
    one = later.run(zero)
    np.testing.assert_array_equal(one.plan.labels, zero.plan.labels)
    assert not np.array_equal(later.run(min_silhouette=-1.0).plan.labels, zero.plan.labels)
    for module in MODULES:
        for c, members in enumerate(clusters_of(zero, module)):
            assert distance(one.tensors[f"{module}.cluster_B"][c], later.mean(module, members)[0]) < 1e-14
    assert make_method("fedtree", {}).surveys(zero.memory) is False
    assert make_method("fedtree", {}).surveys(None) is True


def test_only_present_clients_enter_the_means_and_absent_sets_keep_their_last():
    first, zero, later = mixed_rounds()
    deepest = clusters_of(zero, "lm_head")
    assert len(deepest) >= 3
    gone = deepest[1]
    here = [k for k in range(7) if k not in gone]
    part = later.only(*reversed(here))  # in another order
    one = part.run(zero)
    kept = 0
    for module in MODULES:
        for c, members in enumerate(clusters_of(zero, module)):
            inside = [k for k in members if k in here]
            others = [k for k in here if k not in members]
            for which, chosen in (("cluster", inside), ("outside", others)):
                if f"{module}.{which}_B" not in one.tensors:
                    continue
                B, A = (one.tensors[f"{module}.{which}_{factor}"][c] for factor in "BA")
                if not chosen:
                    kept += 1
                    assert torch.equal(B, zero.tensors[f"{module}.{which}_B"][c])
                    assert torch.equal(A, zero.tensors[f"{module}.{which}_A"][c])
                else:
                    want_B, want_A = later.mean(module, chosen)
                    assert distance(B, want_B) < 1e-14
                    assert distance(A, want_A) < 1e-14
    assert kept > 0
    # and once more, from what was kept
    two = first.only(*here).run(one)
    assert torch.equal(two.tensors["lm_head.cluster_B"][1], zero.tensors["lm_head.cluster_B"][1])
    B, A = two.personal[f"c{here[0]}", "lm_head"]
    assert B.shape[1] == 6


def test_the_outside_of_a_cluster_keeps_its_last_mean_when_only_the_cluster_is_present():
    _, zero, later = mixed_rounds()
    members = clusters_of(zero, "lm_head")[0]
    one = later.only(*members).run(zero)
    assert torch.equal(one.tensors["lm_head.outside_B"][0], zero.tensors["lm_head.outside_B"][0])
    B, A = one.personal[f"c{members[0]}", "lm_head"]
    want_B, want_A = later.mean("lm_head", members)
    assert distance(B[:, :3], 0.5 * want_B) < 1e-14
    assert distance(A[:3], want_A) < 1e-14
    assert torch.equal(B[:, 3:], 0.5 * zero.tensors["lm_head.outside_B"][0])
    assert torch.equal(A[3:], zero.tensors["lm_head.outside_A"][0])


def test_shares_are_remembered_until_clients_report_others():
    _, zero, later = mixed_rounds()
    split = zero.plan.cuts[zero.plan.layer] > 1
    assert split.any()
    assert not split.all()
    assert (zero.plan.lam[split] == 0.5).all()
    assert (zero.plan.lam[~split] == 1.0).all()
    one = later.run(zero, client_state={"c3": 0.75, "c5": {"model.layers.3.q_proj": 0.25, "3": 0.625, 2: 0.125}})
    two = later.only(3, 5).run(one)
    lam = two.plan.lam
    assert (lam[split, 3] == 0.75).all()
    row = two.plan.row
    assert lam[row["model.layers.3.q_proj"], 5] == 0.25, "a module stands above its layer"
    assert lam[row["model.layers.3.v_proj"], 5] == 0.625
    assert lam[row["model.layers.2.v_proj"], 5] == 0.125
    assert lam[row["lm_head"], 5] == 0.5
    assert (lam[~split] == 1.0).all()
    away = later.only(0).run(two, client_state={"c6": 0.375})
    assert (away.plan.lam[split, 6] == 0.375).all(), "a client that is absent may still report"


def test_each_present_client_is_mixed_with_its_own_share():
    """In another order, and with clients away: shares belong to names, not to places."""
    _, zero, later = mixed_rounds()
    shares = {f"c{k}": (k + 1) / 8 for k in range(7)}
    here = [5, 0, 3]
    one = later.only(*here).run(zero, client_state=shares)
    for k in here:
        B, _ = one.personal[f"c{k}", "lm_head"]
        label = next(c for c, members in enumerate(clusters_of(zero, "lm_head")) if k in members)
        assert distance(B[:, :3], shares[f"c{k}"] * one.tensors["lm_head.cluster_B"][label]) < 1e-14
        assert distance(B[:, 3:], (1.0 - shares[f"c{k}"]) * one.tensors["lm_head.outside_B"][label]) < 1e-14


@pytest.mark.parametrize("value", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), np.array(0.25), 1, 0])
def test_shares_may_be_numbers_of_any_kind(value):
    result = federation(groups=2).run(client_state={"c1": value})
    assert result.plan.lam[-1, 1] == float(value)


@pytest.mark.parametrize(
    "value",
    [-0.1, 1.5, float("nan"), float("inf"), True, "0.5", None, [0.5], np.array([0.5]), 10**400, np.bool_(True)],
    ids=reprlib.repr,
)
def test_a_share_outside_of_0_to_1_names_client_and_module(value):
    fed = federation(groups=2)
    with pytest.raises(InputError, match=r"client 'c1': .*0 <= lam <= 1"):
        fed.run(client_state={"c1": value})
    with pytest.raises(InputError, match=r"client 'c1', module 'lm_head': .*0 <= lam <= 1"):
        fed.run(client_state={"c1": {"lm_head": value}})


def test_unknown_names_in_client_state_are_refused():
    fed = federation(groups=2)
    with pytest.raises(InputError, match=r"no client 'nobody' in the tree.*'c0', 'c1'"):
        fed.run(client_state={"nobody": 0.5})
    for name in ("lm_tail", 77, True, None, "model.layers.0"):
        with pytest.raises(InputError, match=r"client 'c2': .* is no module and no layer; layers are '0', '1'"):
            fed.run(client_state={"c2": {name: 0.5}})
    with pytest.raises(InputError, match="client_state is of type list"):
        fed.run(client_state=[0.5])


def test_a_client_or_module_unknown_to_the_tree_is_refused_by_name():
    _, zero, later = mixed_rounds()
    later.names[2] = "stranger\x1b"
    with pytest.raises(InputError, match=r"client 'stranger\?': not in the tree.*'c0', 'c1'.*round=0"):
        later.run(zero)
    later.names[2] = "c2"
    later.B["model.layers.9.q_proj"], later.A["model.layers.9.q_proj"] = later.B["lm_head"], later.A["lm_head"]
    with pytest.raises(InputError, match=r"module 'model.layers.9.q_proj': not in the tree"):
        later.run(zero)


def test_a_client_without_a_module_is_refused_by_name():
    fed = federation(groups=2)
    for factor, cut_ in ((fed.B, lambda x: x[:, :0]), (fed.A, lambda x: x[:0])):
        factor["lm_head"][3] = cut_(factor["lm_head"][3])
    method = make_method("fedtree", {})
    blocks = tuple(x[None] for x in fed.B["lm_head"])
    lacking = dataclasses.replace(
        next(federation(groups=2, modules={"lm_head": (9, 7)}).groups()),
        B=blocks,
        A=tuple(x[None] for x in fed.A["lm_head"]),
    )
    stats = method.survey(lacking).stats
    census = Census(
        ("lm_head",), tuple(fed.names), None, np.array([[3, 3, 3, 0, 3, 3, 3]]), np.ones(7), np.ones((1, 2))
    )
    with pytest.raises(InputError, match=r"client 'c3', module 'lm_head': the client lacks it"):
        method.decide(stats, census)


def test_the_round_before_must_hold_what_is_to_be_kept():
    _, zero, later = mixed_rounds()
    gone = clusters_of(zero, "lm_head")[1]
    here = [k for k in range(7) if k not in gone]
    empty = dataclasses.replace(zero, tensors={})
    with pytest.raises(InputError, match=r"no client of cluster 1 is present.*previous"):
        later.only(*here).run(empty)
    other = {key: x[..., :2] if key.endswith("_B") else x[..., :2, :] for key, x in zero.tensors.items()}
    with pytest.raises(MismatchError, match=r"cluster_B kept is 9 x 2, this round's are 9 x 3"):
        later.only(*here).run(dataclasses.replace(zero, tensors=other))


def test_memory_survives_a_file():
    """Text and plain tensors, nothing else."""
    _, zero, later = mixed_rounds()
    memory = zero.memory
    assert all(isinstance(text, str) for text in memory.facts.values())
    assert json.loads(memory.facts["clients"]) == [f"c{k}" for k in range(7)]
    assert {str(x.dtype) for x in memory.tensors.values()} == {"torch.int64", "torch.float64"}
    copied = Memory({name: x.clone() for name, x in memory.tensors.items()}, dict(memory.facts))
    one = later.run(dataclasses.replace(zero, memory=copied))
    np.testing.assert_array_equal(one.plan.labels, zero.plan.labels)


@pytest.mark.parametrize("broken", ["facts", "tensors", "names", "labels", "lam", "shape", "json"])
def test_a_memory_that_contradicts_itself_is_refused(broken):
    _, zero, later = mixed_rounds()
    tensors, facts = dict(zero.memory.tensors), dict(zero.memory.facts)
    if broken == "facts":
        del facts["clients"]
    elif broken == "tensors":
        del tensors["lam"]
    elif broken == "names":
        facts["modules"] = json.dumps([*range(len(MODULES))])
    elif broken == "labels":
        tensors["labels"] = tensors["labels"] + 7
    elif broken == "lam":
        tensors["lam"] = tensors["lam"] * float("nan")
    elif broken == "shape":
        tensors["labels"] = tensors["labels"][:, 1:]
    else:
        facts["clients"] = "{"
    with pytest.raises(InputError, match=r"fedtree: .*previous"):
        later.run(dataclasses.replace(zero, memory=Memory(tensors, facts)))


# what is handed over


@dataclass
class FakeState:
    tensors: dict
    memory: Memory


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_experts_are_both_pairs_unmixed_whatever_the_share(share):
    fed = federation(K=6, groups=2, shared=1)
    result = fed.run(client_state=dict.fromkeys(fed.names, share))
    for name in fed.names:
        found = experts(FakeState(result.tensors, result.memory), name)
        assert set(found) == set(MODULES)
        for module, (cluster, outside, lam) in found.items():
            inside = next(c for c in clusters_of(result, module) if fed.names.index(name) in c)
            others = [k for k in range(6) if k not in inside]
            for pair, members in ((cluster, inside), (outside, others)):
                assert (pair is None) == (not members)
                for x, wanted in zip(pair or (), fed.mean(module, members or [0]), strict=False):
                    assert distance(x, wanted) < 1e-14
            B, A = result.personal[name, module]
            mixed = lam * cluster.B @ cluster.A
            if outside is not None:
                assert lam == share
                mixed = mixed + (1.0 - lam) * outside.B @ outside.A
            assert distance(B @ A, mixed) < 1e-14


def test_experts_of_an_unknown_client_or_another_state_are_refused():
    result = federation(groups=2).run()
    with pytest.raises(InputError, match="experts: no client 'x'"):
        experts(FakeState(result.tensors, result.memory), "x")
    with pytest.raises(InputError, match="experts: the state holds no memory"):
        experts(FakeState(result.tensors, None), "c0")


def test_the_report_names_clusters_cuts_and_shares():
    fed = federation(K=4, groups=2)
    result = fed.run(client_state={"c1": 0.25})
    told = make_method("fedtree", {}).describe(result.plan, fed.names)
    assert told["cuts"]["0"] == 2
    assert told["clusters"]["0"] == [["c0", "c2"], ["c1", "c3"]]
    assert list(told["cuts"]) == ["0", "1", "2", "3", "lm_head"]
    assert told["lam"]["c1"]["lm_head"] == 0.25
    json.dumps(told, allow_nan=False)


# trouble


def test_a_bad_module_is_reported_and_its_neighbours_are_unharmed():
    fed = federation(K=6, groups=2)
    clean = fed.run()
    plan, group = clean.plan, next(fed.groups())
    i = group.modules.index("model.layers.2.q_proj")
    group.B[4][i, 0, 0] = float("nan")
    method = make_method("fedtree", {})
    outcome = method.combine(group, plan, None)
    assert outcome.info.tolist() == [int(Info.NONFINITE) if j == i else 0 for j in range(group.batch)]
    for j, module in enumerate(group.modules):
        if j != i:
            assert torch.equal(outcome.state[j]["cluster_B"], clean.tensors[f"{module}.cluster_B"])


def test_overflow_of_the_output_dtype_is_reported():
    fed = federation(K=6, groups=2, scale=[1e6] * 6)
    assert all((outcome.info == Info.OVERFLOW).all() for outcome in fed.run(dtype=torch.float16).outcomes)


def test_sums_do_not_leave_float64_where_means_stay():
    fed = federation(K=6, groups=2, scale=[1e307] * 6)
    plan = federation(K=6, groups=2).run().plan
    outcome = make_method("fedtree", {}).combine(next(fed.groups()), plan, None)
    assert not outcome.info.any()


def test_distances_beyond_float64_name_client_and_layer():
    with pytest.raises(
        InputError, match=r"client 'c\d', layer '0': its distance from client 'c\d' is no finite number"
    ):
        federation(groups=2, scale=[1e200] * 7).run()


def test_zero_modules_have_a_note():
    fed = federation(K=6, groups=2)
    fed.B["lm_head"] = [torch.zeros_like(b) for b in fed.B["lm_head"]]
    outcome = fed.run().outcomes[0]
    assert outcome.notes.tolist() == [0, 0, 0, 0, int(Note.ZERO)]


def test_mixed_ranks_are_refused():
    fed = federation(K=4)
    group = next(fed.groups())
    mixed = dataclasses.replace(group, B=(group.B[0][..., :2], *group.B[1:]), A=(group.A[0][:, :2], *group.A[1:]))
    method = make_method("fedtree", {})
    with pytest.raises(MismatchError, match="ranks 2, 3"):
        method.survey(mixed)
    with pytest.raises(MismatchError, match="ranks 2, 3"):
        method.combine(mixed, fed.run().plan, None)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("min_silhouette", float("nan")),
        ("min_silhouette", float("inf")),
        ("min_silhouette", "0.3"),
        ("min_silhouette", True),
        ("window", 0),
        ("window", 1.5),
        ("window", True),
        ("linkage", "ward"),
        ("metric", "euclid"),
    ],
)
def test_wrong_options_are_named(option, value):
    with pytest.raises(InputError, match=f"fedtree: {option} is .*needed"):
        make_method("fedtree", {option: value})


def test_what_the_method_declares():
    cls = type(make_method("fedtree", {}))
    assert (cls.equal_ranks, cls.uses_weights, cls.needs_decision, cls.takes_client_state) == (True, False, True, True)
    assert (cls.reads_previous, cls.needs_previous) == ("state", True)
    assert make_method("fedtree", {"metric": "product"}).needs_gram()
    assert not make_method("fedtree", {"metric": "cosine"}).needs_gram()


@pytest.mark.parametrize("linkage", ["complete", "single"])
def test_other_linkages_are_used(linkage):
    fed = federation(K=9, seed=7)
    plan = fed.run(linkage=linkage, min_silhouette=-1.0).plan
    merges = merge_tree(dense_distances(fed, "frobenius").mean(0), linkage)
    np.testing.assert_array_equal(plan.labels[-1], cut(merges, int(plan.cuts[-1])))
    assert not np.array_equal(plan.labels, fed.run(min_silhouette=-1.0).plan.labels)
