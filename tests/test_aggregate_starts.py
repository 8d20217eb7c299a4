"""What clients started from, subtracted: it widens their pairs, and no method takes it for what they trained, or cuts it away."""

import itertools
import warnings

import pytest
import torch

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.cli import main
from fedlora_kernels.errors import InputError, MismatchError
from fedlora_kernels.methods.contract import method_class, method_names

SHAPES = {"up": (9, 14), "down": (13, 10)}
RULES = ("geometric_median", "krum", "multi_krum", "norm_clip", "trimmed_mean")
SORTED = ("florist", "flexlora", "raflora", "fedmomentum", *RULES)
WIDE = ("fedit", "zero_pad", "hetlora", "prelort", "fedrot", "lora_fair", "fedex")
FROZEN = {"ffa": "A", "fedsvd": "A", "rolora": "B"}
PERSONAL = ("fedsa", "clair", "fedtree")
RANK, SCALE = 3, 2.0


def state(pairs):
    names = {"A": "lora_A", "B": "lora_B"}
    return {f"base_model.model.{name}.{names[x]}.weight": pair[x] for name, pair in pairs.items() for x in "BA"}


def config(rank, init="pissa", **fields):
    return {"peft_type": "LORA", "r": rank, "lora_alpha": SCALE * rank, "init_lora_weights": init, **fields}


def drawn(rank, seed):
    made = torch.Generator().manual_seed(seed)
    return {
        name: {"B": torch.randn(m, rank, generator=made), "A": torch.randn(rank, n, generator=made)}
        for name, (m, n) in SHAPES.items()
    }


def moved(start, seed, *factors):
    """Clients that went on from ``start`` in some of the factors; with one alone, the update has the rank of the client."""
    made = torch.Generator().manual_seed(seed)
    return {
        name: {x: v + 0.3 * torch.randn(v.shape, generator=made) if x in factors else v for x, v in pair.items()}
        for name, pair in start.items()
    }


def source(pairs, **fields):
    rank = pairs["up"]["A"].shape[0]
    return state(pairs), config(rank, **fields)


def read(start):
    return ReadOptions(init_factors={name: (p["A"], p["B"], SCALE) for name, p in start.items()})


def update(pairs, start):
    return {
        n: SCALE * (pairs[n]["B"].double() @ pairs[n]["A"].double() - start[n]["B"].double() @ start[n]["A"].double())
        for n in SHAPES
    }


def combined(clients, method, reading, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fk.aggregate(clients, method, read=reading, **options)


def product(adapter, name):
    pair = adapter[name]
    return pair.scale * pair.B.double() @ pair.A.double()


def require(adapter, wanted, rank):
    for name, dense in wanted.items():
        assert torch.linalg.norm(product(adapter, name) - dense) <= 2e-6 * torch.linalg.norm(dense), name
        assert adapter[name].A.shape[0] == rank


def every(result, key):
    """All ways to what a client receives."""
    return [result.for_client(key), result.for_client(key, scale=1.0)]


def test_every_method_is_tried_here():
    ours = {name for name in method_names() if method_class(name).__module__.startswith("fedlora_kernels.")}
    assert {*SORTED, *WIDE, *FROZEN, *PERSONAL, "flora"} == ours


@pytest.mark.parametrize("method", SORTED)
def test_one_client_comes_out_as_it_went_in_at_the_rank_that_it_trained(method, tmp_path):
    start = drawn(RANK, 0)
    pairs = moved(start, 1, "B")
    clients = {f"c{k}": source(pairs) for k in range(5 if method in RULES else 1)}
    options = {"rule": fk.Energy(1.0)} if method == "florist" else {"f": 1} if "krum" in method else {}
    result = combined(clients, method, read(start), out=tmp_path / "out", per_client=True, **options)
    for adapter in (result.adapter, *every(result, "c0"), open_adapter(tmp_path / "out" / "clients" / "c0")):
        require(adapter, update(pairs, start), RANK)
    assert result.for_client("c0", rank=2)["up"].A.shape[0] == 2
    for row in result.report["modules"]:
        assert set(row["ranks"]) == {RANK}
        assert row["stacked_rank"] == 2 * RANK * len(row["ranks"])
    assert [row["rank_max"] for row in result.report["clients"]] == [RANK] * len(clients)
    assert not any("twice the rank" in text for text in result.report["notes"])


@pytest.mark.parametrize("method", ["flexlora", "raflora", "fedmomentum"])
def test_an_update_that_needs_more_is_cut_to_its_best_approximation_of_the_rank_trained(method):
    start = drawn(RANK, 0)
    pairs = moved(start, 1, "A", "B")
    result = combined({"c0": source(pairs)}, method, read(start))
    for name, dense in update(pairs, start).items():
        U, S, V = torch.linalg.svd(dense, full_matrices=False)
        best = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
        assert torch.linalg.norm(product(result.adapter, name) - best) <= 1e-5 * torch.linalg.norm(best)
        row = next(row for row in result.report["modules"] if row["name"] == name)
        assert row["error"] == pytest.approx(float(S[RANK:].norm() / S.norm()), rel=1e-4)
        if method == "fedmomentum":
            whole = product(result.adapter, name) + product(result.residual, name)
            assert torch.linalg.norm(whole - dense) <= 1e-2 * torch.linalg.norm(dense)


def test_a_refined_pair_is_cut_to_what_its_client_trained():
    start = drawn(RANK, 0)
    clients = {f"c{k}": source(moved(start, k + 1, "A", "B")) for k in range(4)}
    result = combined(clients, "clair", read(start))
    assert {result.for_client(name)["up"].A.shape[0] for name in clients} == {RANK}
    assert all(0.0 < error < 1.0 for row in result.report["modules"] for error in row["personal_error"])


@pytest.mark.parametrize(
    ("method", "rank"),
    [("flexlora", RANK), ("raflora", RANK), ("hetlora", 2 * RANK), ("prelort", 2 * RANK), ("clair", RANK)],
)
def test_what_is_sent_is_counted_as_it_is_sent(method, rank):
    start = drawn(RANK, 0)
    clients = [source(moved(start, k + 1, "A", "B")) for k in range(2)]
    result = combined(clients, method, read(start))
    assert result.report["totals"]["broadcast_rank"] == len(SHAPES) * rank
    assert {len(result.for_client(0)[name].A) for name in SHAPES} == {rank}


@pytest.mark.parametrize("method", ["fedmomentum", "flexlora"])
def test_a_client_whose_sum_is_of_lower_rank_is_padded_to_what_it_trained(method):
    start = drawn(RANK, 0)
    pairs = moved(start, 1, "B")
    for name in SHAPES:
        pairs[name]["B"][:, 1:] = start[name]["B"][:, 1:]
    result = combined({"c0": source(pairs)}, method, read(start))
    assert result.adapter["up"].A.shape[0] == 1
    require(result.for_client("c0"), update(pairs, start), RANK)


@pytest.mark.parametrize("method", WIDE)
def test_means_keep_the_start_beside_what_was_trained_and_say_so(method, tmp_path):
    start = drawn(RANK, 0)
    pairs = moved(start, 1, "A", "B")
    result = combined({"c0": source(pairs)}, method, read(start), out=tmp_path / "out", per_client=True)
    for adapter in (result.adapter, *every(result, "c0"), open_adapter(tmp_path / "out" / "clients" / "c0")):
        require(adapter, update(pairs, start), 2 * RANK)
    assert result.report["modules"][0]["ranks"] == [RANK]
    assert sum(f"method '{method}' keeps what clients started from" in text for text in result.report["notes"]) == 1
    with pytest.raises(InputError, match=f"method '{method}' cannot cut; leave rank out"):
        result.for_client("c0", rank=RANK)
    require(result.for_client("c0", rank=2 * RANK + 1), update(pairs, start), 2 * RANK + 1)


@pytest.mark.parametrize("method", FROZEN)
def test_a_frozen_factor_is_that_of_the_start_too(method):
    start = drawn(RANK, 0)
    trains = "B" if FROZEN[method] == "A" else "A"
    clients = {f"c{k}": source(moved(start, k + 1, trains)) for k in range(2)}
    moves = [update(moved(start, k + 1, trains), start) for k in range(2)]
    result = combined(clients, method, read(start), **({"round": 1} if method == "rolora" else {}))
    wanted = {name: (moves[0][name] + moves[1][name]) / 2 for name in SHAPES}
    require(result.for_client("c0"), wanted, RANK if method == "fedsvd" else 2 * RANK)
    assert [row["error_bound"] < 1e-6 for row in result.report["modules"]] == [True, True]


def test_fedsvd_says_what_it_cuts_away():
    start = drawn(RANK, 0)
    pairs = moved(start, 1, "A", "B")  # all hold one A, which is not that of the start
    result = combined({"c0": source(pairs)}, "fedsvd", read(start))
    for row in result.report["modules"]:
        S = torch.linalg.svdvals(update(pairs, start)[row["name"]])
        assert row["rank"] == RANK
        assert row["error"] == pytest.approx(float(S[RANK:].norm() / S.norm()), rel=1e-4)


@pytest.mark.parametrize("method", PERSONAL)
def test_personal_pairs_are_the_clients_own_updates(method):
    start = drawn(RANK, 0)
    pairs = moved(start, 1, "A", "B") if method != "clair" else moved(start, 1, "B")
    result = combined({"c0": source(pairs)}, method, read(start))
    require(result.for_client("c0"), update(pairs, start), RANK if method == "clair" else 2 * RANK)
    assert result.report["modules"][0]["ranks"] == [RANK]
    with pytest.raises(InputError, match="what the clients started from"):
        result.for_client("c0", rank=1)


def test_a_stack_keeps_all_and_is_not_cut():
    start = drawn(RANK, 0)
    pairs = [moved(start, k + 1, "A", "B") for k in range(2)]
    result = combined([source(own) for own in pairs], "flora", read(start), weights=[3, 1])
    moves = [update(own, start) for own in pairs]
    require(result.for_client(0), {n: 0.75 * moves[0][n] + 0.25 * moves[1][n] for n in SHAPES}, 4 * RANK)
    with pytest.raises(InputError, match="method 'flora' cannot cut"):
        result.for_client(0, rank=RANK)


def mixed():
    """Clients of two ranks, each with its own start, and a plain one that holds as many columns as the first."""
    opened = []
    for seed, rank in ((0, 2), (1, 4)):
        start = drawn(rank, seed)
        pairs = moved(start, seed + 5, "B")
        opened.append((open_adapter(source(pairs), read(start)), update(pairs, start)))
    plain = drawn(4, 9)
    zero = {name: {x: torch.zeros_like(v) for x, v in pair.items()} for name, pair in plain.items()}
    opened.append((open_adapter(source(plain, init=True)), update(plain, zero)))
    return opened


@pytest.mark.parametrize("pair", list(itertools.combinations(range(3), 2)))
@pytest.mark.parametrize("method", ["zero_pad", "hetlora", "prelort", "raflora", "ffa", "fedit", "fedsa"])
def test_columns_that_do_not_mean_the_same_are_refused(method, pair):
    clients = [mixed()[k][0] for k in pair]
    with pytest.raises(
        MismatchError, match=r"with init_factors method '\w+' needs one rank and a start in all clients"
    ):
        combined(clients, method, None)


@pytest.mark.parametrize("method", ["flexlora", "florist", "flora"])
def test_methods_of_products_take_clients_of_any_rank_with_a_start_or_without(method):
    made = mixed()
    options = {"rule": fk.Energy(1.0)} if method == "florist" else {}
    result = combined([adapter for adapter, _ in made], method, None, **options)
    for row in result.report["modules"]:
        assert row["ranks"] == [2, 4, 4]
        assert row["stacked_rank"] == 4 + 8 + 4
        dense = sum(moves[row["name"]] for _, moves in made) / 3
        if method != "flexlora":
            assert torch.linalg.norm(product(result.adapter, row["name"]) - dense) <= 2e-6 * torch.linalg.norm(dense)
        else:
            assert row["rank"] == 4
            assert [result.for_client(k)[row["name"]].A.shape[0] for k in range(3)] == [2, 4, 4]


def test_fedmomentum_asks_for_one_rank_trained_whatever_is_held():
    made = mixed()
    result = combined([made[1][0], made[2][0]], "fedmomentum", None)
    assert {row["rank"] for row in result.report["modules"]} == {4}
    with pytest.raises(MismatchError, match=r"rank 4, but 2 in client .*method 'fedmomentum' needs one rank"):
        combined([made[0][0], made[2][0]], "fedmomentum", None)


@pytest.mark.parametrize("method", ["prelort", "raflora"])
def test_rank_indices_beyond_what_was_trained_belong_to_the_start(method):
    start = drawn(RANK, 0)
    clients = [source(moved(start, k, "B")) for k in range(2)]
    combined(clients, method, read(start), levels=(1, RANK))
    with pytest.raises(MismatchError, match=f"levels of rank {RANK + 1}, but clients trained {RANK} and have what"):
        combined(clients, method, read(start), levels=(RANK + 1,))
    before = combined([source(drawn(7, 3), init=True)], method, None)
    with pytest.raises(MismatchError, match=f"the previous pair of rank 7, but clients trained {RANK}"):
        combined(clients, method, read(start), previous=before)


def test_on_the_command_line_a_refusal_is_the_users_to_mend(tmp_path, capsys):
    start = drawn(RANK, 0)
    fk.Adapter.save(open_adapter(source(start), ReadOptions(init="keep")), tmp_path / "start")
    for name, pairs, init in (("c0", moved(start, 1, "B"), "pissa"), ("c1", drawn(2 * RANK, 4), True)):
        open_adapter(source(pairs, init=init), ReadOptions(init="keep" if init == "pissa" else None)).save(
            tmp_path / name
        )
    folders = [str(tmp_path / name) for name in ("c0", "c1")]
    out = tmp_path / "out"
    arguments = ["aggregate", *folders, "-o", str(out), "--quiet", "--init-factors", str(tmp_path / "start")]
    assert main([*arguments, "--method", "zero_pad"]) == 2
    assert "method 'zero_pad' needs one rank and a start in all clients" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--method", "flexlora"]) == 0
