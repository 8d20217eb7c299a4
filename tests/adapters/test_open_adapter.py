"""open_adapter: folders, state dicts, and everything that is neither."""

import collections
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from adapter_files import config, folder, one, same_updates, state

from fedlora_kernels.adapters.model import Adapter
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import FormatError, InputError, LimitError


def test_a_folder_opens_lazily_with_labels_and_specs(tmp_path):
    adapter = open_adapter(folder(tmp_path / "c0"))
    assert adapter.label == str(tmp_path / "c0")
    assert (len(adapter), "layers.0.q_proj" in adapter, "x" in adapter) == (3, True, False)
    spec = adapter.modules["layers.0.v_proj"]
    assert (spec.m, spec.n, spec.rank, spec.kind) == (5, 13, 2, "linear")
    assert adapter.nbytes == sum(t.numel() * 4 for t in state().values())
    assert adapter.metadata == {"format": "pt"}
    os.truncate(tmp_path / "c0" / "adapter_model.safetensors", 100)
    with pytest.raises(FormatError, match="truncated"):
        adapter["layers.0.v_proj"]
    adapter.close()
    adapter.close()


def test_a_folder_and_its_tensors_in_memory_are_the_same_adapter(tmp_path):
    assert same_updates(open_adapter(str(folder(tmp_path / "c0"))), open_adapter((state(), config())), 0)


def test_an_adapter_is_returned_as_it_is():
    adapter = open_adapter(one())
    assert open_adapter(adapter) is adapter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(tmp_path, dtype):
    pair = open_adapter(folder(tmp_path / "c", state(dtype=dtype)))["layers.0.q_proj"]
    assert (pair.A.dtype, pair.B.dtype) == (dtype, dtype)


def test_numpy_arrays_serve_even_read_only_ones():
    arrays = {key: tensor.numpy().copy() for key, tensor in state().items()}
    for array in arrays.values():
        array.flags.writeable = False
    assert same_updates(open_adapter((arrays, config())), open_adapter((state(), config())), 0)
    arrays["x"] = np.array(["text"])
    with pytest.raises(FormatError, match="tensor 'x' is a NumPy array of <U4"):
        open_adapter((arrays, config()))


def test_inputs_are_detached_and_never_changed():
    tensors, settings = one()
    for tensor in tensors.values():
        tensor.requires_grad_()
    adapter = open_adapter((tensors, settings))
    key = adapter.modules["q"].A.key
    assert not adapter["q"].A.requires_grad
    out = torch.empty(2, 7)
    assert torch.equal(adapter.source.read(key, out), tensors[key])
    with pytest.raises(ValueError, match="shape"):
        adapter.source.read(key, torch.empty(7, 2))


def test_a_live_configuration_is_read_like_its_file(tmp_path):
    from peft import LoraConfig

    live = LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj", "q_proj"], rank_pattern={"v_proj": 2})
    adapter = open_adapter((state(), live))
    assert adapter.config["target_modules"] == ["q_proj", "v_proj"]
    assert adapter.config["peft_type"] == "LORA"
    assert same_updates(adapter, open_adapter((state(), config())), 0)
    json.dumps(adapter.config)


def test_a_bare_state_dict_needs_a_configuration():
    assert len(open_adapter(state(), ReadOptions(config=config()))) == 3
    with pytest.raises(FormatError, match=r"without a configuration; pass \(state_dict, config\)"):
        open_adapter(state())
    with pytest.raises(FormatError, match="client 'c': a state dict without a configuration"):
        open_adapter((state(), None), name="c")


@pytest.mark.parametrize("source", [3, None, [1, 2, 3], ("a", {}), object()])
def test_other_things_are_input_errors(source):
    with pytest.raises(InputError, match="an adapter is a path, an Adapter or a"):
        open_adapter(source)


def test_entries_that_are_no_tensors_are_named():
    with pytest.raises(FormatError, match="entry 'epoch' is of type int; a tensor or NumPy array needed"):
        open_adapter(({**state(), "epoch": 3}, config()))


def test_a_folder_without_config_says_what_is_there(tmp_path):
    with pytest.raises(FormatError, match="none: cannot be read: No such file"):
        open_adapter(tmp_path / "none")
    with pytest.raises(FormatError, match=r"no adapter_config.json; a PEFT adapter folder needed"):
        open_adapter(tmp_path)
    made = folder(tmp_path / "server" / "global")
    with pytest.raises(FormatError, match=r"sub-folder 'global' has one. Give .*server/global instead"):
        open_adapter(tmp_path / "server")
    with pytest.raises(FormatError, match=r"a file; the folder with adapter_config.json"):
        open_adapter(made / "adapter_config.json")
    (made / "adapter_config.json").unlink()
    assert len(open_adapter(made, ReadOptions(config=config()))) == 3
    (made / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        open_adapter(made, ReadOptions(config=config()), name="c1")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{broken", "broken JSON"),
        (b"", "broken JSON"),
        (b"[1]", "a JSON list; one JSON object needed"),
        (b"null", "a JSON NoneType"),
        (b'{"r": 1, "r": 2}', "'r' occurs twice"),
        (b'{"lora_alpha": Infinity}', "Infinity is not JSON"),
        (b"\xff\xfe", "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "more than 1048576 bytes"),
    ],
)
def test_broken_configurations_are_format_errors_of_one_line_naming_the_file(tmp_path, content, text):
    made = folder(tmp_path / "c")
    (made / "adapter_config.json").write_bytes(content)
    with pytest.raises(FormatError, match=text) as caught:
        open_adapter(made, name="c3")
    assert str(caught.value).startswith("client 'c3': ")
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_without_pairs_are_refused(tmp_path):
    with pytest.raises(FormatError, match="no tensors"):
        open_adapter(({}, config()))
    with pytest.raises(FormatError, match="no lora_A and lora_B among 1 tensors"):
        open_adapter(({"score.weight": torch.ones(2, 3)}, config(modules_to_save=["score"])))


def as_bin(path, state_dict):
    made = folder(path)
    (made / "adapter_model.safetensors").unlink()
    torch.save(state_dict, made / "adapter_model.bin")
    return made


def test_bin_files_are_read_without_pickle(tmp_path):
    tensors = state()
    assert same_updates(open_adapter(as_bin(tmp_path / "c", tensors)), open_adapter((tensors, config())), 0)
    assert len(open_adapter(as_bin(tmp_path / "o", collections.OrderedDict(tensors)))) == 3


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_bin_files_that_need_pickle_are_never_loaded(tmp_path):
    made = as_bin(tmp_path / "c", {"a": Hostile(tmp_path / "pwned")})
    with pytest.raises(FormatError, match="re-save it as safetensors") as caught:
        open_adapter(made)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
    for content in (b"", b"junk", (made / "adapter_model.bin").read_bytes()[:300]):
        (made / "adapter_model.bin").write_bytes(content)
        with pytest.raises(FormatError, match=r"adapter_model.bin: cannot be loaded with weights_only=True"):
            open_adapter(made)
    torch.save([1, 2], made / "adapter_model.bin")
    with pytest.raises(FormatError, match="holds a list; a state dict needed"):
        open_adapter(made)


def test_safetensors_win_over_a_bin_beside_them(tmp_path):
    made = folder(tmp_path / "c")
    (made / "adapter_model.bin").write_bytes(b"junk")
    assert len(open_adapter(made)) == 3


def extras(adapter):
    return {name: (extra.rule, extra.tensor.shape, extra.module) for name, extra in adapter.extras.items()}


def test_tensors_that_are_no_factors_get_their_rule():
    tensors, settings = one("enc.q")
    more = {
        "base_model.model.score.weight": torch.ones(3, 5),
        "base_model.model.head.out.modules_to_save.default.weight": torch.ones(2, 5),
        "base_model.model.enc.q.base_layer.bias": torch.ones(5),
        "base_model.model.norm.bias": torch.ones(4),
        "base_model.model.enc.q.lora_B.bias": torch.ones(5),
        "base_model.model.embed_tokens.weight": torch.ones(9, 5),
        "base_model.model.lm_head.base_layer.weight": torch.ones(9, 5),
    }
    settings.update(modules_to_save=["score", "head"], bias="all", lora_bias=True)
    adapter = open_adapter((tensors | more, settings))
    assert extras(adapter) == {
        "score.weight": ("absolute", (3, 5), None),
        "head.out.weight": ("absolute", (2, 5), None),
        "enc.q.base_layer.bias": ("absolute", (5,), "enc.q"),
        "norm.bias": ("absolute", (4,), None),
        "enc.q.lora_B.bias": ("lora_bias", (5,), "enc.q"),
        "embed_tokens.weight": ("absolute", (9, 5), None),
        "lm_head.base_layer.weight": ("absolute", (9, 5), None),
    }
    assert torch.equal(adapter.extra("score.weight"), torch.ones(3, 5))


def test_unknown_tensors_are_refused_or_dropped_with_a_warning():
    tensors, settings = one()
    tensors["norm.bias"] = torch.ones(4)
    with pytest.raises(FormatError, match=r"unknown tensor 'norm.bias'; .*extras='ignore'"):
        open_adapter((tensors, settings))
    adapter = open_adapter((tensors, settings), ReadOptions(extras="ignore"))
    assert adapter.extras == {}
    assert "tensor 'norm.bias': not understood, dropped" in adapter.warnings[0]


def test_extra_tensors_must_be_floats_and_whole():
    tensors, settings = one(modules_to_save=["score"])
    for bad, text in ((torch.ones(3, dtype=torch.int64), "score.count' is int64"), (torch.ones(0, 3), "is empty")):
        with pytest.raises(FormatError, match=text):
            open_adapter(({**tensors, "score.count": bad}, settings))


def test_a_lora_bias_belongs_to_a_pair_and_has_its_length():
    tensors, settings = one(lora_bias=True)
    with pytest.raises(FormatError, match=r"module 'q': lora_B.bias \(4,\); \(5,\) needed"):
        open_adapter(({**tensors, "q.lora_B.bias": torch.ones(4)}, settings))
    with pytest.raises(FormatError, match=r"module 'v': lora_B.bias .* a lora_B of the same module needed"):
        open_adapter(({**tensors, "v.lora_B.bias": torch.ones(5)}, settings))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rank_from": "file"}, "rank_from is 'file'; one of config, tensor needed"),
        ({"extras": "mean"}, "extras is 'mean'; one of strict, ignore, owners, first needed"),
        ({"missing": None}, "missing is 'None'; one of error, renormalize, zero needed"),
        ({"adapter_name": ""}, "adapter_name is ''; a name needed"),
        ({"config": 3}, "config is of type int; a mapping needed"),
        ({"limits": 3}, r"limits is of type int; Limits\(...\) needed"),
    ],
)
def test_read_options_are_checked_on_creation(fields, text):
    with pytest.raises(InputError, match=text):
        ReadOptions(**fields)


def test_read_options_compare_and_print():
    assert ReadOptions() == ReadOptions(limits=Limits())
    assert "rank_from='config'" in repr(ReadOptions())


def test_reading_imports_neither_peft_nor_the_safetensors_library(tmp_path):
    path = folder(tmp_path / "c")
    code = (
        "import sys; from fedlora_kernels.adapters.reader import open_adapter; "
        f"a = open_adapter({str(path)!r}); a['layers.0.q_proj']; a.save({str(tmp_path / 'out')!r}); "
        "print([m for m in ('peft', 'safetensors', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert isinstance(open_adapter(tmp_path / "out"), Adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path, name):
    place = folder(tmp_path / "c0")
    if name.endswith(".bin"):
        (place / "adapter_model.safetensors").unlink()
    (place / name).unlink(missing_ok=True)
    os.mkfifo(place / name)
    code = "import sys; from fedlora_kernels.adapters.reader import open_adapter; open_adapter(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, timeout=60, check=False)
    assert f"{name}: not a regular file" in done.stderr


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: x.numpy().astype(">f4"), "is a NumPy array of >f4"),
        (lambda x: x.to_sparse(), "is sparse_coo"),
        (lambda x: x.to("meta"), "is on the meta device"),
    ],
)
def test_tensors_that_hold_no_plain_numbers_are_refused(change, found):
    tensors = {key: change(tensor) for key, tensor in state().items()}
    with pytest.raises(FormatError, match=f"tensor '{next(iter(tensors))}' {found}"):
        open_adapter((tensors, config()))


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path / "c"))
    with pytest.raises(InputError, match="client 'a': the path is empty"):
        open_adapter("", name="a")
    assert len(open_adapter(".")) == 3


def test_an_adapter_shows_itself_in_one_line():
    tensors = state({"a": (5, 7, 2), "b": (5, 7, 4)})
    adapter = open_adapter((tensors, config(r=2, rank_pattern={"b": 4})))
    assert repr(adapter) == f"Adapter('state dict', 2 modules, rank 2-4, {adapter.nbytes} bytes)"
    assert "rank 2," in repr(open_adapter((state({"a": (5, 7, 2)}), config(r=2))))


def test_the_number_of_modules_is_capped_before_any_is_looked_up():
    modules = {f"layers.{i}.q": (5, 7, 2) for i in range(8)}
    pair = state(modules), config(r=2)
    with pytest.raises(
        LimitError, match=r"client 'a': modules per client is 8; at most 7\. .*limits=Limits\(modules_per_client=8\)"
    ):
        open_adapter(pair, ReadOptions(limits=Limits(modules_per_client=7)), name="a")
    assert len(open_adapter(pair, ReadOptions(limits=Limits(modules_per_client=8)))) == 8
    assert Limits().modules_per_client == 65536
