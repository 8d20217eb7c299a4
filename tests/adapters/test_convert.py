"""convert: the same update in the other format, tensors bit by bit, names from a prefix, a mapping or a base model."""

import json
import math
import os

import pytest
import torch
from adapter_files import config, dense, folder, state
from hypothesis import given, settings
from hypothesis import strategies as st
from kohya_files import FIRST, SHAPES, distance, kohya_file, tensors, updates
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedlora_kernels.adapters.convert import alpha_of, convert
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.cli import main
from fedlora_kernels.errors import FormatError, InputError, NonFiniteError, UnsupportedVariantError

PATHS = {
    "lora_unet_down_blocks_0_attn1_to_q": "down_blocks.0.attn1.to_q",
    "lora_unet_mid_block_proj_in": "mid_block.proj_in",
    "lora_unet_down_blocks_0_resnets_0_conv1": "down_blocks.0.resnets.0.conv1",
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "text_model.encoder.layers.0.mlp.fc1",
}
UNET = {name: SHAPES[name] for name in PATHS if "unet" in name}


def peft_updates(path):
    """The update of every module of a PEFT folder, by the definition of its format."""
    raw, settings_ = (
        load_file(path / "adapter_model.safetensors"),
        json.loads((path / "adapter_config.json").read_text()),
    )
    found = {}
    for key, A in raw.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = settings_.get("rank_pattern", {}).get(name, settings_["r"])
            assert rank == A.shape[0]
            alpha = settings_.get("alpha_pattern", {}).get(name, settings_["lora_alpha"])
            B = raw[key.replace("lora_A", "lora_B")]
            found[name] = B.double().flatten(1) @ A.double().flatten(1) * (alpha / rank)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_from_kohya_to_peft_and_back_is_the_same_bit_by_bit(tmp_path, dtype):
    path = kohya_file(tmp_path / "a.safetensors", dtype=dtype, alpha=0.7, alpha_dtype=torch.float32)
    convert(path, tmp_path / "peft", "peft", names=PATHS)
    wanted = {PATHS[name]: update for name, update in updates(path).items()}
    assert distance(peft_updates(tmp_path / "peft"), wanted) < 1e-15
    convert(tmp_path / "peft", tmp_path / "b.safetensors", "kohya", names=PATHS)
    one, two = load_file(path), load_file(tmp_path / "b.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)


def test_peft_reads_what_was_converted(tmp_path):
    from peft import PeftModel

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = torch.nn.Conv2d(4, 6, 3), torch.nn.Linear(24, 5)

        def forward(self, x):
            return self.fc(self.conv(x).flatten(1))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 4, 4, 4)
    shapes = {"lora_unet_conv": (6, (4, 3, 3)), "lora_unet_fc": (5, 24)}
    path = kohya_file(tmp_path / "a.safetensors", shapes=shapes, ranks=(2, 3), alpha=1.5)
    convert(path, tmp_path / "peft", "peft", names={"lora_unet_conv": "conv", "lora_unet_fc": "fc"})
    merged = Net()
    merged.load_state_dict(net.state_dict())
    with torch.no_grad():
        merged.conv.weight += updates(path)["lora_unet_conv"].reshape(6, 4, 3, 3).float()
        merged.fc.weight += updates(path)["lora_unet_fc"].float()
    adapted = PeftModel.from_pretrained(net, tmp_path / "peft")
    assert torch.allclose(adapted(x), merged(x), atol=1e-5)


def test_from_peft_to_kohya_with_a_prefix(tmp_path):
    source = folder(tmp_path / "peft", state(), config(alpha_pattern={"layers.1.q_proj": 5}))
    adapter = convert(source, tmp_path / "a.safetensors", "kohya", prefix="lora_te_")
    found = load_file(tmp_path / "a.safetensors")
    assert list(adapter) == ["lora_te_layers_0_q_proj", "lora_te_layers_0_v_proj", "lora_te_layers_1_q_proj"]
    wanted = {f"lora_te_{name.replace('.', '_')}": update for name, update in dense(open_adapter(source)).items()}
    assert distance(updates(found), wanted) < 1e-15
    assert torch.equal(
        found["lora_te_layers_0_q_proj.lora_up.weight"], state()["base_model.model.layers.0.q_proj.lora_B.weight"]
    )
    assert found["lora_te_layers_1_q_proj.alpha"].item() == 5.0
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_module"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (
        "networks.lora", "Dynamic", "Dynamic",
    )  # fmt: skip


def test_rslora_becomes_an_alpha_of_the_same_scale(tmp_path):
    source = folder(tmp_path / "peft", state(), config(use_rslora=True))
    convert(source, tmp_path / "a.safetensors", "kohya", prefix="lora_te_")
    wanted = {f"lora_te_{name.replace('.', '_')}": update for name, update in dense(open_adapter(source)).items()}
    assert distance(updates(tmp_path / "a.safetensors"), wanted) < 1e-15


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.floats(1e-6, 1e6), st.integers(1, 512))
def test_an_alpha_gives_back_its_scale(alpha, rank):
    scale = alpha / rank
    assert alpha_of(scale, rank) / rank == scale


@pytest.mark.parametrize("rank", [3, 7, 11, 49, 255])
def test_alphas_that_single_precision_holds_come_back_to_the_bit(rank):
    for alpha in torch.linspace(0.1, 99.7, 500, dtype=torch.float32).double().tolist():
        assert alpha_of(alpha / rank, rank) == alpha


def test_an_alpha_beside_one_of_single_precision_is_not_taken_for_it():
    for rank in range(2, 100):
        scale = math.nextafter(math.nextafter(6.0, 7.0), 7.0) / rank
        assert alpha_of(scale, rank) / rank == scale


def test_a_scale_without_an_alpha_gets_the_nearest_one():
    for rank in range(2, 200):
        scale = 16 / math.sqrt(rank)
        assert math.isclose(alpha_of(scale, rank) / rank, scale, rel_tol=2.3e-16)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(1, 4096), st.integers(1, 512))
def test_whole_alphas_come_back_whole(alpha, rank):
    assert alpha_of(alpha / rank, rank) == alpha


def test_without_names_they_stay_and_that_is_said(tmp_path):
    path = kohya_file(tmp_path / "a.safetensors")
    adapter = convert(path, tmp_path / "peft", "peft")
    assert set(adapter) == set(SHAPES)
    assert "names stay as they are in the file" in adapter.warnings[0]
    assert "Give --names or --base" in adapter.warnings[0]


def base(path, keys):
    path.mkdir()
    save_file({key: torch.ones(1) for key in keys}, path / "model.safetensors")
    return path


KEYS = [f"{path}.weight" for name, path in PATHS.items() if "unet" in name]


def test_a_base_model_gives_the_paths(tmp_path):
    path = kohya_file(tmp_path / "a.safetensors", shapes=UNET)
    model = base(tmp_path / "unet", [*KEYS, "down_blocks.0.norm.weight", "down_blocks.0.norm.bias"])
    adapter = convert(path, tmp_path / "peft", "peft", base=model)
    wanted = {PATHS[name]: update for name, update in updates(path).items()}
    assert distance(peft_updates(tmp_path / "peft"), wanted) < 1e-15
    assert adapter.warnings == ()
    convert(path, tmp_path / "two", "peft", base=model / "model.safetensors")
    assert (tmp_path / "two/adapter_config.json").read_bytes() == (tmp_path / "peft/adapter_config.json").read_bytes()


def test_an_index_serves_without_its_files(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(KEYS, "x.safetensors")})
    )
    path = kohya_file(tmp_path / "a.safetensors", shapes=UNET)
    assert set(convert(path, tmp_path / "peft", "peft", base=model)) == {PATHS[name] for name in UNET}


def test_names_without_a_path_with_two_or_of_two_models_are_refused(tmp_path):
    path = kohya_file(tmp_path / "a.safetensors")
    model = base(tmp_path / "all", [f"{path}.weight" for path in PATHS.values()])
    with pytest.raises(InputError, match=r"modules of two models.*a PEFT folder is for one.*--prefix 'lora_"):
        convert(path, tmp_path / "peft", "peft", base=model)
    adapter = convert(path, tmp_path / "te", "peft", base=model, prefix="lora_te_")
    assert list(adapter) == ["text_model.encoder.layers.0.mlp.fc1"]
    assert "3 modules without prefix 'lora_te_' left out" in adapter.warnings[0]
    model = base(tmp_path / "less", KEYS[1:])
    with pytest.raises(InputError, match=f"module '{FIRST}': no module of the base model has this name"):
        convert(path, tmp_path / "peft", "peft", base=model, prefix="lora_unet_")
    model = base(tmp_path / "more", [*KEYS, "down.blocks.0.attn1.to.q.weight"])
    with pytest.raises(
        InputError, match=rf"module '{FIRST}' may be 'down.blocks.0.attn1.to.q' or 'down_blocks.0.attn1.to_q'"
    ):
        convert(path, tmp_path / "peft", "peft", base=model, prefix="lora_unet_")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.mkdir(), "neither a .safetensors.index.json nor a .safetensors file"),
        (lambda path: base(path, ["x.bias"]), "no weights among 1 tensors"),
        (
            lambda path: (path.mkdir(), base(path / "unet", ["x.weight"])),
            "give the folder of one model, such as .*unet",
        ),
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: (path.mkdir(), (path / "m.safetensors.index.json").write_text("{}")), "no weight_map"),
    ],
)
def test_what_is_no_base_model_is_named(tmp_path, make, text):
    make(tmp_path / "model")
    with pytest.raises(FormatError, match=text):
        convert(kohya_file(tmp_path / "a.safetensors"), tmp_path / "peft", "peft", base=tmp_path / "model")


def test_two_paths_of_one_name_are_refused_naming_both(tmp_path):
    made = state({"a.b_c": (5, 7, 2), "a_b.c": (5, 7, 2)})
    source = folder(tmp_path / "peft", made, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    with pytest.raises(InputError, match=r"'a.b_c' and 'a_b.c' both become 'lora_te_a_b_c'.*Give --names"):
        convert(source, tmp_path / "a.safetensors", "kohya", prefix="lora_te_")
    names = {"lora_te_one": "a.b_c", "lora_te_two": "a_b.c"}
    assert list(convert(source, tmp_path / "a.safetensors", "kohya", names=names)) == list(names)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({"lora_unet_x": "x"}, "not among the names .4 of 4 lack one.; every kohya name needed"),
        ({**PATHS, FIRST: "mid_block.proj_in"}, "both mean module 'mid_block.proj_in'"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(tmp_path, names, text):
    with pytest.raises(InputError, match=text):
        convert(kohya_file(tmp_path / "a.safetensors"), tmp_path / "peft", "peft", names=names)


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', '{"a": "b..c"}', '{"a": ""}'])
def test_mappings_in_files_are_checked(tmp_path, content):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(FormatError, match=r"names\.json"):
        convert(kohya_file(tmp_path / "a.safetensors"), tmp_path / "peft", "peft", names=tmp_path / "names.json")


def one(kind, **fields):
    """A PEFT adapter with something that a kohya file cannot hold."""
    made, settings_ = state({"q": (5, 7, 2)}), {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **fields}
    if kind == "embedding":
        made = {
            "base_model.model.e.lora_embedding_A": torch.ones(2, 9),
            "base_model.model.e.lora_embedding_B": torch.ones(5, 2),
        }
    if kind == "extra":
        made["base_model.model.score.weight"] = torch.ones(3, 5)
    return made, settings_


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (one("embedding"), "module 'e': a layer of kind embedding has no form in a kohya file"),
        (
            one("extra", modules_to_save=["score"]),
            r"tensor 'score.weight': a kohya file holds factors only.*extras='ignore'",
        ),
        (one("plain", fan_in_fan_out=True), r"fan_in_fan_out says that base weights are stored transposed"),
        (one("plain", lora_alpha=0), "module 'q': its scale is 0"),
    ],
)
def test_what_a_kohya_file_cannot_say_is_refused_by_name(tmp_path, source, text):
    with pytest.raises(UnsupportedVariantError, match=text):
        convert(source, tmp_path / "a.safetensors", "kohya", prefix="lora_te_")
    assert os.listdir(tmp_path) == []


def test_extras_are_dropped_on_request_with_a_warning(tmp_path):
    adapter = convert(
        one("extra", modules_to_save=["score"]),
        tmp_path / "a.safetensors",
        "kohya",
        prefix="lora_te_",
        read=ReadOptions(extras="ignore"),
    )
    assert adapter.warnings == ("1 tensors that are no factors left out, 'score.weight' first",)


def test_diffusers_files_become_a_folder_for_each_component(tmp_path):
    shapes = {"transformer.blocks.0.to_q": (11, 7), "text_encoder.layers.0.q": (6, 9)}
    made = tensors(shapes, (3, 2), "peft", alpha=None)
    entries = {"transformer.r": 3, "transformer.lora_alpha": 12, "text_encoder.r": 2, "text_encoder.lora_alpha": 3}
    path = kohya_file(tmp_path / "a.safetensors", made, {"lora_adapter_metadata": json.dumps(entries)})
    adapter = convert(path, tmp_path / "peft", "peft", prefix="transformer.")
    assert {name: module.scale for name, module in adapter.modules.items()} == {"blocks.0.to_q": 4.0}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"to": "onnx"}, "to is 'onnx'; one of peft, kohya needed"),
        ({"to": "kohya", "prefix": "lora_te_"}, "is a kohya file already"),
        ({"to": "peft", "base": "x", "names": {}}, "leave it out"),
        ({"to": "peft", "out": "b.safetensors"}, "a PEFT adapter is a folder"),
        ({"to": "peft", "prefix": "lora_x_"}, "no module begins with 'lora_x_'"),
        (
            {"to": "peft", "out": "a.safetensors", "overwrite": True},
            "what is converted: the output .* would replace it",
        ),
    ],
)
def test_wrong_arguments_are_named_and_leave_nothing(tmp_path, call, text):
    path = kohya_file(tmp_path / "a.safetensors")
    before = path.read_bytes()
    out = tmp_path / call.pop("out", "out")
    with pytest.raises(InputError, match=text):
        convert(path, out, **call)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("source", "out"), [("in/adapter_model.safetensors", "in"), ("in", "in/adapter_model.safetensors")]
)
def test_the_output_never_replaces_what_is_converted(tmp_path, source, out):
    (tmp_path / "in").mkdir()
    path = kohya_file(tmp_path / "in" / "adapter_model.safetensors")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"what is converted: the output .* would replace it"):
        convert(tmp_path / source, tmp_path / out, "peft", overwrite=True)
    assert path.read_bytes() == before


def test_the_output_never_replaces_what_the_adapter_started_from(tmp_path):
    source, start = folder(tmp_path / "a"), folder(tmp_path / "start")
    with pytest.raises(InputError, match=r"init_factors: the output .* would replace it"):
        convert(source, start, "kohya", prefix="", read=ReadOptions(init_factors=start), overwrite=True)
    assert sorted(os.listdir(start)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(("prefix", "text"), [(None, "no prefix"), ("lora.te_", "holds a dot")])
def test_a_prefix_is_needed_and_holds_no_dot(tmp_path, prefix, text):
    with pytest.raises(InputError, match=f"{text}; what loaders know the model by needed"):
        convert(folder(tmp_path / "peft"), tmp_path / "a.safetensors", "kohya", prefix=prefix)


def test_the_command_line_converts_there_and_back(tmp_path, capsys):
    path = kohya_file(tmp_path / "a.safetensors")
    (tmp_path / "names.json").write_text(json.dumps(PATHS))
    names = ["--names", str(tmp_path / "names.json")]
    assert main(["convert", str(path), "-o", str(tmp_path / "peft"), "--to", "peft", *names]) == 0
    assert "4 modules" in capsys.readouterr().out
    back = tmp_path / "b.safetensors"
    assert main(["convert", str(tmp_path / "peft"), "-o", str(back), "--to", "kohya", *names, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert distance(updates(back), updates(path)) == 0
    assert main(["convert", str(tmp_path / "peft"), "-o", str(back), "--to", "kohya", *names]) == 2
    assert "exists; replace it with overwrite (--overwrite)" in capsys.readouterr().err
    assert main(["convert", str(path), "-o", str(tmp_path / "c"), "--to", "peft"]) == 0
    assert "fedlora: warning: names stay as they are" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_place(tmp_path, bad, capsys):
    path = kohya_file(tmp_path / "a.safetensors")
    raw = load_file(path)
    key = f"{FIRST}.lora_up.weight"
    raw[key][1, 2] = bad
    save_file(raw, path)
    with pytest.raises(NonFiniteError, match=rf"tensor '{key}': NaN or Inf at \[1, 2"):
        convert(path, tmp_path / "peft", "peft", names=PATHS)
    assert not (tmp_path / "peft").exists()
    names = tmp_path / "names.json"
    names.write_text(json.dumps(PATHS))
    assert (
        main(["convert", str(path), "--to", "peft", "--names", str(names), "-o", str(tmp_path / "peft"), "--quiet"])
        == 2
    )
    assert "NaN or Inf at [1, 2" in capsys.readouterr().err
