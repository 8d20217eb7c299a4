"""AdaLoRA folded into plain pairs: PEFT's own delta before and after pruning, its logits after loading what we write."""

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.cli import main
from fedlora_kernels.errors import FormatError, UnsupportedVariantError

FOLD = ReadOptions(adalora="fold")
MASKS = {
    "none": None,
    "some": {"up": [True, False, True, False, True], "layers.0.q_proj": [False, True, True, True, True]},
    "nothing left": {"up": [False] * 5, "down": [True, True, False, False, False]},
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(7, 11)

    def forward(self, x):
        return torch.tanh(self.q_proj(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(13, 7)
        self.layers = nn.ModuleList([Block()])
        self.up = nn.Linear(11, 3)

    def forward(self, x):
        return self.up(self.layers[0](self.down(x)))


def trained(masks=None, alpha=6, **fields):
    torch.manual_seed(3)
    base = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.AdaLoraConfig(
            init_r=5, target_r=3, lora_alpha=alpha, total_step=10, target_modules=["q_proj", "up", "down"], **fields
        )
        model = peft.get_peft_model(copy.deepcopy(base), wanted)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    if masks:
        pattern = {f"{name}.lora_E.default": mask for name, mask in masks.items()}
        model.peft_config["default"].rank_pattern = pattern
        # as its allocator does: components that are masked have no weight
        for name, mask in masks.items():
            model.base_model.model.get_submodule(name).lora_E["default"].data[~torch.tensor(mask)] = 0.0
    return model.eval(), base


def save(model, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have invalid shape.*")  # what no component is left of
        model.save_pretrained(path)


def deltas(model):
    found = model.base_model.model.named_modules()
    return {n: m.get_delta_weight("default").detach().double() for n, m in found if hasattr(m, "get_delta_weight")}


def logits(model):
    with torch.no_grad():
        return model(torch.randn(5, 13, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("masks", MASKS)
def test_the_folded_update_is_pefts_own_delta(masks, tmp_path):
    model, _ = trained(MASKS[masks])
    wanted = deltas(model)
    save(model, tmp_path / "c")
    stored = load_file(tmp_path / "c" / "adapter_model.safetensors")
    assert "base_model.model.up.lora_A" in stored  # without .weight
    adapter = open_adapter(tmp_path / "c", FOLD)
    assert set(adapter) == set(wanted)
    for name, delta in wanted.items():
        pair = adapter[name]
        assert (pair.scale * (pair.B.double() @ pair.A.double()) - delta).norm() <= 1e-6 * delta.norm()
    if masks != "none":
        assert {module.rank for module in adapter.modules.values()} == ({3, 4, 5} if masks == "some" else {1, 2, 5})


@pytest.mark.parametrize("masks", MASKS)
def test_peft_loads_the_folded_adapter_with_the_same_logits(masks, tmp_path):
    model, base = trained(MASKS[masks])
    wanted = logits(model)
    save(model, tmp_path / "c")
    open_adapter(tmp_path / "c", FOLD).save(tmp_path / "out")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    assert back.peft_config["default"].peft_type == "LORA"
    assert (logits(back) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_live_state_dict_with_masks_not_yet_cut_is_the_same_adapter():
    model, _ = trained(MASKS["some"])
    wanted = deltas(model)
    state = {key: value for key, value in model.state_dict().items() if "lora_" in key or "ranknum" in key}
    assert any(key.endswith("lora_E.default") for key in state)
    adapter = open_adapter((state, model.peft_config["default"]), FOLD)
    assert adapter.modules["up"].rank == 3
    for name, delta in wanted.items():
        pair = adapter[name]
        assert (pair.scale * (pair.B.double() @ pair.A.double()) - delta).norm() <= 1e-6 * delta.norm()


def saved(alpha=6, **change):
    state = {}
    for name, (m, n, r) in {"a.q": (5, 7, 2), "v": (3, 4, 3)}.items():
        made = torch.Generator().manual_seed(m)
        shapes = {"A": (r, n), "B": (m, r), "E": (r, 1)}
        state |= {f"base_model.model.{name}.lora_{x}": torch.randn(s, generator=made) for x, s in shapes.items()}
    config = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": alpha, "target_modules": ["q", "v"]}
    return state, {**config, **change}


def test_half_precision_is_folded_in_single():
    state, config = saved()
    half = {key: value.to(torch.bfloat16) for key, value in state.items()}
    pair = open_adapter((half, config), FOLD)["v"]
    B, A, E = (half[f"base_model.model.v.lora_{x}"].double() for x in "BAE")
    exact = 6 / (4 + 1e-5) * (B * E.T @ A)
    assert pair.B.dtype == torch.float32
    assert pair.A.dtype == torch.bfloat16
    assert (pair.B.double() @ pair.A.double() - exact).norm() <= 1e-7 * exact.norm()


def test_without_the_choice_it_is_refused_by_name():
    with pytest.raises(UnsupportedVariantError, match=r"adapter uses AdaLoRA .*adalora='fold'"):
        open_adapter(saved(), name="c")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"init_r": 0}, "init_r is 0; an integer of at least 1 needed"),
        ({"init_r": 10**30}, "an integer of at least 1 needed"),
        ({"lora_alpha": 0}, "lora_alpha is 0; a positive number needed"),
        ({"lora_alpha": 10**400}, "a positive number needed"),
        ({"rank_pattern": [1]}, "a mapping from AdaLoRA tensors to masks needed"),
        ({"rank_pattern": {"v.lora_E": [1, 0, 1]}}, "a mapping from AdaLoRA tensors to masks needed"),
        ({"rank_pattern": {"v": [True]}}, "entry 'v' names no lora_E"),
        ({"rank_pattern": {"v.lora_E": [True, True]}}, "rank 3, but its mask in rank_pattern keeps 2 of 2"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(change, text):
    with pytest.raises(FormatError, match=text) as caught:
        open_adapter(saved(**change), FOLD, name="c")
    assert str(caught.value).startswith("client 'c'")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("v.lora_E", None, "without lora_E"),
        ("v.lora_E", torch.ones(2, 1), "(r, n), (m, r) and (r, 1) needed"),
        ("v.lora_E", torch.ones(3), "(r, n), (m, r) and (r, 1) needed"),
        ("v.lora_B", torch.ones(3, 2), "(r, n), (m, r) and (r, 1) needed"),
        ("v.lora_A", torch.ones(3, 4, dtype=torch.int8), "is int8"),
        ("v.lora_A", torch.ones(()), "(r, n), (m, r) and (r, 1) needed"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(key, value, text):
    state, config = saved()
    if value is None:
        del state[f"base_model.model.{key}"]
    else:
        state[f"base_model.model.{key}"] = value
    with pytest.raises(FormatError) as caught:
        open_adapter((state, config), FOLD, name="c")
    assert str(caught.value).startswith("client 'c', module 'v': ")
    assert text in str(caught.value)


def test_the_flag_folds_and_another_client_may_be_plain(tmp_path, capsys):
    model, _ = trained(MASKS["some"])
    save(model, tmp_path / "ada")
    open_adapter(tmp_path / "ada", FOLD).save(tmp_path / "plain")
    clients = [str(tmp_path / name) for name in ("ada", "plain")]
    arguments = ["aggregate", *clients, "--quiet", "--energy", "1", "-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "with --adalora fold" in capsys.readouterr().err
    assert main([*arguments, "--adalora", "fold"]) == 0
    out, plain = open_adapter(tmp_path / "out"), open_adapter(tmp_path / "plain")
    for name, pair in out.pairs():
        wanted = plain[name].B.double() @ plain[name].A.double()
        assert (pair.B.double() @ pair.A.double() - wanted).norm() <= 1e-6 * wanted.norm()
