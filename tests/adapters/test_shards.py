"""Sharded adapters: read as one, whatever lies in which file; an index that lies or points elsewhere is refused."""

import json
import os

import pytest
import torch
from adapter_files import SHAPES, config, folder, same_updates, state
from safetensors.torch import save_file

import fedlora_kernels as fk
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.adapters.shards import INDEX_NAME, count_files
from fedlora_kernels.errors import FormatError, LimitError

ODD = [
    "C:x.safetensors",
    "x.bin",
    "",
    ".safetensors",
    "..",
    None,
    3,
    ["a.safetensors"],
    "x\0.safetensors",
    "a" * 300 + ".safetensors",
]
NAMES = [f"adapter_model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]


def sharded(path, tensors=None, configuration=None, change=None):
    """Write an adapter in three files, its keys dealt out in turn, so that A and B of a module lie apart."""
    path.mkdir(parents=True)
    tensors = tensors or state()
    placed = {key: NAMES[i % 3] for i, key in enumerate(tensors)}
    for name in NAMES:
        save_file({key: tensors[key] for key in tensors if placed[key] == name}, path / name, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (path / INDEX_NAME).write_text(json.dumps(change(index) if change else index))
    (path / "adapter_config.json").write_text(json.dumps(configuration or config()))
    return path


def first(index):
    return next(iter(index["weight_map"]))


def test_shards_hold_what_one_file_holds(tmp_path):
    one, parts = open_adapter(folder(tmp_path / "one")), open_adapter(sharded(tmp_path / "parts"))
    assert same_updates(one, parts, limit=0.0)
    assert parts.nbytes == one.nbytes
    assert {k: s.shape for k, s in parts.source.tensors.items()} == {k: s.shape for k, s in one.source.tensors.items()}
    assert parts.metadata == {"format": "pt"}


@pytest.mark.parametrize("memory", [1, None])
def test_sharded_clients_are_aggregated_as_whole_ones(tmp_path, memory):
    """In slabs too, where stacks of several modules are filled from several files."""
    shapes = {f"layers.{k}.q_proj": (11, 7, 3) for k in range(7)}
    answers = []
    for write in (folder, sharded):
        made = [
            write(tmp_path / f"{write.__name__}{k}", state(shapes, seed=k), config(rank_pattern={})) for k in range(2)
        ]
        answers.append(fk.aggregate(made, rule=fk.Rank(4), memory=memory).adapter)
    assert same_updates(*answers, limit=0.0)


def test_the_public_splitter_writes_what_is_read(tmp_path):
    """Keys, names and index as huggingface_hub makes them for any large state dict."""
    from huggingface_hub import save_torch_state_dict

    one = folder(tmp_path / "one")
    parts = tmp_path / "parts"
    parts.mkdir()
    save_torch_state_dict(
        state(), parts, filename_pattern="adapter_model{suffix}.safetensors", max_shard_size=200, metadata={"a": "b"}
    )
    (parts / "adapter_config.json").write_text(json.dumps(config()))
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert same_updates(open_adapter(parts), open_adapter(one), limit=0.0)


def test_one_file_wins_over_an_index_as_for_every_other_reader(tmp_path):
    path = sharded(tmp_path / "c")
    save_file(state(seed=5), path / "adapter_model.safetensors")
    assert same_updates(open_adapter(path), open_adapter(folder(tmp_path / "d", state(seed=5))), limit=0.0)


def test_a_missing_file_is_named(tmp_path):
    path = sharded(tmp_path / "c")
    (path / NAMES[1]).unlink()
    with pytest.raises(FormatError, match=r"client 'x': .*-00002-of-00003\.safetensors: no such file, but the index"):
        open_adapter(path, name="x")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "sub/x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", *ODD]
)
def test_an_index_names_files_beside_it_and_nothing_else(tmp_path, name):
    save_file(state(), tmp_path / "x.safetensors")
    path = sharded(tmp_path / "c", change=lambda index: index["weight_map"].update({first(index): name}) or index)
    with pytest.raises(FormatError, match="the name of a safetensors file beside the index needed"):
        open_adapter(path)


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(tmp_path):
    path = sharded(tmp_path / "c")
    (path / NAMES[1]).rename(path / "other.safetensors")
    (path / NAMES[1]).symlink_to("other.safetensors")
    assert same_updates(open_adapter(path), open_adapter(folder(tmp_path / "one")), limit=0.0)
    (path / "other.safetensors").rename(tmp_path / "other.safetensors")
    (path / NAMES[1]).unlink()
    (path / NAMES[1]).symlink_to("../other.safetensors")
    with pytest.raises(FormatError, match="a link that leads out of the folder"):
        open_adapter(path)


def test_a_download_cache_of_links_is_read(tmp_path):
    """Snapshots of the hub: every file is a link into one folder of blobs."""
    path, blobs = sharded(tmp_path / "snapshots" / "abc"), tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(f"../../blobs/{i}")
    assert same_updates(open_adapter(path), open_adapter(folder(tmp_path / "one")), limit=0.0)


def doubled(path):
    save_file(dict(list(state().items())[:2]), path / NAMES[1])


def unlisted(path):
    kept = {key: state()[key] for key in list(state())[:4:3]}
    save_file({**kept, "stranger": torch.ones(2)}, path / NAMES[0])


def absent(path):
    save_file({"stranger": torch.ones(2)}, path / NAMES[0])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (doubled, "is in .*00001.* and in .*00002"),
        (unlisted, "'stranger' is in .*does not list"),
        (absent, "is not in"),
    ],
)
def test_files_that_are_not_those_of_the_index_are_refused(tmp_path, damage, text):
    # the first file holds the first and the last of four tensors
    tensors = dict(list(state().items())[:4])
    path = sharded(tmp_path / "c", tensors)
    damage(path)
    with pytest.raises(FormatError, match=text):
        open_adapter(path)


def test_a_tensor_in_another_file_than_the_index_says_is_refused(tmp_path):
    def swap(index):
        keys = list(index["weight_map"])
        placed = index["weight_map"]
        placed[keys[0]], placed[keys[1]] = placed[keys[1]], placed[keys[0]]
        return index

    with pytest.raises(FormatError, match=r"is in .*00001.*, not in .*00002"):
        open_adapter(sharded(tmp_path / "c", change=swap))


@pytest.mark.parametrize("size", ["0", "12", "-1", "true", '"big"', "1e999", "2.5"])
def test_a_wrong_total_is_refused(tmp_path, size):
    path = sharded(tmp_path / "c", change=lambda index: index | {"metadata": {"total_size": 4711}})
    (path / INDEX_NAME).write_text((path / INDEX_NAME).read_text().replace("4711", size))
    with pytest.raises(FormatError, match="total_size"):
        open_adapter(path)


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": None}, {"total_size": "float"}])
def test_an_index_without_a_total_is_read_and_one_that_writes_it_as_a_float(tmp_path, metadata):
    if metadata and metadata["total_size"] == "float":
        metadata = {"total_size": float(sum(tensor.nbytes for tensor in state().values()))}
    path = sharded(tmp_path / "c", change=lambda index: index | {"metadata": metadata})
    assert len(open_adapter(path)) == len(SHAPES)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("{", "broken JSON"),
        ("[]", "one JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "occurs twice"),
    ],
)
def test_a_broken_index_is_named(tmp_path, text, needed):
    path = sharded(tmp_path / "c")
    (path / INDEX_NAME).write_text(text)
    with pytest.raises(FormatError, match=rf"{INDEX_NAME}.*{needed}"):
        open_adapter(path)


def test_more_files_than_a_process_can_open_are_refused_before_the_first(tmp_path):
    many = {f"k{i}": f"{i}.safetensors" for i in range(4097)}
    path = sharded(tmp_path / "c", change=lambda index: index | {"weight_map": many})
    with pytest.raises(LimitError, match="4097 files; at most 4096"):
        open_adapter(path)


def test_an_adapter_in_several_pickles_is_refused(tmp_path):
    path = folder(tmp_path / "c")
    (path / "adapter_model.safetensors").rename(path / "x.bin")
    (path / "adapter_model.bin.index.json").write_text("{}")
    with pytest.raises(FormatError, match="several pickles; re-save it as safetensors"):
        open_adapter(path)


def test_files_without_their_index_are_told_from_a_folder_without_any(tmp_path):
    path = sharded(tmp_path / "c")
    (path / INDEX_NAME).unlink()
    with pytest.raises(FormatError, match=rf"{NAMES[0]} without {INDEX_NAME}.*copy that one too"):
        open_adapter(path)


def test_files_are_closed_after_a_refusal_and_after_use(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    path = sharded(tmp_path / "c")
    open_adapter(path).close()
    (path / NAMES[2]).write_bytes(b"nothing")
    with pytest.raises(FormatError, match="7 bytes"):
        open_adapter(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_open_files_are_counted_for_the_limit_of_the_process(tmp_path):
    assert count_files(sharded(tmp_path / "c")) == 3
    assert count_files(folder(tmp_path / "d")) == 1
    assert count_files(tmp_path / "nowhere") == 1
