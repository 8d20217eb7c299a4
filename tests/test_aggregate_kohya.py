"""aggregate of kohya files: the update of a kohya loader, files that such loaders read, reports beside them."""

import hashlib
import json
import struct

import adapter_problems
import pytest
import torch
from kohya_files import FIRST, SHAPES, SPELLINGS, distance, kohya_file, tensors, updates, weighted
from safetensors import safe_open
from safetensors.torch import load_file

import fedlora_kernels as fk
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.cli import main
from fedlora_kernels.errors import InputError, MismatchError, RunError
from fedlora_kernels.reporting.tables import layer_type

EXACT = {"rule": fk.Energy(1.0)}
DOTTED = {"transformer.blocks.0.attn.to_q": (11, 7), "transformer.blocks.1.attn.to_k": (5, 13)}


@pytest.fixture
def clients(tmp_path):
    ranks = ((3, 2, 4, 3), (2, 2, 1, 5), (4, 1, 2, 2))
    return [str(kohya_file(tmp_path / f"c{k}.safetensors", ranks=ranks[k], alpha=1.5 + k, seed=k)) for k in range(3)]


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_client_of_weight_one_is_the_identity_in_its_own_spelling(tmp_path, spelling, alpha):
    path = kohya_file(tmp_path / "a.safetensors", spelling=spelling, alpha=alpha)
    fk.aggregate([path], out=tmp_path / "out.safetensors", **EXACT)
    found = load_file(tmp_path / "out.safetensors")
    up, down = SPELLINGS[spelling]
    assert found.keys() == {f"{name}{tail}" for name in SHAPES for tail in (up, down, ".alpha")}
    assert distance(updates(found), updates(path)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_the_identity(tmp_path, dtype):
    path = kohya_file(tmp_path / "a.safetensors", dtype=dtype, alpha=0.7)
    fk.aggregate([path], out=tmp_path / "out.safetensors", **EXACT)
    found = load_file(tmp_path / "out.safetensors")
    assert found[f"{FIRST}.lora_up.weight"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert distance(updates(found), updates(path)) < 1e-6


def test_several_clients_are_the_weighted_sum_with_alphas_equal_to_ranks(clients, tmp_path):
    out = tmp_path / "out.safetensors"
    result = fk.aggregate(clients, weights=[1, 2, 5], out=out, **EXACT)
    found = load_file(out)
    assert distance(updates(found), weighted(clients, [1, 2, 5])) < 1e-6
    for name in SHAPES:
        alpha, down = found[f"{name}.alpha"], found[f"{name}.lora_down.weight"]
        assert (alpha.shape, alpha.dtype, float(alpha)) == ((), torch.float32, down.shape[0])
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    p = int(found[f"{conv}.alpha"])
    assert found[f"{conv}.lora_down.weight"].shape == (p, 4, 3, 3)
    assert found[f"{conv}.lora_up.weight"].shape == (6, p, 1, 1)
    assert list(result.adapter) == list(open_adapter(clients[0]))
    again = open_adapter(out)
    assert {module.scale for module in again.modules.values()} == {1.0}


def test_the_result_in_memory_is_that_of_the_file(clients, tmp_path):
    fk.aggregate(clients, out=tmp_path / "out.safetensors", **EXACT)
    inside = fk.aggregate(clients, **EXACT).adapter
    on_disc = open_adapter(tmp_path / "out.safetensors")
    for name in on_disc:
        assert torch.equal(inside[name].B, on_disc[name].B)
        assert torch.equal(inside[name].A, on_disc[name].A)
    inside.save(tmp_path / "saved.safetensors")
    assert distance(updates(tmp_path / "saved.safetensors"), updates(tmp_path / "out.safetensors")) == 0


def test_the_same_run_gives_the_same_bytes_and_the_order_of_the_first_client(clients, tmp_path):
    for name in ("one", "two"):
        fk.aggregate(clients, out=tmp_path / f"{name}.safetensors", **EXACT)
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    (length,) = struct.unpack("<Q", one[:8])
    keys = [key for key in json.loads(one[8 : 8 + length]) if key != "__metadata__"]
    names = list(open_adapter(clients[0]))
    pairs = [f"{name}{tail}" for name in names for tail in (".lora_down.weight", ".lora_up.weight")]
    assert keys == pairs + [f"{name}.alpha" for name in names]


def test_a_client_receives_a_file_with_its_own_alpha(clients, tmp_path):
    result = fk.aggregate(clients, **EXACT)
    own = result.for_client("c1.safetensors", rank=12)
    assert {module.rank for module in own.modules.values()} == {12}
    scales = {name: module.scale for name, module in open_adapter(clients[1]).modules.items()}
    assert {name: module.scale for name, module in own.modules.items()} == scales
    own.save(tmp_path / "own.safetensors")
    assert distance(updates(tmp_path / "own.safetensors"), weighted(clients)) < 1e-6


def test_another_rule_cuts_the_same_decomposition(clients):
    result = fk.aggregate(clients, **EXACT)
    assert {module.rank for module in result.at(fk.Rank(2)).adapter.modules.values()} == {2}


def test_metadata_is_that_of_the_first_client_made_current(tmp_path):
    first = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "4",
        "ss_network_alpha": "1.5",
        "ss_training_comment": "cats",
        "ss_base_model_version": "sdxl",
        "sshs_model_hash": "stale",
        "sshs_legacy_hash": "stale",
        "modelspec.architecture": "sdxl/lora",
        "modelspec.hash_sha256": "stale",
        "private": "x",
    }
    a = kohya_file(tmp_path / "a.safetensors", metadata=first)
    b = kohya_file(tmp_path / "b.safetensors", metadata={"ss_base_model_version": "other", "ss_seed": "1"}, seed=1)
    fk.aggregate([a, b], out=tmp_path / "out.safetensors", **EXACT)
    found = metadata(tmp_path / "out.safetensors")
    assert found["ss_network_module"] == "lycoris.kohya"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert found["ss_base_model_version"] == "sdxl"
    assert found["modelspec.architecture"] == "sdxl/lora"
    assert found["ss_training_comment"].startswith("2 adapters by fedlora_kernels")
    assert found["ss_training_comment"].endswith("; cats")
    assert found["fedlora.method"] == "florist"
    assert not {"sshs_legacy_hash", "modelspec.hash_sha256", "private", "ss_seed"} & found.keys()
    assert "stale" not in found.values()
    raw = (tmp_path / "out.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert found["sshs_model_hash"] == hashlib.sha256(raw[8 + length :]).hexdigest()


def test_metadata_of_bare_files_says_the_common_rank(tmp_path):
    path = kohya_file(tmp_path / "a.safetensors")
    fk.aggregate([path], out=tmp_path / "out.safetensors", rule=fk.Rank(1))
    found = metadata(tmp_path / "out.safetensors")
    assert (found["ss_network_module"], found["ss_network_dim"], found["ss_network_alpha"]) == (
        "networks.lora",
        "1",
        "1",
    )
    assert not any(key.startswith("sshs") for key in found)


def test_one_rank_on_request(clients, tmp_path):
    out = tmp_path / "out.safetensors"
    fk.aggregate(clients, out=out, write=fk.WriteOptions(uniform_rank=True, fill="random"), **EXACT)
    found = open_adapter(out)
    assert len({module.rank for module in found.modules.values()}) == 1
    assert distance(updates(out), weighted(clients)) < 1e-6
    assert metadata(out)["ss_network_dim"] == str(next(iter(found.modules.values())).rank)
    assert metadata(out)["ss_training_comment"].count("fedlora_kernels") == 1


def test_diffusers_files_keep_their_form_with_a_configuration_of_scale_one(tmp_path):
    shapes = {**DOTTED, "text_encoder.layers.0.q": (6, 9)}
    entries = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.rank_pattern": {"to_k": 2}}
    entries |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 2, "text_encoder.use_rslora": True}
    origin = {"format": "pt", "lora_adapter_metadata": json.dumps(entries), "sshs_model_hash": "stale"}
    made = tensors(shapes, (3, 2, 4), "peft", alpha=None)
    path = kohya_file(tmp_path / "a.safetensors", made, origin)
    fk.aggregate([path], out=tmp_path / "out.safetensors", **EXACT)
    found, scales = load_file(tmp_path / "out.safetensors"), (2.0, 3.0, 1.0)
    assert not any(key.endswith(".alpha") for key in found)
    assert found.keys() == made.keys()
    wanted = {name: s * update for (name, update), s in zip(updates(made).items(), scales, strict=True)}
    assert distance(updates(found), wanted) < 1e-6
    config = json.loads(metadata(tmp_path / "out.safetensors")["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (3, 3)
    patterns = {"blocks.1.attn.to_k": 2}
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"] == patterns
    assert "text_encoder.use_rslora" not in config
    assert not any(key.startswith("ss_") for key in metadata(tmp_path / "out.safetensors"))


def test_a_folder_takes_files_too_with_everything_a_method_gives(tmp_path):
    clients = [kohya_file(tmp_path / f"c{k}.safetensors", seed=k) for k in range(2)]
    out = tmp_path / "out"
    result = fk.aggregate(clients, "fedex", out=out, per_client=True)
    assert distance(updates(out / "adapter_model.safetensors"), updates(dict(stored(result.adapter)))) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_model.safetensors", "clients", "report.json", "residual",
    ]  # fmt: skip
    assert len(open_adapter(out / "clients" / "c0")) == 4
    assert open_adapter(out).spelling == open_adapter(out / "residual").spelling == SPELLINGS["kohya"]
    fk.aggregate(clients, "fedex", out=out, per_client=True, overwrite=True)


def stored(adapter):
    """The stored tensors of an adapter by key, whatever holds them."""
    for key in adapter.source.tensors:
        yield key, adapter.source.read(key)


@pytest.mark.parametrize(
    ("method", "options"), [("fedmomentum", {}), ("florist", {"per_client": True}), ("fedsa", {"per_client": True})]
)
def test_one_file_holds_one_adapter(clients, tmp_path, method, options):
    with pytest.raises(InputError, match=r"out is a file, which cannot hold .*; name a folder"):
        fk.aggregate(clients, method, out=tmp_path / "out.safetensors", **options)
    assert not list(tmp_path.glob("out*")) + list(tmp_path.glob(".out*"))


def test_rounds_go_on_from_a_file(clients, tmp_path):
    for number, out in enumerate(("r0.safetensors", "r1.safetensors")):
        previous = None if number == 0 else tmp_path / "r0.safetensors"
        result = fk.aggregate(clients, "raflora", out=tmp_path / out, previous=previous)
        assert result.state.round == number


def test_formats_do_not_mix_and_a_key_of_each_is_shown(clients):
    peft = adapter_problems.client()
    with pytest.raises(MismatchError) as caught:
        fk.aggregate({"kohya": clients[0], "peft": peft})
    text = str(caught.value)
    first = next(iter(open_adapter(clients[0])))
    assert f"'{first}.lora_down.weight'" in text
    assert f"'base_model.model.{adapter_problems.FIRST}.lora_A.weight'" in text
    assert "fedlora convert" in text


def test_targets_are_for_their_own_format(clients, tmp_path):
    peft = adapter_problems.client()
    with pytest.raises(
        InputError, match=r"target 'kohya' needs kohya files, .*lora_A.weight.*fedlora convert --to kohya"
    ):
        fk.aggregate([peft], write=fk.WriteOptions(target="kohya"))
    for target in ("peft", "vllm"):
        with pytest.raises(
            InputError, match=rf"target '{target}' needs PEFT .*lora_down.weight.*fedlora convert --to peft"
        ):
            fk.aggregate(clients, write=fk.WriteOptions(target=target))
    with pytest.raises(InputError, match="PEFT adapters are folders"):
        fk.aggregate([peft], out=tmp_path / "out.safetensors")
    assert list(tmp_path.glob("*out*")) == []


def test_different_spellings_of_the_same_names_are_written_as_the_first(tmp_path):
    a = kohya_file(tmp_path / "a.safetensors", spelling="qwen")
    b = kohya_file(tmp_path / "b.safetensors", spelling="kohya", seed=1)
    fk.aggregate([a, b], out=tmp_path / "out.safetensors", **EXACT)
    assert open_adapter(tmp_path / "out.safetensors").spelling == SPELLINGS["qwen"]
    assert distance(updates(tmp_path / "out.safetensors"), weighted([a, b])) < 1e-6


def test_kernels_of_one_size_and_another_shape_do_not_fit(tmp_path):
    a = kohya_file(tmp_path / "a.safetensors", shapes={"lora_unet_x": (5, (4, 1, 3))})
    b = kohya_file(tmp_path / "b.safetensors", shapes={"lora_unet_x": (5, (4, 3, 1))})
    with pytest.raises(MismatchError, match="4 x 3 x 1"):
        fk.aggregate([a, b])


def test_vllm_is_told_its_rank():
    write = fk.WriteOptions(target="vllm")
    clients = adapter_problems.clients((9, 12))
    result = fk.aggregate(clients, write=write, **EXACT)
    rank = next(iter(result.adapter.modules.values())).rank
    assert {module.rank for module in result.adapter.modules.values()} == {rank} == {21}
    assert "rank 21 in every module: start vLLM with --max-lora-rank 32 or more" in result.report["notes"]


def test_vllm_takes_no_convolutions():
    state = {"base_model.model.conv.lora_A.weight": torch.ones(2, 3, 3, 3)}
    state["base_model.model.conv.lora_B.weight"] = torch.ones(5, 2, 1, 1)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    with pytest.raises(InputError, match="module 'conv': target 'vllm' takes no conv2d"):
        fk.aggregate([(state, config)], write=fk.WriteOptions(target="vllm"))


class Stop(Exception):
    pass


def test_a_run_that_was_ended_goes_on_to_the_same_bytes(clients, tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    fk.aggregate(clients, out=whole, memory=1, **EXACT)
    done = []

    def progress(stage, bytes_done, total):
        done.append(bytes_done)
        if len(done) > 3:
            raise Stop

    with pytest.raises(Stop):
        fk.aggregate(clients, out=out, memory=1, resume=True, progress=progress, **EXACT)
    assert not out.exists()
    assert len(list(tmp_path.glob("out.safetensors.partial-*"))) == 1
    fk.aggregate(clients, out=out, memory=1, resume=True, **EXACT)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.safetensors", "out.safetensors.report.json"]


def test_a_run_that_failed_while_its_file_was_put_in_place_goes_on(clients, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    fk.aggregate(clients, out=whole, **EXACT)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fedlora_kernels.adapters.folder.place_file", full)
        with pytest.raises(RunError, match="No space left"):
            fk.aggregate(clients, out=out, resume=True, **EXACT)
    fk.aggregate(clients, out=out, resume=True, **EXACT)
    assert out.read_bytes() == whole.read_bytes()
    assert list(tmp_path.glob("*.partial-*")) == []


def test_vllm_has_a_largest_rank():
    made = adapter_problems.client(rank=513, shapes={"q": (600, 520)})
    with pytest.warns(UserWarning, match="rank 513: vLLM takes at most 512"):
        fk.aggregate([made], write=fk.WriteOptions(target="vllm"), **EXACT)


def test_the_command_line_writes_a_file_and_its_report(clients, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["aggregate", *clients, "-o", str(out), "--energy", "1"]) == 0
    assert "out.safetensors" in capsys.readouterr().out
    assert distance(updates(out), weighted(clients)) < 1e-6
    assert json.loads((tmp_path / "out.safetensors.report.json").read_text())["clients"][0]["name"] == "c0.safetensors"
    assert main(["aggregate", *clients, "-o", str(out)]) == 2
    assert "exists; replace it with overwrite (--overwrite), or name another file" in capsys.readouterr().err
    assert main(["aggregate", *clients, "-o", clients[0], "--overwrite"]) == 2
    assert "would replace it" in capsys.readouterr().err
    held = tmp_path / "folder"
    assert main(["aggregate", *clients, "-o", str(held), "--quiet"]) == 0
    weights = held / "adapter_model.safetensors"
    before = weights.read_bytes()
    assert main(["aggregate", str(held), *clients[1:], "-o", str(weights), "--overwrite"]) == 2
    assert "client 'folder': the output" in capsys.readouterr().err
    assert weights.read_bytes() == before
    assert main(["aggregate", *clients, "-o", str(out), "--overwrite", "--target", "kohya", "--quiet"]) == 0
    assert main(["aggregate", *clients, "-o", str(tmp_path / "p"), "--target", "peft"]) == 2
    assert "Leave --target out and convert the result (fedlora convert --to peft)" in capsys.readouterr().err


def test_kohya_names_are_summed_up_by_layer_type():
    assert (
        layer_type("lora_unet_down_blocks_0_attentions_11_to_out_0") == "lora_unet_down_blocks_*_attentions_*_to_out_*"
    )
    assert layer_type("lora_te1_text_model_encoder_layers_3_mlp_fc1") == "lora_te1_text_model_encoder_layers_*_mlp_fc1"
    assert layer_type("blocks.0.conv_1") == "blocks.*.conv_1"
