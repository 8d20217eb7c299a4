"""One aggregation from admitted clients to a finished output and its report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedlora_kernels import backends
from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.config import peft_config
from fedlora_kernels.adapters.folder import OutputFolder
from fedlora_kernels.adapters.model import Adapter, ExtraSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.validation import ClientCheck
from fedlora_kernels.engine.clients import PRESENT, Client, admit, drop, normalised, present
from fedlora_kernels.engine.extras import combine_extra, scan_extras
from fedlora_kernels.engine.output import FolderOutput, MemoryOutput, Output
from fedlora_kernels.engine.passes import Engine, SurveyResult
from fedlora_kernels.engine.report import SCHEMA, certificates, number, totals
from fedlora_kernels.engine.settings import Settings
from fedlora_kernels.errors import MismatchError

__all__ = ["Run"]


class Run:
    """One aggregation from admitted clients to a finished output."""

    def __init__(self, settings: Settings, roster: list[Client], check: ClientCheck) -> None:
        self.settings = settings
        self.roster = roster
        self.check = check
        self.warnings = [text for client in roster if client.adapter for text in client.adapter.warnings]
        self.warnings += check.warnings
        if not settings.method.uses_weights and len({client.weight for client in roster}) > 1:
            self.warnings.append(
                f"method {settings.method.name!r} uses no weights; the unequal ones given change nothing"
            )
        self.warnings += _dropped(roster)
        self._check_ranks()
        self.engine = self._engine()
        self.passes = 1

    def execute(
        self, folder: OutputFolder | None, seen: Mapping[Any, None], started: float
    ) -> tuple[Adapter, dict[str, Any]]:
        """Survey if needed, combine, write; return the adapter and the report. Nothing is committed if anything fails."""
        plan = self._decide()
        output = self._output(folder)
        engine, settings = self.engine, self.settings
        try:
            rows = engine.combine(plan, output.add_pairs, drop_zero=settings.write.drop_zero)
            extras, kept = self._extras(output, rows)
            ranks = {row["name"]: row["rank"] for row in rows if row["rank"] > 0}
            largest = max(ranks.values(), default=0) if settings.write.pads else None
            config = peft_config([c.opened for c in engine.clients], ranks, kept)
            summary = _summary(rows, len(self.roster), ranks, engine.dtype, largest)
            output.finish(config, certificates(summary))
        except BaseException:
            if isinstance(output, FolderOutput):
                output.abandon()
            raise
        engine.seconds["total"] = time.perf_counter() - started
        report = self._report(rows, extras, summary, seen)
        return output.commit(report), report

    def _check_ranks(self) -> None:
        """Refuse mixed ranks, by their headers, where the method cannot take them."""
        method = self.settings.method
        for name in self.check.modules if method.equal_ranks else ():
            owners = [client for client in present(self.roster) if name in client.opened.modules]
            first, rank = owners[0], owners[0].opened.modules[name].rank
            for client in owners:
                if (found := client.opened.modules[name].rank) != rank:
                    raise MismatchError(
                        f"client {printable(client.name)!r}, module {printable(name)!r}: rank {found}, but {rank} in client "
                        f"{printable(first.name)!r}; method {method.name!r} needs one rank. florist, flora, zero_pad and hetlora "
                        "take mixed ranks"
                    )

    def _engine(self) -> Engine:
        settings = self.settings
        clients = present(self.roster)
        adapters = [client.opened for client in clients]
        wide = any(spec.dtype == torch.float64 for a in adapters for m in a.modules.values() for spec in (m.B, m.A))
        return Engine(
            method=settings.method,
            clients=clients,
            positions=[k for k, client in enumerate(self.roster) if client.status in PRESENT],
            weights=normalised([client.weight for client in clients], settings.normalize),
            modules=list(self.check.modules),
            missing=settings.read.missing,
            dtype=settings.dtype or (torch.float64 if wide else torch.float32),
            device=settings.device,
            backend=settings.backend,
            seed=settings.seed,
            round=settings.round,
            memory=settings.memory,
            progress=settings.progress,
        )

    def _decide(self) -> Any:
        """What the method decides over the whole model, after the policy has looked at all data."""
        policy, method = self.settings.policy, self.settings.method
        if policy.kind == "strict" and not method.needs_decision:
            return None
        self.passes = 2
        survey = self.engine.survey()
        survey = self._without_failing(survey)
        norms = np.sqrt(np.maximum(survey.squares, 0.0))
        for k, client in enumerate(self.engine.clients):
            client.norm = number(float(np.sqrt((norms[:, k] ** 2).sum())))
        if policy.kind == "clip":
            self._clip(norms)
        return method.decide(survey.stats, self.engine.census(survey)) if method.needs_decision else None

    def _without_failing(self, survey: SurveyResult) -> SurveyResult:
        engine = self.engine
        for k, error in survey.errors.items():
            engine.clients[k].failures.append(error)
        for client, extra_error in scan_extras(engine.clients, list(self.check.extras)):
            client.failures.append(extra_error)
        failing = [client for client in engine.clients if client.failures]
        if not failing:
            return survey
        drop(self.roster, failing, self.settings.policy)
        self.check = admit(self.roster, self.settings.policy, self.settings.read)
        self.warnings += _dropped(engine.clients)
        keep = [k for k, client in enumerate(engine.clients) if client.status in PRESENT]
        at = {name: row for row, name in enumerate(engine.modules)}
        rows = [at[name] for name in self.check.modules]  # in the order of the first client that is left
        weights = normalised([engine.clients[k].weight for k in keep], self.settings.normalize)
        self.engine = engine.select(keep, [engine.modules[row] for row in rows], weights)
        if self.settings.dtype is None:
            self.engine.dtype = self._engine().dtype
        return SurveyResult(
            survey.squares[np.ix_(rows, keep)],
            survey.finite[np.ix_(rows, keep)],
            None if survey.gram is None else survey.gram[np.ix_(rows, keep, keep)],
            {},
            {name: values[rows] for name, values in survey.stats.items()},
        )

    def _clip(self, norms: np.ndarray) -> None:
        """Scale updates beyond the bound down to it: a factor on s_k, per client or per client and module."""
        policy, engine = self.settings.policy, self.engine
        size = norms if policy.per == "module" else np.sqrt((norms**2).sum(0, keepdims=True))
        if policy.max_update_norm in (None, "median"):
            owns = np.array([[name in c.opened.modules for c in engine.clients] for name in engine.modules])
            masked = np.where(owns if policy.per == "module" else owns.any(0, keepdims=True), size, np.nan)
            bound = np.nanmedian(masked, axis=1, keepdims=True)
        else:
            bound = np.full((len(size), 1), float(policy.max_update_norm or 0.0))
        factors = np.where(size > bound, bound / np.where(size > 0.0, size, 1.0), 1.0)
        engine.factors = np.broadcast_to(factors, norms.shape).copy()
        for k, client in enumerate(engine.clients):
            client.factor = float(factors[:, k].min())
            if client.factor < 1.0:
                client.status = "clipped"

    def _output(self, folder: OutputFolder | None) -> Output:
        settings, engine = self.settings, self.engine
        settings.write.check_extras(self.check.extras)
        metadata = {
            "fedlora.version": __version__,
            "fedlora.method": settings.method.name,
            "fedlora.rule": str(getattr(settings.method, "rule", None) or ""),
            "fedlora.round": str(settings.round),
            "fedlora.weights": json.dumps(list(engine.weights)),
            "fedlora.clients": json.dumps([client.name for client in engine.clients]),
        }
        if folder is None:
            return MemoryOutput(settings.write, settings.seed, settings.round, metadata)
        shapes = {}
        for name, spec in self.check.modules.items():
            stacked = sum(c.opened.modules[name].rank for c in engine.clients if name in c.opened.modules)
            shapes[name] = (spec.m, spec.n, stacked)
        return FolderOutput(
            folder, shapes, self.check.extras, engine.dtype, metadata, settings.write, settings.seed, settings.round
        )

    def _extras(
        self, output: Output, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, ExtraSpec]]:
        """Combine and write the tensors that are no factors; a bias goes with its module if that is left out."""
        left_out = {row["name"] for row in rows if row["rank"] == 0}
        engine, read = self.engine, self.settings.read
        described, kept = [], {}
        for name, spec in self.check.extras.items():
            if spec.rule == "lora_bias" and spec.module in left_out:
                continue
            value, how = combine_extra(
                name,
                engine.clients,
                engine.weights,
                engine.bias_scales(spec.module) if spec.rule == "lora_bias" else None,
                rule=read.extras,
                missing=read.missing,
                dtype=engine.dtype,
            )
            output.add_extra(name, value)
            described.append({"name": name, "rule": how, "shape": list(value.shape)})
            kept[name] = spec
        return described, kept

    def _report(
        self,
        rows: list[dict[str, Any]],
        extras: list[dict[str, Any]],
        summary: dict[str, Any],
        seen: Mapping[Any, None],
    ) -> dict[str, Any]:
        settings, engine = self.settings, self.engine
        used = dict.fromkeys(entry.backend for entry in seen if isinstance(entry, backends.Choice))
        fallbacks = [entry._asdict() for entry in seen if isinstance(entry, backends.Fallback)]
        rule = getattr(settings.method, "rule", None)
        return {
            "schema": SCHEMA,
            "tool": {"name": "fedlora_kernels", "version": __version__},
            "method": {
                "name": settings.method.name,
                "options": settings.method.options(),
                "rule": None if rule is None else str(rule),
            },
            "backend": {
                "requested": settings.backend,
                "used": list(used),
                "device": str(settings.device),
                "fallbacks": fallbacks,
            },
            "policy": dataclasses.asdict(settings.policy),
            "normalize": settings.normalize,
            "round": settings.round,
            "seed": settings.seed,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "clients": self._client_rows(),
            "modules": rows,
            "extras": extras,
            "totals": summary,
            "warnings": list(dict.fromkeys(self.warnings)),
            "notes": self._notes(),
            "passes": self.passes,
            "seconds": {stage: round(spent, 6) for stage, spent in engine.seconds.items()},
        }

    def _notes(self) -> list[str]:
        """Facts for the report only: from reading, and modules that some clients lack."""
        notes = [text for client in self.roster if client.adapter for text in client.adapter.notes]
        lacking = [n for n in self.engine.modules if any(n not in c.opened.modules for c in self.engine.clients)]
        if lacking:
            how = (
                "are the means over their owners"
                if self.engine.missing == "renormalize"
                else "count missing updates as zero"
            )
            notes.append(f"modules that some clients lack ({len(lacking)}, {printable(lacking[0])!r} first) {how}")
        return list(dict.fromkeys(notes))

    def _client_rows(self) -> list[dict[str, Any]]:
        weights = dict(zip((c.name for c in self.engine.clients), self.engine.weights, strict=True))
        return [client.row(weights.get(client.name, 0.0)) for client in self.roster]


def _dropped(clients: Sequence[Client]) -> list[str]:
    return [client.drop_text for client in clients if client.status == "dropped"]


def _summary(
    rows: Sequence[Mapping[str, Any]], clients: int, ranks: Mapping[str, int], dtype: torch.dtype, uniform: int | None
) -> dict[str, Any]:
    parameters = sum((row["m"] + row["n"]) * (uniform or row["rank"]) for row in rows if row["name"] in ranks)
    return totals(rows, clients, parameters, parameters * dtype.itemsize)
