"""SafetensorsWriter: streams what the public library can read, with a header filled at the end."""

import errno
import os
import struct

import pytest
import torch
from safetensors import safe_open

from fedlora_kernels.adapters.safetensors import SafetensorsFile
from fedlora_kernels.adapters.safetensors_writer import SafetensorsWriter
from fedlora_kernels.errors import InputError, RunError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_public_library_reads_our_files(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": torch.randn(7, 3).to(dtype),
        "a": torch.randn(5, 11).to(dtype),
        "ümlaut\n": torch.randn(2).to(dtype),
    }
    with SafetensorsWriter(path, {k: (dtype, tuple(v.shape)) for k, v in tensors.items()}, {"who": "me"}) as file:
        for key, tensor in tensors.items():
            file.add(key, tensor)
    with safe_open(path, "pt") as back:
        assert back.metadata() == {"format": "pt", "who": "me"}
        assert set(back.keys()) == set(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(back.get_tensor(key), tensor)
    with SafetensorsFile(path) as ours:
        assert list(ours.tensors) == list(tensors)


def test_smaller_and_missing_tensors_fit_the_reserved_header(tmp_path):
    path = tmp_path / "x.safetensors"
    entries = {f"m{i}": (torch.float32, (1000, 1000)) for i in range(200)}
    file = SafetensorsWriter(path, entries)
    for i in range(0, 200, 3):
        file.add(f"m{i}", torch.full((i % 7 + 1, 3), float(i)))
    file.close({"late": "x" * 5000})
    file.close()
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0
    with safe_open(path, "pt") as back:
        assert len(list(back.keys())) == 67
        assert back.metadata()["late"] == "x" * 5000
        assert torch.equal(back.get_tensor("m9"), torch.full((3, 3), 9.0))


@pytest.mark.parametrize("spare", [0, 1, 7])
def test_the_bound_holds_at_its_edge(tmp_path, spare):
    entries = {"a": (torch.float32, (10, 10)), "b": (torch.float32, (3,))}
    with SafetensorsWriter(tmp_path / "x", entries, spare=spare) as file:
        file.add("a", torch.ones(10, 10))
        file.add("b", torch.ones(3))
    assert SafetensorsFile(tmp_path / "x").read("b").tolist() == [1, 1, 1]


def test_views_are_written_as_they_read(tmp_path):
    tensor = torch.arange(35.0).reshape(5, 7)
    views = {
        "t": tensor.t(),
        "s": tensor[::2, 1::3],
        "e": tensor[:1].expand(4, 7),
        "c": tensor[:, 1],
        "g": tensor.clone().requires_grad_(),
    }
    with SafetensorsWriter(tmp_path / "x", {k: (v.dtype, tuple(v.shape)) for k, v in views.items()}) as file:
        for key, view in views.items():
            file.add(key, view)
    for key, view in views.items():
        assert torch.equal(SafetensorsFile(tmp_path / "x").read(key), view)


def test_announcements_bind(tmp_path):
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "1", {}) as file:
        file.add("a", torch.ones(2))
    entries = {"a": (torch.float32, (2, 3))}
    for i, bad in enumerate([torch.ones(3, 3), torch.ones(2), torch.ones(2, 3).double()]):
        with pytest.raises(ValueError, match="does not fit"), SafetensorsWriter(tmp_path / f"b{i}", entries) as file:
            file.add("a", bad)
    with SafetensorsWriter(tmp_path / "2", entries) as file:
        file.add("a", torch.ones(2, 3))
        with pytest.raises(ValueError, match="came before"):
            file.add("a", torch.ones(2, 3))
    with pytest.raises(InputError, match="were reserved"):
        SafetensorsWriter(tmp_path / "3", entries).close({"x": "y" * 20_000})


def test_a_full_disc_is_a_run_error_that_says_so(tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (2, 3))})
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        file.add("a", torch.ones(2, 3))
    file.abandon()


def test_an_existing_file_is_never_written_over(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(RunError, match="File exists"):
        SafetensorsWriter(tmp_path / "x", {})
    assert (tmp_path / "x").read_text() == "mine"


def test_a_tensor_in_pieces_is_the_same_file(tmp_path):
    whole = torch.randn(5, 6)
    for name, pieces in (("one", [whole]), ("many", [whole[:2], whole[2:].reshape(-1), torch.empty(0)])):
        with SafetensorsWriter(tmp_path / name, {"x": (torch.float32, (9, 9))}) as file:
            file.add_pieces("x", (5, 6), iter(pieces))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


@pytest.mark.parametrize("pieces", [[torch.zeros(29)], [torch.zeros(31)], [torch.zeros(30, dtype=torch.float64)], []])
def test_pieces_that_do_not_add_up_are_refused(tmp_path, pieces):
    with (
        pytest.raises(ValueError, match="x: "),
        SafetensorsWriter(tmp_path / "f", {"x": (torch.float32, (9, 9))}) as file,
    ):
        file.add_pieces("x", (5, 6), pieces)


def test_a_file_goes_on_after_its_last_mark(tmp_path):
    """What an earlier process appended after the mark is gone, and not only overwritten."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(2, 2)}
    entries = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    first = SafetensorsWriter(tmp_path / "x", entries, marks=[])
    assert first.mark() is None
    first.add("a", tensors["a"])
    mark = first.mark()
    assert first.mark() is None
    first.add("b", tensors["b"])
    first.abandon()

    with SafetensorsWriter(tmp_path / "x", entries, marks=[mark]) as second:
        with pytest.raises(ValueError, match="came before"):
            second.add("a", tensors["a"])
        assert second.mark() is None
    with SafetensorsFile(tmp_path / "x") as file:
        assert list(file.tensors) == ["a"]
        assert torch.equal(file.read("a"), tensors["a"])

    with SafetensorsWriter(tmp_path / "x", entries, marks=[mark]) as third:
        third.add("c", tensors["c"])
        assert third.mark()["start"] == mark["end"]
    with safe_open(tmp_path / "x", "pt") as file:
        assert all(torch.equal(file.get_tensor(key), tensors[key]) for key in ("a", "c"))
        assert set(file.keys()) == {"a", "c"}


def test_a_file_begun_with_another_header_is_refused(tmp_path):
    entries = {"a": (torch.float32, (3,))}
    with SafetensorsWriter(tmp_path / "x", entries, marks=[]) as file:
        file.add("a", torch.ones(3))
        mark = file.mark()
    with pytest.raises(RunError, match="begun with another header"):
        SafetensorsWriter(tmp_path / "x", entries, {"who": "me"}, marks=[mark])
