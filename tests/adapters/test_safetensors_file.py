"""SafetensorsFile: every dtype, every rule of the format, and hostile bytes."""

import os
import struct
import time

import pytest
import torch
from adapter_files import raw_safetensors, state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedlora_kernels.adapters.safetensors import SafetensorsFile
from fedlora_kernels.errors import FormatError

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
DATA = bytes(range(24))


def written(tmp_path, content):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_reads_what_the_public_library_wrote(tmp_path, dtype, poisoned_empty):
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7).to(dtype), "scalar": torch.tensor(1.5).to(dtype)}
    with SafetensorsFile(written(tmp_path, save(tensors, metadata={"k": "v"}))) as file:
        assert file.metadata == {"k": "v"}
        assert set(file.tensors) == set(tensors)
        for key, tensor in tensors.items():
            assert file.tensors[key].shape == tuple(tensor.shape)
            assert file.tensors[key].dtype == dtype
            assert torch.equal(file.read(key), tensor)


def test_zero_size_tensors_are_read(tmp_path):
    with SafetensorsFile(written(tmp_path, save({"a": torch.empty(0, 3), "b": torch.ones(2)}))) as file:
        assert file.read("a").shape == (0, 3)
        assert torch.equal(file.read("b"), torch.ones(2))


def test_reads_into_a_given_tensor_and_only_one_that_fits(tmp_path):
    tensor = torch.randn(3, 5)
    with SafetensorsFile(written(tmp_path, save({"a": tensor}))) as file:
        out = torch.full((3, 5), float("nan"))
        assert file.read("a", out) is out
        assert torch.equal(out, tensor)
        for bad in (torch.empty(5, 3), torch.empty(3, 5, dtype=torch.float64), torch.empty(5, 3).t()):
            with pytest.raises(ValueError, match="contiguous"):
                file.read("a", bad)


@pytest.mark.parametrize(("chunk", "most"), [(1 << 30, 1024), (1 << 30, 2), (50, 1024)])
def test_stacks_are_read_whatever_their_order_in_the_file(tmp_path, monkeypatch, chunk, most):
    monkeypatch.setattr("fedlora_kernels.adapters.safetensors.CHUNK", chunk)
    monkeypatch.setattr("fedlora_kernels.adapters.safetensors.MOST_BUFFERS", most)
    tensors = {f"{letter}{i}": torch.randn(3, 5 if letter == "a" else 2) for i in range(4) for letter in "abc"}
    with SafetensorsFile(written(tmp_path, save(tensors))) as file:
        first, second = ["a2", "a0", "a3", "a1"], ["c1", "b0"]
        a, b = torch.full((4, 3, 5), float("nan")), torch.full((2, 3, 2), float("nan"))
        file.read_stacks([(first, a), (second, b), ([], torch.empty(0, 7))])
        assert torch.equal(a, torch.stack([tensors[key] for key in first]))
        assert torch.equal(b, torch.stack([tensors[key] for key in second]))
        for keys, out in (["a0", "b0"], a[:2]), (["a0"], a), (["a0"], a[:1].double()), (["a0", "a1"], a[::2]):
            with pytest.raises(ValueError, match="out must"):
                file.read_stacks([(keys, out)])


def test_stacks_of_a_file_truncated_after_opening_name_file_and_tensor(tmp_path):
    path = written(tmp_path, save({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}))
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 7)
        with pytest.raises(FormatError, match=r"adapter_model\.safetensors: tensor 'b' ends after 17 of 24 bytes"):
            file.read_stacks([(["a", "b"], torch.empty(2, 2, 3))])


def test_large_reads_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("fedlora_kernels.adapters.safetensors.CHUNK", 17)
    tensor = torch.randn(31, 5)
    with SafetensorsFile(written(tmp_path, save({"a": tensor}))) as file:
        assert torch.equal(file.read("a"), tensor)


def test_a_file_truncated_after_opening_is_an_error_naming_file_and_tensor(tmp_path):
    path = written(tmp_path, save({"a": torch.randn(3, 5)}))
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 7)
        with pytest.raises(FormatError, match=r"adapter_model.safetensors: tensor 'a' ends after 53 of 60 bytes"):
            file.read("a")


BROKEN = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "header over the cap": (struct.pack("<Q", 1 << 62), "at most 100000000"),
    "header past the end": (struct.pack("<Q", 50) + b"{}", "truncated"),
    "not JSON": (raw_safetensors(b"{nope}"), "broken JSON"),
    "not UTF-8": (raw_safetensors(b'{"\xff": 1}'), "broken JSON"),
    "not an object": (raw_safetensors(b"[1, 2]"), "does not begin with"),
    "leading space": (raw_safetensors(b" {}"), "does not begin with"),
    "deep nesting": (raw_safetensors(b'{"a":' + b"[" * 100_000), "broken JSON"),
    "endless integer": (raw_safetensors(b'{"a":' + b"9" * 100_000 + b"}"), "broken JSON|header entry"),
    "NaN": (raw_safetensors(b'{"a": NaN}'), "NaN is not JSON"),
    "duplicate tensor": (raw_safetensors(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "metadata no strings": (raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__ must map strings to strings"),
    "metadata no text": (raw_safetensors({"__metadata__": {"a": "\ud800"}}), "half a surrogate pair"),
    "metadata no object": (raw_safetensors({"__metadata__": "a"}), "__metadata__ must map strings to strings"),
    "entry no object": (raw_safetensors({"a": 3}), "tensor 'a': the header entry"),
    "entry lacks shape": (raw_safetensors({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "the header entry"),
    "entry with more": (raw_safetensors({"a": {**ENTRY, "more": 1}}, DATA), "the header entry"),
    "unknown dtype": (raw_safetensors({"a": {**ENTRY, "dtype": "F31"}}, DATA), "dtype 'F31' is not known"),
    "dtype no text": (raw_safetensors({"a": {**ENTRY, "dtype": [1]}}, DATA), "is not known"),
    "shape no list": (raw_safetensors({"a": {**ENTRY, "shape": 6}}, DATA), "shape 6 is not a list"),
    "negative size": (raw_safetensors({"a": {**ENTRY, "shape": [-2, -3]}}, DATA), "is not a list of sizes"),
    "size is true": (raw_safetensors({"a": {**ENTRY, "shape": [True, 6]}}, DATA), "is not a list of sizes"),
    "size is 6.0": (raw_safetensors({"a": {**ENTRY, "shape": [6.0]}}, DATA), "is not a list of sizes"),
    "65 dimensions": (raw_safetensors({"a": {**ENTRY, "shape": [1] * 65}}, DATA), "is not a list of sizes"),
    "one offset": (raw_safetensors({"a": {**ENTRY, "data_offsets": [24]}}, DATA), "not two byte positions"),
    "offsets reversed": (raw_safetensors({"a": {**ENTRY, "data_offsets": [24, 0]}}, DATA), "-24 bytes"),
    "shape against range": (
        raw_safetensors({"a": {**ENTRY, "shape": [2, 4]}}, DATA),
        r"24 bytes; F32 \[2, 4\] needs 32",
    ),
    "huge shape": (raw_safetensors({"a": {**ENTRY, "shape": [2**62, 2**62]}}, DATA), "24 bytes; F32"),
    "range past the end": (raw_safetensors({"a": ENTRY}, DATA[:20]), "take 24 bytes, the file holds 20"),
    "bytes left over": (raw_safetensors({"a": ENTRY}, DATA + b"x"), "take 24 bytes, the file holds 25"),
    "hole": (
        raw_safetensors({"a": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}, b"123456"),
        "leaves a hole before it; 0 expected",
    ),
    "overlap": (
        raw_safetensors({"a": ENTRY, "b": {"dtype": "U8", "shape": [10], "data_offsets": [20, 30]}}, DATA + b"123456"),
        "overlaps the tensor before it",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_in_one_line_naming_the_file(tmp_path, name):
    content, text = BROKEN[name]
    with pytest.raises(FormatError, match=text) as caught:
        SafetensorsFile(written(tmp_path, content))
    assert "adapter_model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_things_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, text in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "not a regular file|directory"),
        (tmp_path / "pipe", "not a regular file"),
        ("a\0b", "null"),
    ):
        with pytest.raises(FormatError, match=text):
            SafetensorsFile(path)


def test_no_descriptor_stays_open_after_a_refusal(tmp_path):
    path = written(tmp_path, b"{nope}" * 9)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(FormatError):
            SafetensorsFile(path)
    assert len(os.listdir("/proc/self/fd")) == before


GOOD = save(state({"q": (5, 3, 2), "v": (2, 7, 2)}), metadata={"format": "pt"})


@st.composite
def damaged(draw):
    content = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.one_of(st.integers(0, 40), st.integers(0, len(content) - 1)))
        content[position] = draw(st.integers(0, 255))
    cut = draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    return bytes(content[:cut]) + draw(st.sampled_from([b"", b"", b"x", b"{" * 50]))


def check_damaged(path, content):
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except FormatError:
        return
    with file:
        assert sum(spec.nbytes for spec in file.tensors.values()) <= len(content)
        for key in file.tensors:
            file.read(key)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(content=damaged())
def test_damaged_files_raise_only_format_errors(tmp_path_factory, content):
    check_damaged(tmp_path_factory.getbasetemp() / "damaged.safetensors", content)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None, derandomize=True)
@given(content=damaged())
def test_damaged_files_raise_only_format_errors_long(tmp_path_factory, content):
    check_damaged(tmp_path_factory.getbasetemp() / "damaged.safetensors", content)


def test_every_truncation_is_refused(tmp_path):
    for cut in range(len(GOOD)):
        with pytest.raises(FormatError):
            SafetensorsFile(written(tmp_path, GOOD[:cut]))


def test_a_key_given_twice_among_very_many_is_found_at_once(tmp_path):
    keys = b"".join(b'"%d":0,' % i for i in range(200_000))
    started = time.perf_counter()
    with pytest.raises(FormatError, match="key '199999' occurs twice"):
        SafetensorsFile(written(tmp_path, raw_safetensors(b"{" + keys + b'"199999":0}')))
    assert time.perf_counter() - started < 20
