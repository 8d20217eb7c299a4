"""The stages of the demonstration in order: train, aggregate, check, score, report."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_kernels.demo import compare, model
from fedlora_kernels.demo.cache import ADAPTER_FILES, Cache, cache_key, files_digest
from fedlora_kernels.demo.data import Domain, checksum_note, find_archive, read_domains
from fedlora_kernels.demo.report import Row, write_results
from fedlora_kernels.demo.settings import Client, Settings
from fedlora_kernels.demo.train import train_client
from fedlora_kernels.errors import RunError

__all__ = ["METHODS", "Demonstration"]

EXACT = "florist 1.0"
METHODS: Mapping[str, tuple[str, ...]] = {
    EXACT: ("--energy", "1.0"),
    "florist 0.9": ("--energy", "0.9"),
    "zero_pad": ("--method", "zero_pad"),
}
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
CODE_FILES = ("model.py", "train.py")
LOGIT_LIMIT = 1e-4
ERROR_LIMIT = 1e-6
"""Rounding of float32 factors: 2^-24 on each of B and A; a reported error leaves it out."""
LOGIT_SENTENCES = 16


class Demonstration:
    """Data, model and cache of one run. Raises InputError where one of them is missing."""

    def __init__(self, data: Path, cache: Path, settings: Settings) -> None:
        model.go_offline()
        versions = model.versions()
        self.settings = settings
        self.model = model.model_folder()
        archive = find_archive(data)
        if note := checksum_note(archive):
            _say(f"note: {note}")
        domains = read_domains(
            archive, threshold=settings.threshold, test_share=settings.test_share, seed=settings.seed
        )
        self.domains = [_limited(domains[client.domain], settings) for client in settings.clients]
        self.weights = [len(domain.train) for domain in self.domains]
        self.tests = {d.name: model.Encoder(self.model, d.test, settings.max_length) for d in self.domains}
        weights, code = files_digest(self.model, MODEL_FILES), files_digest(Path(__file__).parent, CODE_FILES)
        self.cache = Cache(cache, cache_key(settings, self.domains, weights, versions | {"code": code}))

    def run(self, out: Path) -> None:
        """Run every stage; all files go to ``out``."""
        clients = [
            self._train(*pair, out / "clients") for pair in zip(self.settings.clients, self.domains, strict=True)
        ]
        reports = {name: self._aggregate(clients, _folder(out, name), flags) for name, flags in METHODS.items()}
        ideal = self._ideal(clients)
        gap, sentences = self._logit_gap(ideal, _folder(out, EXACT))
        rows = self._baselines()
        rows += [self._row(f"client {folder.name}", folder, own=folder.name) for folder in clients]
        for name, report in reports.items():
            row = self._row(name, _folder(out, name))
            error = compare.relative_error(ideal, compare.updates(self._load(_folder(out, name))))
            totals, seconds = report["totals"], report["seconds"]["total"]
            if (totals["rank"], totals["bytes"]) != (row.rank, row.nbytes):
                raise RunError(f"{name}: the report has {totals}, the file rank {row.rank} and {row.nbytes} bytes")
            if not abs(error - totals["error"]) <= ERROR_LIMIT:
                raise RunError(f"{name}: error {totals['error']:.3e} reported, {error:.3e} against the dense sum")
            rows.append(dataclasses.replace(row, error=totals["error"], dense_error=error, seconds=seconds))
        note = f"Logits of {EXACT} and of the dense float64 sum differ by at most {gap:.1e} ({sentences} sentences)."
        write_results(out, rows, reports[EXACT], [*self._description(), note])

    def _train(self, client: Client, domain: Domain, parent: Path) -> Path:
        _say(
            f"client {client.domain}: rank {client.rank}, scale {client.scale:g}, {len(domain.train)} sentences ...",
            end=" ",
        )
        start = time.perf_counter()
        cached, known = self.cache.adapter(
            client.domain, lambda folder: train_client(client, domain, self.model, folder, self.settings)
        )
        _say("cached" if known else f"trained in {time.perf_counter() - start:.0f} s")
        folder = parent / client.domain
        folder.mkdir(parents=True, exist_ok=True)
        for file in ADAPTER_FILES:
            shutil.copyfile(cached / file, folder / file)
        return folder

    def _aggregate(self, clients: Sequence[Path], out: Path, flags: Sequence[str]) -> dict[str, Any]:
        weights = ",".join(map(str, self.weights))
        arguments = ["aggregate", *map(str, clients), "-o", str(out), *flags, "--weights", weights, "--overwrite"]
        _say(f"$ fedlora {' '.join(arguments)}")
        command = [sys.executable, "-m", "fedlora_kernels", *arguments, "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"fedlora aggregate ended with status {done.returncode}: {done.stderr.strip()}")
        if done.stderr:
            _say(done.stderr.rstrip())
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        return report

    def _load(self, adapter: Path) -> Any:
        return compare.load_adapter(self.model, adapter, self.settings.seed)

    def _ideal(self, clients: Sequence[Path]) -> dict[str, Any]:
        return compare.weighted_sum([compare.updates(self._load(folder)) for folder in clients], self.weights)

    def _logit_gap(self, ideal: Mapping[str, Any], adapter: Path) -> tuple[float, int]:
        sentences = [s for domain in self.domains for s in domain.test[:LOGIT_SENTENCES]]
        sample = model.Encoder(self.model, sentences, self.settings.max_length)
        gap = compare.logit_gap(compare.dense_model(self.model, ideal, self.settings.seed), self._load(adapter), sample)
        if not gap <= LOGIT_LIMIT:
            raise RunError(f"{adapter}: logits differ from those of the dense sum by {gap:.1e}; limit {LOGIT_LIMIT:g}")
        return gap, len(sample)

    def _row(self, name: str, adapter: Path, own: str | None = None) -> Row:
        digest = files_digest(adapter, ADAPTER_FILES)
        rank, nbytes = compare.size(adapter)
        return Row(name, self._scores(name, digest, lambda: self._load(adapter)), own=own, rank=rank, nbytes=nbytes)

    def _baselines(self) -> list[Row]:
        majority = {domain.name: domain.majority for domain in self.domains}
        untrained = self._scores(
            "untrained head", "untrained", lambda: model.load_classifier(self.model, self.settings.seed)
        )
        return [Row("commoner label", majority), Row("untrained head", untrained)]

    def _scores(self, name: str, digest: str, load: Any) -> dict[str, float]:
        _say(f"scoring {name} ...", end=" ")
        start = time.perf_counter()

        def score() -> dict[str, float]:
            loaded = load()
            return {domain: model.accuracy(loaded, test) for domain, test in self.tests.items()}

        scores, known = self.cache.scores(digest, score)
        _say("cached (the same bytes)" if known else f"{time.perf_counter() - start:.0f} s")
        return scores

    def _description(self) -> list[str]:
        counts = ", ".join(f"{d.name} {len(d.train)}/{len(d.test)}" for d in self.domains)
        scales = ", ".join(f"{c.rank} and {c.scale:g}" for c in self.settings.clients)
        return [
            f"Sentences to train on / held out: {counts}. Ranks and scales alpha/r: {scales}. "
            f"{self.settings.steps} steps of {self.settings.batch}, learning rate {self.settings.learning_rate:g}, "
            f"seed {self.settings.seed}; weights are the numbers of training sentences.",
            f"An accuracy of 80 % has a standard error of up to {100 * self._standard_error():.1f} points.",
        ]

    def _standard_error(self) -> float:
        """Of a share of 0.8 among the sentences of the smallest test set."""
        return math.sqrt(0.8 * 0.2 / min(len(test) for test in self.tests.values()))


def _limited(domain: Domain, settings: Settings) -> Domain:
    return dataclasses.replace(
        domain, train=domain.train[: settings.train_limit], test=domain.test[: settings.test_limit]
    )


def _folder(out: Path, method: str) -> Path:
    return out / method.replace(" ", "-")


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
