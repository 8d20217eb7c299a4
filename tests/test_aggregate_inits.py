"""Adapters whose initialisation changed the base weight: what is aggregated fits the original base, or the kept residual one.

PEFT judges: its own PiSSA and OLoRA, perturbed as by training, saved by it and loaded by it.
"""

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedlora_kernels as fk
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.cli import main
from fedlora_kernels.errors import InputError, MismatchError, UnsupportedVariantError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(13, 9)
        self.q_proj = nn.Linear(9, 11)
        self.up = nn.Linear(11, 5)

    def forward(self, x):
        return self.up(torch.tanh(self.q_proj(torch.tanh(self.down(x)))))


TARGETS = ["down", "q_proj", "up"]
X = torch.randn(6, 13, generator=torch.Generator().manual_seed(1))


def base():
    torch.manual_seed(5)
    return Net().eval()


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def initialised(init, rank=3, alpha=6, **fields):
    wanted = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=init, **fields)
    return peft.get_peft_model(base(), wanted).eval()


@pytest.fixture
def cohort(tmp_path):
    """Folders of an initialised model and of clients that went on from it, and the dense weights of each."""

    def make(init, count=2, **fields):
        model = initialised(init, **fields)
        quiet(model.save_pretrained, tmp_path / "start")
        folders, weights = [], []
        for k in range(count):
            client = copy.deepcopy(model)
            made = torch.Generator().manual_seed(k)
            for name, parameter in client.named_parameters():
                if "lora_" in name:
                    parameter.data += 0.1 * torch.randn(parameter.shape, generator=made)
            quiet(client.save_pretrained, tmp_path / f"c{k}")
            folders.append(str(tmp_path / f"c{k}"))
            weights.append(effective(client))
        return str(tmp_path / "start"), folders, weights

    return make


def effective(model):
    """Weights with the adapter merged, float64."""
    found = {}
    for name in TARGETS:
        layer = model.base_model.model.get_submodule(name)
        found[name] = layer.base_layer.weight.detach().double() + layer.get_delta_weight("default").detach().double()
    return found


def dense_logits(weights, shares):
    """The original model with ``W + sum_k w_k (W_k - W)``, W_k the clients' merged weights."""
    model = base().double()
    for name in TARGETS:
        W = model.get_submodule(name).weight
        W.data += sum(w * (client[name] - W.data) for w, client in zip(shares, weights, strict=True))
    with torch.no_grad():
        return model(X.double())


def peft_logits(folder):
    with torch.no_grad():
        return quiet(peft.PeftModel.from_pretrained, base(), folder).eval()(X).double()


def close(found, wanted):
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


CASES = {
    "pissa": ("pissa", {}),
    "pissa and rslora": ("pissa", {"use_rslora": True}),
    "pissa, ranks and alphas by module": ("pissa", {"rank_pattern": {"up": 2}, "alpha_pattern": {"q_proj": 5}}),
    "olora": ("olora", {}),
    "olora, alphas by module": ("olora", {"alpha_pattern": {"q_proj": 5}}),
}


@pytest.mark.parametrize("method", ["florist", "flora"])
@pytest.mark.parametrize("case", CASES)
def test_beside_what_they_started_from_the_result_fits_the_original_base(case, method, cohort, tmp_path):
    init, fields = CASES[case]
    start, folders, weights = cohort(init, **fields)
    rule = {"rule": fk.Energy(1.0)} if method == "florist" else {}
    read = ReadOptions(init_factors=start)
    with pytest.warns(
        UserWarning, match=f"init_lora_weights is '{init}', which changes the base weights; what it started"
    ):
        result = fk.aggregate(folders, method, weights=[3, 1], read=read, out=tmp_path / "out", **rule)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert close(peft_logits(tmp_path / "out"), dense_logits(weights, [0.75, 0.25]))
    if method == "florist":
        assert all(row["rank"] <= 2 * 3 + 3 for row in result.report["modules"])


@pytest.mark.parametrize("shares", [[1.0, 1.0], [1.5, -0.25]])
def test_weights_that_do_not_sum_to_one_are_right_beside_the_start(shares, cohort, tmp_path):
    start, folders, weights = cohort("pissa")
    with pytest.warns(UserWarning, match="what it started from was subtracted"):
        fk.aggregate(
            folders,
            rule=fk.Energy(1.0),
            weights=shares,
            normalize=False,
            read=ReadOptions(init_factors=start),
            out=tmp_path / "out",
        )
    assert close(peft_logits(tmp_path / "out"), dense_logits(weights, shares))


def test_one_client_is_itself_on_the_original_base(cohort, tmp_path):
    start, folders, weights = cohort("pissa", count=1)
    open_adapter(folders[0], ReadOptions(init_factors=start)).save(tmp_path / "out")
    assert close(peft_logits(tmp_path / "out"), dense_logits(weights, [1.0]))


def test_a_start_given_as_tensors_by_module_is_the_same(cohort):
    start, folders, _ = cohort("pissa")
    stored = load_file(f"{start}/adapter_model.safetensors")
    triples = {
        name: (stored[f"base_model.model.{name}.lora_A.weight"], stored[f"base_model.model.{name}.lora_B.weight"], 2.0)
        for name in TARGETS
    }
    one, two = (open_adapter(folders[0], ReadOptions(init_factors=given)) for given in (start, triples))
    for name in TARGETS:
        assert torch.equal(one[name].B, two[name].B)
        assert torch.equal(one[name].A, two[name].A)
        assert one[name].scale == two[name].scale


def ended_halfway(folders, read, out):
    """A run that keeps what it has done."""

    def end(stage, done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fk.aggregate(folders, read=read, out=out, resume=True, memory=1, progress=end)
    assert list(out.parent.glob("out.partial-*"))


def test_a_start_of_another_scale_is_another_run(cohort, tmp_path):
    """Not to be gone on with: the modules that are done had the other scale subtracted."""
    start, folders, _ = cohort("pissa")
    out, read = tmp_path / "out", ReadOptions(init_factors=start)
    ended_halfway(folders, read, out)
    config = Path(start) / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 5'))
    resumed = quiet(fk.aggregate, folders, read=read, out=out, resume=True, memory=1)
    fresh = quiet(fk.aggregate, folders, read=read, memory=1)
    for name in TARGETS:
        assert torch.equal(resumed.adapter[name].B, fresh.adapter[name].B), name
        assert torch.equal(resumed.adapter[name].A, fresh.adapter[name].A), name


def test_a_start_that_is_given_in_another_way_is_the_same_run(cohort, tmp_path):
    start, folders, _ = cohort("pissa")
    ended_halfway(folders, ReadOptions(init_factors=start), tmp_path / "out")
    read = ReadOptions(init_factors=open_adapter(start, ReadOptions(init="keep")))
    resumed = quiet(fk.aggregate, folders, read=read, out=tmp_path / "out", resume=True, memory=1)
    assert any(note.startswith("resumed: ") for note in resumed.report["notes"])


def test_another_scale_of_the_start_is_folded_into_its_half(cohort):
    start, folders, _ = cohort("pissa")
    triples = {name: (open_adapter(start, ReadOptions(init="keep"))[name], 0.75) for name in TARGETS}
    read = ReadOptions(init_factors={name: (pair.A, pair.B, scale) for name, (pair, scale) in triples.items()})
    adapter, client = open_adapter(folders[0], read), open_adapter(folders[0], ReadOptions(init="keep"))
    for name, (first, scale) in triples.items():
        pair, own = adapter[name], client[name]
        wanted = own.scale * own.B.double() @ own.A.double() - scale * first.B.double() @ first.A.double()
        assert (pair.scale * pair.B.double() @ pair.A.double() - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda triples: triples.pop("up"), "module 'up': missing in init_factors"),
        (lambda triples: triples.update(up=(torch.ones(2, 11), torch.ones(5, 2), 2.0)), "of rank 2 in init_factors"),
        (
            lambda triples: triples.update(up=(torch.ones(3, 7), torch.ones(5, 3), 2.0)),
            "5 x 7 of rank 3 in init_factors",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused(change, text, cohort):
    _, folders, _ = cohort("pissa", count=1)
    pairs = open_adapter(folders[0], ReadOptions(init="keep"))
    triples = {name: (pairs[name].A, pairs[name].B, 2.0) for name in TARGETS}
    change(triples)
    with pytest.raises(MismatchError, match=text):
        fk.aggregate(folders, read=ReadOptions(init_factors=triples))


@pytest.mark.parametrize(
    "given", [{"up": 3}, {"up": (torch.ones(2, 2), torch.ones(2, 2))}, {"up": (1, 2, float("nan"))}]
)
def test_what_is_no_start_is_refused_naming_what_is(given, cohort):
    _, folders, _ = cohort("pissa", count=1)
    with pytest.raises(InputError, match=r"init_factors, module 'up': \(A0, B0, s0\) needed"):
        fk.aggregate(folders, read=ReadOptions(init_factors=given))


def test_without_a_choice_it_is_refused(cohort):
    _, folders, _ = cohort("pissa")
    with pytest.raises(UnsupportedVariantError, match=r"init_factors=.*init='keep'") as caught:
        fk.aggregate(folders)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("method", "case"),
    [("fedit", case) for case in CASES] + [("florist", case) for case in CASES if "ranks" not in case],
)
def test_a_kept_initialisation_is_replayed_by_peft_and_the_result_fits_its_base(case, method, cohort, tmp_path):
    init, fields = CASES[case]
    _, folders, _ = cohort(init, **fields)
    rule = {"rule": fk.Rank(3)} if method == "florist" else {}
    with pytest.warns(UserWarning, match="kept as it is. The result fits the residual base"):
        result = fk.aggregate(
            folders, method, read=ReadOptions(init="keep"), out=tmp_path / "out", measure=False, **rule
        )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == init
    if init == "olora":
        assert config["lora_alpha"] == 6
    start = initialised(init, **fields)
    for name in TARGETS:  # PEFT's residual base and what we made, densely
        layer = start.base_model.model.get_submodule(name)
        pair = result.adapter[name]
        layer.base_layer.weight.data += (pair.scale * pair.B.double() @ pair.A.double()).float()
    with torch.no_grad(), start.disable_adapter():
        wanted = start(X).double()
    assert close(peft_logits(tmp_path / "out"), wanted)
    if method == "fedit":  # the mean of factors, at scale s, on that base
        pairs = [open_adapter(folder, ReadOptions(init="keep"))["q_proj"] for folder in folders]
        B, A = (sum(getattr(pair, x).double() for pair in pairs) / 2 for x in "BA")
        pair = result.adapter["q_proj"]
        assert (pair.scale * pair.B.double() @ pair.A.double() - pairs[0].scale * B @ A).norm() <= 1e-6 * (B @ A).norm()


def test_a_smaller_rank_is_padded_to_the_clients(cohort, tmp_path):
    _, folders, _ = cohort("pissa")
    with pytest.warns(UserWarning, match="kept as it is"):
        result = fk.aggregate(folders, rule=fk.Rank(1), read=ReadOptions(init="keep"), out=tmp_path / "out")
    assert {module.rank for module in result.adapter.modules.values()} == {3}
    assert not result.adapter["up"].B[:, 1:].any()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_keeps_its_start_is_saved_and_handed_out_as_it_is(init, cohort, tmp_path):
    _, folders, weights = cohort(init, count=1)
    open_adapter(folders[0], ReadOptions(init="keep")).save(tmp_path / "again")
    assert close(peft_logits(tmp_path / "again"), dense_logits(weights, [1.0]))
    with pytest.warns(UserWarning, match="kept as it is"):
        result = fk.aggregate(folders, rule=fk.Rank(3), read=ReadOptions(init="keep"))
    mine, sent = open_adapter(folders[0], ReadOptions(init="keep")), result.for_client(0)
    for name in TARGETS:
        assert sent[name].scale == mine[name].scale
        one, two = (x[name].B.double() @ x[name].A.double() for x in (mine, sent))
        assert (one - two).norm() <= 1e-5 * one.norm()


REFUSED = {
    "weights": ({"weights": [1, 1], "normalize": False}, "the weights sum to 2; 1 needed"),
    "rank": ({"rule": fk.Energy(1.0)}, r"rank 6 in the output, 3 in the clients; .*Take rule=Rank\(3\)"),
    "missing": ({"missing": "zero"}, "missing='zero'; the same modules needed"),
    "drop_zero": ({"write": WriteOptions(drop_zero=True)}, "drop_zero=True leaves modules out"),
    "robust": ({"robust": "geometric_median"}, "a robust rule compares updates"),
    "clip": ({"policy": "clip"}, "policy 'clip' compares norms"),
    "residual": ({"method": "fedex"}, "method 'fedex' gives common, residual"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_leave_the_kept_base_is_refused(case, cohort, tmp_path):
    change, text = REFUSED[case]
    read = ReadOptions(init="keep", missing=change.get("missing", "error"))
    _, folders, _ = cohort("pissa")
    options = {name: value for name, value in change.items() if name != "missing"}
    with pytest.raises(InputError, match=text):
        fk.aggregate(folders, **options, read=read, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_uniform_rank_would_change_the_kept_base(cohort):
    _, folders, _ = cohort("pissa", rank_pattern={"up": 2})
    with pytest.raises(InputError, match="uniform_rank=True changes ranks from 2 to 3"):
        fk.aggregate(folders, "fedit", read=ReadOptions(init="keep"), write=WriteOptions(uniform_rank=True))


@pytest.mark.parametrize(
    ("init", "other", "text"),
    [
        ("pissa", {"init_lora_weights": True}, "init_lora_weights is false but .*pissa"),
        ("pissa", {"init_lora_weights": "olora"}, "init_lora_weights is .*olora.* but .*pissa"),
        ("olora", {"lora_alpha": 12}, "scale 4.0 but 2.0 in client 'c0'"),
    ],
)
def test_clients_that_keep_different_starts_do_not_fit(init, other, text, cohort, tmp_path):
    _, folders, _ = cohort(init, count=3)
    path = tmp_path / "c2" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))
    with pytest.raises(MismatchError, match=text):
        fk.aggregate(folders, "fedit", read=ReadOptions(init="keep"))


def test_norms_and_robust_rules_see_what_was_learned(cohort):
    start, folders, _ = cohort("pissa", count=3)
    with pytest.warns(UserWarning, match="was subtracted"):
        result = fk.aggregate(folders, policy=Policy("clip", 1e9), read=ReadOptions(init_factors=start))
    for row, folder in zip(result.report["clients"], folders, strict=True):
        adapter = open_adapter(folder, ReadOptions(init_factors=start))
        squares = [(p.scale * p.B.double() @ p.A.double()).square().sum() for _, p in adapter.pairs()]
        assert row["norm"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-6)


def test_a_client_that_started_plainly_is_left_as_it_is(cohort):
    start, _, _ = cohort("pissa", count=1)
    plain = initialised(True)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    pair = (peft.get_peft_model_state_dict(plain), plain.peft_config["default"])
    read = ReadOptions(init_factors=start)
    assert {spec.rank for spec in open_adapter(pair, read).modules.values()} == {3}


def test_the_flags_reach_the_reader(cohort, tmp_path, capsys):
    start, folders, weights = cohort("pissa")
    out = str(tmp_path / "out")
    arguments = ["aggregate", *folders, "--quiet", "-o", out]
    assert main(arguments) == 2
    assert "with --init-factors, or stay on that base with --init keep" in capsys.readouterr().err
    assert main([*arguments, "--energy", "1", "--init-factors", start]) == 0
    assert close(peft_logits(out), dense_logits(weights, [0.5, 0.5]))
    assert "what it started from was subtracted" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--method", "fedit", "--init", "keep"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"
    assert main([*arguments, "--init", "keep", "--init-factors", start]) == 2
    assert main(["aggregate", *folders, "--quiet", "-o", start, "--overwrite", "--init-factors", start]) == 2
    assert "init_factors: the output" in capsys.readouterr().err


def test_a_start_that_cannot_be_read_is_named(cohort, tmp_path):
    _, folders, _ = cohort("pissa")
    with pytest.raises(InputError, match=r"client 'init_factors': .*absent: cannot be read"):
        fk.aggregate(folders, read=ReadOptions(init_factors=tmp_path / "absent"))


def test_resize_makes_plain_lora_of_one_that_changed_the_base(cohort, tmp_path):
    start, folders, weights = cohort("pissa", count=1)
    out = str(tmp_path / "out")
    assert main(["resize", folders[0], "-o", out, "--energy", "1", "--init-factors", start, "--quiet"]) == 0
    assert close(peft_logits(out), dense_logits(weights, [1.0]))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_a_start_that_is_not_subtracted_is_told(cohort):
    """The flag must not seem to have done what it did not."""
    start, folders, *_ = cohort(True)
    with pytest.warns(
        UserWarning, match="its initialisation leaves the base weights as they are; init_factors was not subtracted"
    ):
        fk.aggregate(folders, read=ReadOptions(init_factors=start))
