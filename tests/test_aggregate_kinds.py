"""Every kind of layer through the whole engine, against a dense sum of the layers' own shapes."""

import json

import pytest
import torch
from kind_problems import NAMES, PREFIX, client, clients, dense, distance, tensors, updates, weighted
from safetensors.torch import load_file, save_file

from fedlora_kernels import Budget, Energy, Rank, WriteOptions, aggregate, open_adapter
from fedlora_kernels.cli import main
from fedlora_kernels.errors import MismatchError
from fedlora_kernels.inspection import inspect_adapters

WHOLE = Energy(1.0)
WEIGHTS = [3.0, 1.0, 2.0]
SHARES = [0.5, 1 / 6, 1 / 3]


def written(folder):
    """Tensors and ranks of a PEFT folder, and the largest rank that its configuration gives."""
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def folders(root, pairs):
    """The clients as PEFT folders."""
    for k, (state, config) in enumerate(pairs):
        (root / f"c{k}").mkdir()
        save_file({key: x.contiguous() for key, x in state.items()}, str(root / f"c{k}" / "adapter_model.safetensors"))
        (root / f"c{k}" / "adapter_config.json").write_text(json.dumps(config))
    return [str(root / f"c{k}") for k in range(len(pairs))]


def test_sums_of_every_kind_are_the_dense_sums(tmp_path):
    pairs = clients()
    result = aggregate(pairs, weights=WEIGHTS, rule=WHOLE, out=tmp_path / "out")
    state, _ = written(tmp_path / "out")
    assert distance(dense(state, 1.0), weighted(pairs, SHARES)) <= 1e-6
    assert list(result.adapter) == NAMES
    assert {row["name"]: row["kind"] for row in result.report["modules"]} == {
        "layers.0.q_proj": "linear",
        "attn": "linear",
        "attn.base_layer.out_proj": "linear",
        "conv1d": "conv1d",
        "conv3x3": "conv2d",
        "conv1x1": "conv2d",
        "conv3d": "conv3d",
        "model.embed_tokens": "embedding",
    }


def test_memory_files_and_slabs_give_the_same_bits(tmp_path):
    pairs = clients()
    paths = folders(tmp_path, pairs)
    memory = tensors(aggregate(pairs, weights=WEIGHTS, rule=WHOLE).adapter)
    aggregate(paths, weights=WEIGHTS, rule=WHOLE, out=tmp_path / "out")
    aggregate(paths, weights=WEIGHTS, rule=WHOLE, out=tmp_path / "small", memory=4096)
    once, small = written(tmp_path / "out")[0], written(tmp_path / "small")[0]
    assert memory.keys() == once.keys() == small.keys()
    assert all(torch.equal(once[key], small[key]) and torch.equal(once[key], memory[key]) for key in once)


METHODS = {
    "fedit": {},
    "zero_pad": {},
    "ffa": {},
    "flora": {},
    "hetlora": {},
    "fedex": {},
    "flexlora": {},
    "fedsvd": {},
    "raflora": {},
    "rolora": {"round": 1},
    "lora_fair": {},
    "fedrot": {},
    "florist": {"rule": WHOLE},
    "prelort": {},
    "fedmomentum": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_one_client_is_the_same_update_by_every_method(method, tmp_path):
    pair = client()
    aggregate([pair], method, out=tmp_path / "out", **METHODS[method])
    state, config = written(tmp_path / "out")
    assert distance(dense(state, 1.0), updates(pair)) <= 1e-6
    assert config["r"] == config["lora_alpha"]
    assert {key: tensor.dim() for key, tensor in state.items()} == {
        key: tensor.dim() for key, tensor in pair[0].items()
    }


SPELLINGS = {
    "adapter name": lambda key: key.replace(".weight", ".site_7.weight") if ".lora_" in key else key,
    "adapter name of an embedding": lambda key: f"{key}.site_7" if ".lora_embedding_" in key else key,
    "NVFlare": lambda key: f"model.{key}",
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "DDP": lambda key: f"module.{key}",
    "FSDP": lambda key: key.replace(".conv", "._fsdp_wrapped_module.conv").replace(
        ".out_proj", "._fsdp_wrapped_module.out_proj"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_keys_is_the_same_adapter(spelling):
    state, config = client()
    spelled = {SPELLINGS[spelling](key): tensor for key, tensor in state.items()}
    assert spelled.keys() != state.keys()
    mixed = [(spelled, config), client(1)]
    plain = [(state, config), client(1)]
    one, two = (tensors(aggregate(pairs, rule=WHOLE).adapter) for pairs in (mixed, plain))
    assert one.keys() == {SPELLINGS[spelling](key) for key in two}
    assert all(torch.equal(one[SPELLINGS[spelling](key)], two[key]) for key in two)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_exact_to_its_answer(dtype):
    pairs = [client(seed, dtype=dtype) for seed in range(2)]
    result = aggregate(pairs, rule=WHOLE)
    state = tensors(result.adapter)
    assert {tensor.dtype for tensor in state.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert distance(dense(state, 1.0), weighted(pairs, [0.5, 0.5])) <= (1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("folder", [True, False])
def test_pairs_of_one_target_are_written_at_the_larger_rank(folder, tmp_path):
    pairs = clients()
    out = tmp_path / "out" if folder else None
    result = aggregate(pairs, weights=WEIGHTS, rule=Energy(0.9), out=out)
    rows = {row["name"]: row["rank"] for row in result.report["modules"]}
    ranks = {name: spec.rank for name, spec in result.adapter.modules.items()}
    largest = max(rows["attn"], rows["attn.base_layer.out_proj"])
    assert rows["attn"] != rows["attn.base_layer.out_proj"]
    assert ranks == {**rows, "attn": largest, "attn.base_layer.out_proj": largest}
    config = result.adapter.config
    assert "attn.base_layer.out_proj" not in {**config["rank_pattern"], **config["alpha_pattern"]}
    assert config["rank_pattern"].get("lm_head", config["r"]) == rows["model.embed_tokens"]
    assert config["target_modules"] == sorted(pairs[0][1]["target_modules"])
    wanted = weighted(pairs, SHARES)
    found = dense(tensors(result.adapter), 1.0)
    for row in result.report["modules"]:
        error = (found[row["name"]] - wanted[row["name"]]).norm() / wanted[row["name"]].norm()
        assert abs(float(error) - row["error"]) <= 1e-6


def test_another_rule_cuts_every_kind():
    result = aggregate(clients(), weights=WEIGHTS, rule=WHOLE)
    cut = result.at(Rank(2)).adapter
    wanted = aggregate(clients(), weights=WEIGHTS, rule=Rank(2)).adapter
    assert distance(dense(tensors(cut), 1.0), dense(tensors(wanted), 1.0)) <= 1e-6


@pytest.mark.parametrize("rank", [None, 2, 6])
def test_what_clients_receive_is_in_their_scale_and_rank(rank):
    pairs = clients()
    result = aggregate(pairs, weights=WEIGHTS, rule=WHOLE)
    for k, (_, config) in enumerate(pairs):
        sent = result.for_client(k, rank=rank)
        assert {spec.scale for spec in sent.modules.values()} == {config["lora_alpha"] / config["r"]}
        if rank is not None:
            assert {spec.rank for spec in sent.modules.values()} == {rank}
        if rank is None:
            state = tensors(sent)
            assert distance(dense(state, config["lora_alpha"] / config["r"]), weighted(pairs, SHARES)) <= 1e-6
            assert torch.equal(
                state[f"{PREFIX}lm_head.lora_A.weight"].t(), state[f"{PREFIX}model.embed_tokens.lora_embedding_B"]
            )


@pytest.mark.parametrize("method", ["florist", "fedsa", "fedex"])
def test_folders_of_clients_and_residuals_have_every_kind(method, tmp_path):
    pairs = [client(seed) for seed in range(3)]
    options = {"rule": WHOLE} if method == "florist" else {}
    result = aggregate(pairs, method, out=tmp_path / "out", per_client=True, **options)
    names = [f"client_{k}" for k in range(3)]
    own = [dense(written(tmp_path / "out" / "clients" / name)[0], 1.0) for name in names]
    if method == "florist":
        assert all(distance(one, weighted(pairs, [1 / 3] * 3)) <= 1e-6 for one in own)
    if method == "fedex":
        common = dense(written(tmp_path / "out")[0], 1.0)
        residual = dense(written(tmp_path / "out" / "residual")[0], 1.0)
        sums = {name: common[name] + residual[name] for name in common}
        assert distance(sums, weighted(pairs, [1 / 3] * 3)) <= 1e-6
    assert all(set(one) == set(updates(pairs[0])) for one in own)
    assert list(open_adapter(tmp_path / "out" / "clients" / names[2])) == NAMES
    assert all(row["error"] is None or row["error"] >= 0 for row in result.report["modules"])


def test_a_zero_projection_stays_beside_the_other_one(tmp_path):
    """PEFT loads both projections of MultiheadAttention or none."""
    pairs = clients()
    for state, _ in pairs:
        state[f"{PREFIX}attn.lora_B.weight"].zero_()
        state[f"{PREFIX}conv1x1.lora_B.weight"].zero_()
    result = aggregate(pairs, rule=WHOLE, write=WriteOptions(drop_zero=True), out=tmp_path / "out")
    assert list(result.adapter) == [name for name in NAMES if name != "conv1x1"]
    assert result.adapter["attn"].A.shape == (8, 11)
    assert not dense(written(tmp_path / "out")[0], 1.0)["attn"].any()


def reshaped(pair):
    """The client with its Conv1d as a Conv3d of the same matrices."""
    state, config = pair
    shapes = {f"{PREFIX}conv1d.lora_A.weight": (-1, 5, 1, 3, 1), f"{PREFIX}conv1d.lora_B.weight": (7, -1, 1, 1, 1)}
    return {key: tensor.reshape(shapes.get(key, tensor.shape)) for key, tensor in state.items()}, config


@pytest.mark.parametrize("method", ["fedmomentum", "lora_fair"])
def test_a_second_round_goes_on_from_the_first(method, tmp_path):
    pairs = clients((3, 3, 3))
    first = aggregate(pairs, method, out=tmp_path / "first")
    second = aggregate(pairs, method, previous=tmp_path / "first", out=tmp_path / "second")
    assert list(second.adapter) == list(first.adapter) == NAMES
    assert distance(dense(tensors(second.adapter), 1.0), dense(tensors(first.adapter), 1.0)) < 1.0


def test_the_same_matrices_of_another_kind_are_refused():
    pairs = clients((3, 3, 3))
    with pytest.raises(MismatchError, match="module 'conv1d': conv3d 7 x 5 x 1 x 3 x 1 but conv1d 7 x 5 x 3 in client"):
        aggregate([pairs[0], reshaped(pairs[1]), pairs[2]])
    previous = aggregate(pairs, "prelort")
    found = "module 'conv1d': conv3d 7 x 5 x 1 x 3 x 1 in the clients, conv1d 7 x 5 x 3 in previous"
    with pytest.raises(MismatchError, match=found):
        aggregate([reshaped(pair) for pair in pairs], "prelort", previous=previous)


def test_the_same_matrices_of_another_kernel_are_refused():
    one, (state, config) = client(0), client(1)
    flat = {key: x.reshape(-1, 4, 1, 9) if key.endswith("conv3x3.lora_A.weight") else x for key, x in state.items()}
    with pytest.raises(
        MismatchError, match="module 'conv3x3': conv2d 5 x 4 x 1 x 9 but conv2d 5 x 4 x 3 x 3 in client"
    ):
        aggregate([one, (flat, config)])


def test_fresh_embeddings_are_zero_and_stay_at_rank_one(tmp_path):
    """A fresh embedding has A = 0 and B random, the reverse of a linear layer."""
    pairs = clients()
    for state, _ in pairs:
        state[f"{PREFIX}model.embed_tokens.lora_embedding_A"].zero_()
        state[f"{PREFIX}lm_head.lora_B.weight"].zero_()
    result = aggregate(pairs, rule=WHOLE, out=tmp_path / "out")
    row = next(row for row in result.report["modules"] if row["name"] == "model.embed_tokens")
    assert (row["rank"], row["notes"]) == (1, ["ZERO"])
    found = dense(written(tmp_path / "out")[0], 1.0)
    assert not found["model.embed_tokens"].any()
    assert not found["lm_head"].any()
    assert "model.embed_tokens" not in aggregate(pairs, rule=WHOLE, write=WriteOptions(drop_zero=True)).adapter


def test_a_budget_over_every_kind():
    whole = aggregate(clients(), rule=WHOLE).adapter
    size = sum(spec.rank * (spec.m + spec.n) * 4 for spec in whole.modules.values())
    half = aggregate(clients(), rule=Budget(size // 2))
    assert sum(row["rank"] * (row["m"] + row["n"]) * 4 for row in half.report["modules"]) <= size // 2
    assert list(half.adapter) == NAMES


def test_inspect_knows_every_kind(tmp_path, capsys):
    pairs = clients()
    paths = folders(tmp_path, pairs)
    assert main(["inspect", *paths]) == 0
    assert "model.embed_tokens" in capsys.readouterr().out
    for record, pair in zip(inspect_adapters(paths)["adapters"], pairs, strict=True):
        wanted = updates(pair)
        assert sorted(row["name"] for row in record["modules"]) == sorted(NAMES)
        for row in record["modules"]:
            update = wanted[row["name"]].flatten(1)
            largest = torch.linalg.svdvals(update)[: row["rank"]]
            assert row["singular_values"] == pytest.approx(largest.tolist(), rel=1e-6)


def test_resize_keeps_every_kind(tmp_path):
    (path,) = folders(tmp_path, [client()])
    assert main(["resize", path, "-o", str(tmp_path / "whole"), "--energy", "1"]) == 0
    assert distance(dense(written(tmp_path / "whole")[0], 1.0), updates(client())) <= 1e-6
    assert main(["resize", path, "-o", str(tmp_path / "cut"), "--rank", "2"]) == 0
    cut, config = written(tmp_path / "cut")
    assert config["r"] == 2
    assert cut[f"{PREFIX}conv3x3.lora_A.weight"].shape == (2, 4, 3, 3)
    assert torch.equal(cut[f"{PREFIX}lm_head.lora_B.weight"], cut[f"{PREFIX}model.embed_tokens.lora_embedding_A"].t())
