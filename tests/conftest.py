"""Switches and fixtures for every test: the long form, devices, and poisoned memory."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run tests marked full (make test-full)")


def pytest_collection_modifyitems(config, items):
    no_gpu = None if torch.cuda.is_available() else pytest.mark.skip(reason="no NVIDIA GPU on this machine")
    not_full = None if config.getoption("--full") else pytest.mark.skip(reason="long form: make test-full")
    for item in items:
        if no_gpu and "gpu" in item.keywords:
            item.add_marker(no_gpu)
        if not_full and "full" in item.keywords:
            item.add_marker(not_full)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty and friends answer NaN-filled memory, so that an element nobody wrote shows up."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.dtype.is_floating_point:
                out.fill_(float("nan"))
            elif out.dtype not in (torch.bool,):
                out.fill_(85)
            return out

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture
def unsynced(monkeypatch):
    """Nothing waits for the disc: tests that write many small outputs care for what is written, not for when it is durable."""
    monkeypatch.setattr("os.fsync", lambda fd: None)
