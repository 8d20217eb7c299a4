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
from fedlora_kernels.engine.clients import Client
from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.engine.combine import combine
from fedlora_kernels.engine.extras import combine_extra
from fedlora_kernels.engine.output import FolderOutput, MemoryOutput, Output
from fedlora_kernels.engine.policy import admit, blame, check_ranks, clip, drop
from fedlora_kernels.engine.report import SCHEMA, certificates, number, totals
from fedlora_kernels.engine.settings import Settings
from fedlora_kernels.engine.survey import Survey, make_survey
from fedlora_kernels.engine.walk import Walk

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
        check_ranks(settings.method, check.modules, roster)
        self.walk = Walk(settings, self._cohort())
        self.passes = 1

    def execute(
        self, folder: OutputFolder | None, seen: Mapping[Any, None], started: float
    ) -> tuple[Adapter, dict[str, Any]]:
        """Survey if needed, combine, write; return the adapter and the report. Nothing is committed if anything fails."""
        plan = self._decide()
        output = self._output(folder)
        walk, settings = self.walk, self.settings
        try:
            rows = combine(walk, plan, output.add_pairs)
            extras, kept = self._extras(output, rows)
            ranks = {row["name"]: row["rank"] for row in rows if row["rank"] > 0}
            largest = max(ranks.values(), default=0) if settings.write.pads else None
            config = peft_config(walk.cohort.adapters, ranks, kept)
            summary = _summary(rows, len(self.roster), ranks, walk.dtype, largest)
            output.finish(config, certificates(summary))
        except BaseException:
            if isinstance(output, FolderOutput):
                output.abandon()
            raise
        walk.seconds["total"] = time.perf_counter() - started
        report = self._report(rows, extras, summary, seen)
        return output.commit(report), report

    def _cohort(self) -> Cohort:
        settings = self.settings
        return Cohort.of(
            self.roster, list(self.check.modules), normalize=settings.normalize, missing=settings.read.missing
        )

    def _decide(self) -> Any:
        """What the method decides over the whole model, after the policy has looked at all data."""
        policy, method = self.settings.policy, self.settings.method
        if policy.kind == "strict" and not method.needs_decision:
            return None
        self.passes = 2
        survey = self._without_failing(make_survey(self.walk))
        cohort = self.walk.cohort
        norms = np.sqrt(np.maximum(survey.squares, 0.0))
        for k, client in enumerate(cohort.clients):
            client.norm = number(float(np.sqrt((norms[:, k] ** 2).sum())))
        if policy.kind == "clip":
            clip(cohort, norms, policy)
        return method.decide(survey.stats, survey.census(cohort)) if method.needs_decision else None

    def _without_failing(self, survey: Survey) -> Survey:
        cohort, settings = self.walk.cohort, self.settings
        failing = blame(cohort.clients, survey.errors, list(self.check.extras))
        if not failing:
            return survey
        drop(self.roster, failing, settings.policy)
        self.check = admit(self.roster, settings.policy, settings.read)
        self.warnings += _dropped(cohort.clients)
        self.walk = self.walk.narrowed(self._cohort())
        return survey.select(*cohort.places(self.walk.cohort))

    def _output(self, folder: OutputFolder | None) -> Output:
        settings, cohort = self.settings, self.walk.cohort
        settings.write.check_extras(self.check.extras)
        metadata = {
            "fedlora.version": __version__,
            "fedlora.method": settings.method.name,
            "fedlora.rule": str(getattr(settings.method, "rule", None) or ""),
            "fedlora.round": str(settings.round),
            "fedlora.weights": json.dumps(list(cohort.weights)),
            "fedlora.clients": json.dumps([client.name for client in cohort.clients]),
        }
        if folder is None:
            return MemoryOutput(settings.write, settings.seed, settings.round, metadata)
        shapes = {}
        for name, spec in self.check.modules.items():
            shapes[name] = (spec.m, spec.n, sum(cohort.ranks[cohort.index[name]]))
        return FolderOutput(
            folder, shapes, self.check.extras, self.walk.dtype, metadata, settings.write, settings.seed, settings.round
        )

    def _extras(
        self, output: Output, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, ExtraSpec]]:
        """Combine and write the tensors that are no factors; a bias goes with its module if that is left out."""
        left_out = {row["name"] for row in rows if row["rank"] == 0}
        cohort, read = self.walk.cohort, self.settings.read
        described, kept = [], {}
        for name, spec in self.check.extras.items():
            if spec.rule == "lora_bias" and spec.module in left_out:
                continue
            value, how = combine_extra(
                name,
                cohort.clients,
                cohort.weights,
                cohort.scales([cohort.index[spec.module or ""]])[0].tolist() if spec.rule == "lora_bias" else None,
                rule=read.extras,
                missing=read.missing,
                dtype=self.walk.dtype,
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
        settings, walk = self.settings, self.walk
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
            "dtype": str(walk.dtype).removeprefix("torch."),
            "clients": self._client_rows(),
            "modules": rows,
            "extras": extras,
            "totals": summary,
            "warnings": list(dict.fromkeys(self.warnings)),
            "notes": self._notes(),
            "passes": self.passes,
            "seconds": {stage: round(spent, 6) for stage, spent in walk.seconds.items()},
        }

    def _notes(self) -> list[str]:
        """Facts for the report only: from reading, and modules that some clients lack."""
        notes = [text for client in self.roster if client.adapter for text in client.adapter.notes]
        cohort = self.walk.cohort
        lacking = [name for name, owned in zip(cohort.modules, cohort.owns, strict=True) if not owned.all()]
        if lacking:
            how = (
                "are the means over their owners"
                if cohort.missing == "renormalize"
                else "count missing updates as zero"
            )
            notes.append(f"modules that some clients lack ({len(lacking)}, {printable(lacking[0])!r} first) {how}")
        return list(dict.fromkeys(notes))

    def _client_rows(self) -> list[dict[str, Any]]:
        cohort = self.walk.cohort
        weights = dict(zip((client.name for client in cohort.clients), cohort.weights, strict=True))
        return [client.row(weights.get(client.name, 0.0)) for client in self.roster]


def _dropped(clients: Sequence[Client]) -> list[str]:
    return [client.drop_text for client in clients if client.status == "dropped"]


def _summary(
    rows: Sequence[Mapping[str, Any]], clients: int, ranks: Mapping[str, int], dtype: torch.dtype, uniform: int | None
) -> dict[str, Any]:
    parameters = sum((row["m"] + row["n"]) * (uniform or row["rank"]) for row in rows if row["name"] in ranks)
    return totals(rows, clients, parameters, parameters * dtype.itemsize)
