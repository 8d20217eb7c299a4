"""The table of edge cases (docs/formats.md, Edge cases), row by row: accepted with which value, refused with which words."""

import json
import os
import pickle
import re
import struct

import pytest
import torch
from adapter_problems import (
    FIRST,
    PREFIX,
    SHAPES,
    changed,
    client,
    clients,
    config,
    distance,
    poison,
    products,
    updates,
    weighted,
    without,
)
from make_adapters import make_adapter, make_clients

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.cli import main
from fedlora_kernels.errors import (
    FormatError,
    InputError,
    LimitError,
    MismatchError,
    NonFiniteError,
    OutputOverflowError,
    UnsupportedVariantError,
    WeightError,
)

ALL = fk.Energy(1.0)


def exact(pairs, weights=None, limit=1e-6, **options):
    """Aggregate without loss, and say whether the update is the dense weighted sum."""
    result = fk.aggregate(pairs, rule=ALL, weights=weights, **options)
    return distance(products(result.adapter), weighted(pairs, weights, options.get("normalize", True))) < limit


def pair_of(B, A, alpha=None, name="q", **more):
    rank = A.shape[0]
    state = {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    return state, config(rank, rank if alpha is None else alpha, target_modules=[name], **more)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def zeroed(pair, letter="B"):
    state, settings = pair
    return {key: torch.zeros_like(v) if f"lora_{letter}" in key else v for key, v in state.items()}, settings


def ranks(result):
    return {row["name"]: row["rank"] for row in result.report["modules"]}


@pytest.mark.parametrize(("m", "n", "r"), [(37, 23, 4), (7, 23, 4), (37, 7, 4), (7, 5, 4)])
def test_row_01_wide_tall_and_stacks_wider_than_either_side(m, n, r):
    pairs = [client(k, rank=r, shapes={"q": (m, n)}, dtype=torch.float64) for k in range(3)]
    assert exact(pairs, [1, 2, 3], 1e-12)


def test_row_02_ranks_beyond_the_matrix_are_cut_to_it():
    pairs = [client(k, rank=r, shapes={"q": (7, 5)}) for k, r in enumerate((1, 3, 4))]
    result = fk.aggregate(pairs, rule=fk.Rank(10**6))
    assert ranks(result) == {"q": 5}
    assert distance(products(result.adapter), weighted(pairs)) < 1e-6
    assert ranks(fk.aggregate([client(1, rank=1)], rule=fk.Rank(8))) == dict.fromkeys(SHAPES, 1)


def test_row_03_many_clients_whose_stack_is_wider_than_twice_the_matrix():
    pairs = [client(k, rank=4, shapes={"q": (40, 24)}, dtype=torch.float64) for k in range(32)]
    assert 32 * 4 >= 2 * min(40, 24)
    assert exact(pairs, limit=1e-12)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_row_04_fresh_adapters_give_zero_and_say_so(letter):
    result = fk.aggregate([zeroed(client(k), letter) for k in range(3)])
    for name, pair in result.adapter.pairs():
        assert pair.A.shape[0] == 1
        assert not pair.B.any()
        assert torch.equal(pair.A[0], torch.eye(1, pair.A.shape[1])[0]), name
    assert all("ZERO" in row["notes"] for row in result.report["modules"])


def test_row_05_duplicates_have_the_rank_of_one():
    pair = client(1, rank=3)
    result = fk.aggregate([pair, ({k: v.clone() for k, v in pair[0].items()}, pair[1])], rule=ALL)
    assert ranks(result) == dict.fromkeys(SHAPES, 3)
    assert distance(products(result.adapter), updates(pair)) < 1e-6


def test_row_06_a_client_and_its_negative_cancel_to_zero_not_to_noise():
    pair = client(1, rank=3)
    negative = {key: -v if "lora_B" in key else v for key, v in pair[0].items()}, pair[1]
    result = fk.aggregate([pair, negative], rule=ALL)
    assert ranks(result) == dict.fromkeys(SHAPES, 1)
    assert not any(p.B.any() for _, p in result.adapter.pairs())


def test_row_07_equal_singular_values_keep_the_update_and_the_subspace():
    U, V = (torch.linalg.qr(drawn(n, 4, seed=n)).Q for n in (37, 23))
    turned = [torch.linalg.qr(drawn(4, 4, seed=k)).Q for k in (1, 2)]
    pairs = [pair_of(U @ Q, Q.T @ V.T) for Q in turned]  # both are U V^T, all singular values 1
    result = fk.aggregate(pairs, rule=ALL)
    pair = result.adapter["q"]
    assert ranks(result) == {"q": 4}
    basis = torch.linalg.qr(pair.B).Q
    assert (basis @ basis.T - U @ U.T).norm() < 1e-12
    assert (pair.B @ pair.A - U @ V.T).norm() < 1e-12


def test_row_08_magnitudes_and_gauge_change_neither_update_nor_rank():
    small, large = (client(k, rank=3, dtype=torch.float64) for k in (1, 2))
    small = {key: v * (1e-8 if "lora_B" in key else 1e4) for key, v in small[0].items()}, small[1]
    gauged = {key: v * (1e6 if "lora_B" in key else 1e-6) for key, v in large[0].items()}, large[1]
    one, two = (fk.aggregate([small, other], rule=fk.Energy(0.9)) for other in (large, gauged))
    assert ranks(one) == ranks(two)
    assert distance(products(one.adapter), products(two.adapter)) < 1e-10


@pytest.mark.parametrize(
    ("rule", "values", "rank"),
    [
        (fk.Energy(0.9), (3.0, 0.8, 0.6), 1),  # 9 of 10
        (fk.Energy(0.9 + 1e-9), (3.0, 0.8, 0.6), 2),
        (fk.Energy(1.0), (3.0, 0.8, 1e-6), 3),
        (fk.Frobenius(0.8), (4.0, 3.0, 0.0), 1),  # 16 of 25
        (fk.SingularValueSum(0.6), (3.0, 1.0, 1.0), 1),
        (fk.SingularValueSum(0.6 + 1e-9), (3.0, 1.0, 1.0), 2),
        (fk.SingularValueSum(1.0), (3.0, 1.0, 1.0), 3),
        (fk.SingularValueRatio(1.0), (3.0, 2.0, 1.0), 1),
        (fk.SingularValueRatio(3.0), (3.0, 2.0, 1.0), 2),  # a tie is dropped
        (fk.SingularValueRatio(3.0 + 1e-9), (3.0, 2.0, 1.0), 3),
        (fk.Absolute(1.0), (3.0, 2.0, 1.0), 2),
        (fk.Absolute(1.0 - 1e-9), (3.0, 2.0, 1.0), 3),
    ],
)
def test_row_09_thresholds_hit_exactly(rule, values, rank):
    B, A = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(3, 7, dtype=torch.float64)
    B[:3], A[:, :3] = torch.diag(torch.tensor(values, dtype=torch.float64)), torch.eye(3, dtype=torch.float64)
    assert ranks(fk.aggregate([pair_of(B, A)], rule=rule)) == {"q": rank}


def test_row_10_negative_weights_only_without_normalising():
    pairs = clients()
    with pytest.raises(
        WeightError, match=r"client 'client_1': weight -0.5 is negative; at least 0 needed. normalize=False"
    ):
        fk.aggregate(pairs, weights=[1, -0.5, 1])
    assert exact(pairs, [1, -0.5, 1], normalize=False)
    saved = [({**s, f"{PREFIX}score.weight": torch.ones(3, 4)}, {**c, "modules_to_save": ["score"]}) for s, c in pairs]
    with pytest.raises(InputError, match=r"the weights sum to 1\.5, and a mean of values needs 1"):
        fk.aggregate(saved, weights=[1, -0.5, 1], normalize=False)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([1, float("nan"), 1], "client 'client_1': weight nan; a finite number needed"),
        ([1, 1, float("inf")], "client 'client_2': weight inf; a finite number needed"),
        ([0, 0, 0], "weights are all 0; client 'client_0' or another one needs a weight above 0"),
        ([1, 1], "2 weights for 3 clients; one per client needed"),
    ],
)
def test_row_11_weights_that_cannot_be_used_are_named(weights, text):
    with pytest.raises(WeightError, match=text):
        fk.aggregate(clients(), weights=weights)


def test_row_12_a_client_of_weight_zero_is_checked_and_never_read():
    pairs = clients()
    bad = changed(client(9, rank=3), "A", poison())  # NaN would end the run if it was read
    result = fk.aggregate([*pairs, bad], rule=ALL, weights=[1, 2, 3, 0])
    assert distance(products(result.adapter), weighted(pairs, [1, 2, 3])) < 1e-6
    assert result.report["clients"][3]["status"] == "absent"
    with pytest.raises(MismatchError, match="client 'client_3'"):
        fk.aggregate([*pairs, without(bad, FIRST)], weights=[1, 2, 3, 0])


def test_row_13_mixed_ranks_alphas_and_rslora():
    assert exact([client(1, rank=2, alpha=7), client(2, rank=5, alpha=3, use_rslora=True), client(3, rank=4)])


def test_row_14_a_module_that_some_lack():
    whole, part = client(1), without(client(2), FIRST)
    with pytest.raises(MismatchError, match=f"client 'client_1', module '{FIRST}': missing here") as caught:
        fk.aggregate([client(3), part, whole])
    assert "missing='renormalize'" in str(caught.value)
    zero, mean = (
        fk.aggregate([whole, part], rule=ALL, read=ReadOptions(missing=how)) for how in ("zero", "renormalize")
    )
    own = updates(whole)[FIRST]
    assert (products(zero.adapter)[FIRST] - own / 2).norm() < 1e-6 * own.norm()
    assert (products(mean.adapter)[FIRST] - own).norm() < 1e-6 * own.norm()
    assert any("means over their owners" in note for note in mean.report["notes"])


def test_row_15_disjoint_modules_show_one_of_each_side():
    other = {key.replace("model.layers", "layers"): v for key, v in client(2)[0].items()}, config()
    with pytest.raises(MismatchError) as caught:
        fk.aggregate([client(1), other, client(3)])
    assert "'layers.0." in str(caught.value)
    assert "'model.layers.0." in str(caught.value)


def test_row_16_another_shape_is_refused_with_both():
    other = client(2, shapes={**SHAPES, FIRST: (37, 24)})
    with pytest.raises(
        MismatchError, match=f"client 'b', module '{FIRST}': 37 x 24 but 37 x 23 in client 'a'; equal shapes"
    ):
        fk.aggregate({"a": client(1), "b": other, "c": client(3)})


def test_row_17_rank_1_client_is_never_broadcast():
    pairs = [client(1, rank=8), client(2, rank=1)]
    assert exact(pairs)
    result = fk.aggregate(pairs, rule=ALL)
    assert ranks(result) == dict.fromkeys(SHAPES, 9)
    with pytest.raises(MismatchError, match="rank 1, but 8 in client 'client_0'"):
        fk.aggregate(pairs, "fedit")


def test_row_18_factors_of_different_inner_sizes():
    with pytest.raises(
        FormatError, match=r"client 'client_0', module 'q': lora_A \(4, 7\) has 4 rows, lora_B \(5, 8\) has 8 columns"
    ):
        fk.aggregate([pair_of(drawn(5, 8), drawn(4, 7))])


@pytest.mark.parametrize(("m", "n", "r"), [(4, 9, 4), (9, 4, 4)])
def test_row_19_a_layer_of_the_size_of_the_rank(m, n, r):
    pairs = [pair_of(drawn(m, r, seed=k), drawn(r, n, seed=k + 9)) for k in range(2)]
    result = fk.aggregate(pairs, rule=ALL)
    wanted = sum(s[f"{PREFIX}q.lora_B.weight"] @ s[f"{PREFIX}q.lora_A.weight"] for s, _ in pairs) / 2
    assert distance(products(result.adapter), {"q": wanted}) < 1e-12


def test_row_20_a_configured_rank_that_is_not_the_tensors():
    state, settings = client(1, rank=4, alpha=8)
    wrong = state, {**settings, "r": 8}
    with pytest.raises(FormatError, match="the configuration says rank 8, the tensors have 4; equal ranks needed"):
        fk.aggregate([wrong])
    with pytest.warns(
        UserWarning, match="the configuration says rank 8, the tensors have 4; the tensors' rank is used"
    ):
        result = fk.aggregate([wrong], rule=ALL, read=ReadOptions(rank_from="tensor"))
    assert distance(products(result.adapter), updates((state, settings))) < 1e-6


def test_row_21_alpha_zero_is_a_zero_update_in_peft_and_refused_in_kohya():
    silent = changed(client(1, alpha=0), "A", poison())  # its data is not read
    with pytest.warns(UserWarning, match="lora_alpha is 0, so the update is zero"):
        result = fk.aggregate([silent, client(2)], rule=ALL)
    half = {name: D / 2 for name, D in updates(client(2)).items()}
    assert distance(products(result.adapter), half) < 1e-6
    kohya = {"lora_unet_q.lora_down.weight": torch.ones(2, 7), "lora_unet_q.lora_up.weight": torch.ones(5, 2)}
    with pytest.raises(FormatError, match="alpha"):
        fk.aggregate([{**kohya, "lora_unet_q.alpha": torch.tensor(0.0)}])


@pytest.mark.parametrize(("part", "value"), [("A", float("nan")), ("B", float("-inf"))])
def test_row_22_a_bad_number_is_found(part, value):
    with pytest.raises(NonFiniteError, match=rf"client 'b', module '{FIRST}', lora_{part}: {value} at index \(1, 2\)"):
        fk.aggregate({"a": client(1), "b": changed(client(2), part, poison(value))})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_23_half_precision_is_computed_wider(dtype):
    pairs = clients(dtype=dtype)
    assert exact(pairs)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_row_24_other_dtypes_are_refused_by_name(dtype):
    state, settings = client(1)
    key = f"{PREFIX}{FIRST}.lora_B.weight"
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(FormatError, match=f"tensor '{key}' is {name}; float64, float32, float16 or bfloat16 needed"):
        fk.aggregate([({**state, key: state[key].to(dtype)}, settings)])


def test_row_25_overflow_of_the_output_is_named_before_anything_is_written(tmp_path):
    loud = changed(client(1), "B", lambda B: B * 1e6)
    with pytest.raises(
        OutputOverflowError, match=rf"module '{FIRST}': max\|x\| of the result is .*float16 holds 6.55e\+04"
    ):
        fk.aggregate([loud, client(2)], dtype="float16", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_row_26_views_of_every_kind_are_read_and_left_alone():
    state, settings = client(1, dtype=torch.float64)
    views = {
        "transposed": lambda x: x.t().contiguous().t(),
        "offset": lambda x: torch.cat([x, x])[x.shape[0] :],
        "strided": lambda x: torch.stack([x, x], 1).reshape(2 * x.shape[0], -1)[::2],
        "trained": lambda x: x.clone().requires_grad_(True),
    }
    wanted = updates((state, settings))
    for how, view in views.items():
        seen = {key: view(value) for key, value in state.items()}
        before = {key: value.detach().clone() for key, value in seen.items()}
        assert distance(products(fk.aggregate([(seen, settings)], rule=ALL).adapter), wanted) < 1e-12, how
        assert all(torch.equal(before[key], seen[key]) for key in seen)
    flat = {key: (value[:1].expand(value.shape) if "lora_A" in key else value) for key, value in state.items()}
    assert distance(products(fk.aggregate([(flat, settings)], rule=ALL).adapter), updates((flat, settings))) < 1e-12


def test_row_27_devices_are_checked_by_a_call_and_data_moved_by_aggregate():
    A, B = torch.ones(1, 2, 7), torch.ones(1, 5, 2, device="meta")
    with pytest.raises(fk.FedLoRAError):
        fk.product_svd(B, A, rule=fk.Rank(1))
    with pytest.raises(FormatError, match="is on the meta device; a dense tensor with data needed"):
        fk.aggregate([({key: v.to("meta") for key, v in client(1)[0].items()}, config())])


def test_row_28_spellings_of_one_key_and_two_keys_of_one_meaning():
    state, settings = client(1)
    for prefix in ("", "model.base_model.model.", "module.base_model.model."):
        renamed = {prefix + key.removeprefix(PREFIX): value for key, value in state.items()}
        assert (
            distance(products(fk.aggregate([(renamed, settings)], rule=ALL).adapter), updates((state, settings))) < 1e-6
        )
    named = {key.replace(".weight", ".default.weight"): value for key, value in state.items()}
    assert distance(products(fk.aggregate([(named, settings)], rule=ALL).adapter), updates((state, settings))) < 1e-6
    key = f"{PREFIX}{FIRST}.lora_A.weight"
    with pytest.raises(FormatError, match="are ambiguous"):
        fk.aggregate([({**state, key.removeprefix(PREFIX): state[key]}, settings)])


def test_row_29_a_lone_factor_and_an_unknown_one():
    state, settings = client(1)
    lone = {key: value for key, value in state.items() if key != f"{PREFIX}{FIRST}.lora_B.weight"}
    with pytest.raises(FormatError, match=f"module '{FIRST}': lora_A without lora_B; both needed"):
        fk.aggregate([(lone, settings)])
    with pytest.raises(UnsupportedVariantError, match=r"unknown tensor '.*lora_C.weight'"):
        fk.aggregate([({**state, f"{PREFIX}{FIRST}.lora_C.weight": torch.ones(2)}, settings)])


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("use_dora", True, "DoRA"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("peft_type", "LOHA", "LoHa"),
        ("peft_type", "ADALORA", "AdaLoRA"),
        ("velora_config", {"num_groups": 2}, "VeLoRA"),
    ],
)
def test_row_30_variants_are_refused_by_name(field, value, name):
    state, settings = client(1)
    with pytest.raises(
        UnsupportedVariantError, match=rf"client 'c': adapter uses {name} \(.*; .*cannot be aggregated here\. "
    ):
        fk.aggregate({"c": (state, {**settings, field: value})})


def test_row_31_an_initialisation_that_changed_the_base_needs_a_choice():
    pair = client(1, init_lora_weights="pissa")
    with pytest.raises(UnsupportedVariantError, match=r"init_lora_weights is 'pissa'.*init_factors=, or .*init='keep'"):
        fk.aggregate([pair])
    start = {name: (torch.zeros(4, n), torch.zeros(m, 4), 2.0) for name, (m, n) in SHAPES.items()}
    with pytest.warns(UserWarning, match="init_lora_weights is 'pissa', which changes the base weights"):
        result = fk.aggregate([pair], rule=ALL, read=ReadOptions(init_factors=start))
    assert distance(products(result.adapter), updates(pair)) < 1e-6


def test_row_32_groups_and_tucker_are_refused_by_name():
    grouped = {"c.lora_A.weight": torch.ones(2, 7, 3, 3), "c.lora_B.weight": torch.ones(6, 1, 1, 1)}
    with pytest.raises(UnsupportedVariantError, match="a grouped convolution"):
        fk.aggregate([(grouped, config(2, 2))])
    tucker = {f"lora_unet_c.lora_{part}.weight": torch.ones(2, 2, 1, 1) for part in ("down", "up", "mid")}
    with pytest.raises(UnsupportedVariantError, match="Tucker"):
        fk.aggregate([tucker])


EXPERTS = ["experts.gate_up_proj"]


def experts(E=3, r=2, rows=None, version="0.21.2", m=5, n=7):
    rows = E * r if rows is None else rows
    key = f"{PREFIX}mlp.experts.lora_"
    state = {f"{key}A.weight": torch.ones(rows, n), f"{key}B.weight": torch.ones(m, rows)}
    return state, config(r, r, target_modules=[], target_parameters=EXPERTS, peft_version=version)


@pytest.mark.parametrize(
    ("others", "kind"),
    [
        ([experts(rows=7)], FormatError),
        ([experts(E=3), experts(E=4)], MismatchError),
        ([experts(version="0.18.1"), experts(version="0.19.0")], MismatchError),
    ],
)
def test_row_33_experts_that_do_not_fit(others, kind):
    with pytest.raises(kind):
        fk.aggregate(others)


def test_row_34_an_extra_tensor_in_one_client_only():
    first, second = client(1), client(2)
    owner = {**first[0], f"{PREFIX}score.weight": torch.full((3, 4), 5.0)}, {**first[1], "modules_to_save": ["score"]}
    with pytest.raises(MismatchError, match="score"):
        fk.aggregate([owner, second])
    result = fk.aggregate([owner, second], read=ReadOptions(extras="owners"))
    assert torch.equal(result.adapter.extra("score.weight"), torch.full((3, 4), 5.0))


def test_row_35_vocabularies_of_different_size():
    sizes = [
        ({**s, f"{PREFIX}lm_head.weight": torch.ones(v, 4)}, c)
        for v, (s, c) in zip((11, 13), clients((2, 2)), strict=True)
    ]
    with pytest.raises(
        MismatchError, match=r"shape \(13, 4\) but \(11, 4\) in client 'client_0'; equal shapes needed \(vocabulary"
    ):
        fk.aggregate(sizes)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_row_36_a_pickle_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps(config()))
    (tmp_path / "c" / "adapter_model.bin").write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(FormatError, match=r"cannot be loaded with weights_only=True .*re-save it as safetensors"):
        fk.aggregate([tmp_path / "c"])
    assert not (tmp_path / "exploded").exists()


FILES = {
    "empty": b"",
    "truncated": None,
    "no tensors": struct.pack("<Q", 2) + b"{}",
    "no safetensors": b"PK" * 50,
    "header beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
}


@pytest.mark.parametrize("case", FILES)
def test_row_37_broken_files_are_named_without_a_traceback(case, tmp_path, capsys):
    folder = make_adapter(tmp_path / "c")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7] if FILES[case] is None else FILES[case])
    with pytest.raises(FormatError, match="no tensors" if case == "no tensors" else "adapter_model.safetensors"):
        fk.aggregate([folder])
    assert main(["aggregate", str(folder), "-o", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fedlora: error: client 'c'")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("cap", "value"),
    [("rank_per_client", 3), ("clients", 1), ("output_elements", 50), ("stacked_rank", 7), ("bytes_per_client", 99)],
)
def test_row_38_caps_say_which_and_how_to_raise_them(cap, value, tmp_path, capsys):
    words = cap.replace("_", " ")
    text = rf"{words} is \d+; at most {value}. Raise it with ReadOptions\(limits=Limits\({cap}=\d+\)\)"
    with pytest.raises(LimitError, match=text):
        fk.aggregate(clients((4, 4)), read=ReadOptions(limits=Limits(**{cap: value})))
    arguments = ["aggregate", *make_clients(tmp_path, 2, (4, 4)), "-o", str(tmp_path / "out"), "--quiet"]
    assert main([*arguments, "--limit", f"{cap}={value}"]) == 2
    shown = capsys.readouterr().err
    assert re.search(rf"{words} is \d+; at most {value}\. Raise it with --limit {cap}=\d+$", shown.splitlines()[0])
    assert main([*arguments, "--limit", f"{cap}=99999"]) == 0


def test_row_39_no_clients_and_one_client_twice(tmp_path):
    with pytest.raises(InputError, match="no clients; at least one needed"):
        fk.aggregate([])
    folder = make_adapter(tmp_path / "c")
    with pytest.warns(UserWarning, match="clients 'c' and 'c_2' are the same adapter; it counts twice"):
        fk.aggregate([folder, folder])
    copy = make_adapter(tmp_path / "copy")
    with pytest.warns(UserWarning, match="clients 'c' and 'copy' have the same content; it counts twice"):
        fk.aggregate([folder, copy])


@pytest.mark.parametrize(("m", "n"), [(1, 7), (7, 1), (1, 1), (5, 7)])
def test_row_40_the_smallest_problems(m, n):
    assert exact([client(1, rank=1, shapes={"q": (m, n)})])


def test_row_41_order_and_splits_do_not_matter():
    pairs = clients(dtype=torch.float64)
    once = fk.aggregate(pairs, rule=fk.Energy(0.9), weights=[1, 2, 3])
    again = fk.aggregate(pairs, rule=fk.Energy(0.9), weights=[1, 2, 3])
    assert all(
        torch.equal(p.B, again.adapter[n].B) and torch.equal(p.A, again.adapter[n].A) for n, p in once.adapter.pairs()
    )
    turned = fk.aggregate(pairs[::-1], rule=fk.Energy(0.9), weights=[3, 2, 1])
    with pytest.warns(UserWarning, match="counts twice"):
        split = fk.aggregate([*pairs, pairs[2]], rule=fk.Energy(0.9), weights=[1, 2, 1.5, 1.5])
    for other in (turned, split):
        assert ranks(other) == ranks(once)
        assert distance(products(other.adapter), products(once.adapter)) < 1e-12


def test_row_42_aggregates_of_aggregates():
    pairs = clients(dtype=torch.float64)
    part = fk.aggregate(pairs[:2], rule=ALL, weights=[1, 2]).adapter
    whole = fk.aggregate([part, pairs[2]], rule=ALL, weights=[3, 4])
    assert distance(products(whole.adapter), weighted(pairs, [1, 2, 4])) < 1e-12


def test_row_43_a_gauge_of_one_client_changes_nothing():
    pairs = clients(dtype=torch.float64)
    Q = torch.linalg.qr(drawn(4, 4)).Q
    turned = {k: v @ Q if "lora_B" in k else Q.T @ v for k, v in pairs[0][0].items()}, pairs[0][1]
    one, two = (fk.aggregate([first, *pairs[1:]], rule=fk.Energy(0.9)) for first in (pairs[0], turned))
    assert ranks(one) == ranks(two)
    assert distance(products(one.adapter), products(two.adapter)) < 1e-12


def test_row_44_rotations_keep_reflections_and_flag_what_is_not_unique():
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    source = torch.linalg.qr(drawn(7, 3)).Q
    kept = fk.procrustes_rotation(source, source @ mirror)
    assert (kept.Q - mirror).norm() < 1e-12
    assert bool(kept.unique)
    assert torch.det(fk.procrustes_rotation(source, source @ mirror, special=True).Q) > 0
    nothing = fk.procrustes_rotation(source, torch.zeros_like(source))
    assert torch.equal(nothing.Q, torch.eye(3, dtype=torch.float64))
    assert not bool(nothing.unique)
    one = fk.procrustes_rotation(source[:, :1], -2.0 * source[:, :1])
    assert one.Q.tolist() == [[-1.0]]


def test_row_45_the_output_is_old_or_new_never_half(tmp_path, monkeypatch):
    folders = make_clients(tmp_path, 3)
    out = tmp_path / "out"
    fk.aggregate(folders[:2], out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="exists"):
        fk.aggregate(folders, out=out)
    real = os.fsync

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(fk.RunError, match="No space left"):
        fk.aggregate(folders, out=out, overwrite=True)
    monkeypatch.setattr(os, "fsync", real)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0", "c1", "c2", "out"]


def test_row_46_another_base_model_is_warned_of():
    with pytest.warns(
        UserWarning, match="base_model_name_or_path differs: '/a/base' in client 'x', '/b/base' in client 'y'"
    ):
        fk.aggregate(
            {
                k: client(i, base_model_name_or_path=f"/{b}/base")
                for i, (k, b) in enumerate(zip("xy", "ab", strict=True))
            }
        )
