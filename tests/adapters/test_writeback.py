"""Writing that begins early: every byte once and in order, and nothing depends on it."""

import torch

from fedlora_kernels.adapters import writeback
from fedlora_kernels.adapters.safetensors import SafetensorsFile
from fedlora_kernels.adapters.safetensors_writer import SafetensorsWriter
from fedlora_kernels.adapters.writeback import STEP, Writeback


def test_every_step_is_asked_for_once_and_in_order(monkeypatch):
    asked = []
    monkeypatch.setattr(writeback, "_sync_file_range", lambda: lambda *arguments: asked.append(arguments))
    back = Writeback(7, 100)
    for end in (100, 99 + STEP, 100 + STEP, 101 + STEP, 101 + 3 * STEP):
        back.reached(end)
    assert asked == [(7, 100, STEP, 2), (7, 100 + STEP, 2 * STEP + 1, 2)]


def test_a_file_is_the_same_with_and_without(tmp_path, monkeypatch):
    tensors = {f"t{i}": torch.randn(3 << 19) for i in range(6)}
    entries = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    contents = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(writeback, "_sync_file_range", lambda: None)
        with SafetensorsWriter(tmp_path / name, entries) as file:
            for key, tensor in tensors.items():
                file.add(key, tensor)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    with SafetensorsFile(tmp_path / "with") as file:
        assert all(torch.equal(file.read(key), tensor) for key, tensor in tensors.items())


def test_the_system_takes_the_call(tmp_path):
    call = writeback._sync_file_range()
    with open(tmp_path / "file", "wb") as file:
        file.write(b"x" * 5000)
        file.flush()
        assert call is None or call(file.fileno(), 0, 5000, writeback.WRITE) == 0
