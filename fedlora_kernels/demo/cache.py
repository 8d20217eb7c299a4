"""What a second run need not do again: trained adapters and the scores of adapters, keyed by all that decides them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedlora_kernels.demo.data import Domain
from fedlora_kernels.demo.settings import Settings

__all__ = ["ADAPTER_FILES", "Cache", "cache_key", "files_digest"]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def files_digest(folder: Path, names: Sequence[str]) -> str:
    """Return one SHA-256 over names and contents of files in a folder."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def cache_key(settings: Settings, domains: Sequence[Domain], model: str, versions: Mapping[str, str]) -> str:
    """Return the key of a run: 16 hex digits over settings, every sentence, the digest of the model, and versions."""
    parts = [dataclasses.asdict(settings), [dataclasses.asdict(d) for d in domains], model, dict(versions)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Cache:
    """A folder ``root/key`` with adapters by name and ``scores.json``. Entries appear complete or not at all."""

    def __init__(self, root: Path, key: str) -> None:
        self.folder = root / f"run-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def adapter(self, name: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """Return the adapter's folder, and whether it was there; ``make`` fills a new folder where it was not."""
        target = self.folder / name
        if all((target / file).is_file() for file in ADAPTER_FILES):
            return target, True
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            made = Path(temporary) / name
            make(made)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(made, target)
        return target, False

    def scores(self, digest: str, make: Callable[[], dict[str, float]]) -> tuple[dict[str, float], bool]:
        """Return the accuracy by domain of the adapter with this digest, and whether it was known."""
        path = self.folder / "scores.json"
        known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
        if digest in known:
            return known[digest], True
        known[digest] = make()
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known, indent=1, sort_keys=True))
        os.replace(temporary, path)
        return known[digest], False
