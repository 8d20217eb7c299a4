"""One aggregation from admitted clients to a finished output and its report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_kernels import backends
from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.folder import OutputFolder
from fedlora_kernels.adapters.inits import kept_init
from fedlora_kernels.adapters.model import ExtraSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.validation import ClientCheck
from fedlora_kernels.engine.alignment import aloof
from fedlora_kernels.engine.budget import Held, Share
from fedlora_kernels.engine.clients import Client, check_unchanged
from fedlora_kernels.engine.combine import combine
from fedlora_kernels.engine.decision import Decision
from fedlora_kernels.engine.delivery import Delivered, Delivery, ModuleOutput
from fedlora_kernels.engine.extras import check_mean, combine_extra, own_extra
from fedlora_kernels.engine.journal import Journal
from fedlora_kernels.engine.notes import module_notes
from fedlora_kernels.engine.policy import check_kept, check_ranks, dropped_texts, norm_outliers, start_notes
from fedlora_kernels.engine.report import SCHEMA, certificates, efficiency, totals
from fedlora_kernels.engine.settings import Settings
from fedlora_kernels.engine.state import State, check_experts, check_modules, check_pair
from fedlora_kernels.engine.target import target_findings
from fedlora_kernels.engine.twins import same_content
from fedlora_kernels.engine.walk import Walk
from fedlora_kernels.errors import InputError

__all__ = ["Run"]


class Run:
    """One aggregation from admitted clients to a finished output."""

    def __init__(self, settings: Settings, roster: list[Client], check: ClientCheck) -> None:
        self.settings = settings
        self.roster = roster
        self.notes: list[str] = []
        self.warnings = [text for client in roster if client.adapter for text in client.adapter.warnings]
        self.warnings += check.warnings
        if not settings.method.uses_weights and len({client.weight for client in roster} - {0.0}) > 1:
            self.warnings.append(
                f"method {settings.method.name!r} uses no weights; the unequal ones given change nothing"
            )
        self.warnings += dropped_texts(roster)
        check_ranks(settings.method, list(check.modules), roster)
        self.notes += start_notes(settings.method, roster)
        self.decision = Decision(settings, roster, check)
        check_kept(self.walk.cohort, settings)
        self.warnings += same_content(self.walk.cohort.clients)
        if settings.state is not None:
            self._check_previous(settings.state)

    @property
    def walk(self) -> Walk:
        """The way over the clients that are left so far."""
        return self.decision.walk

    @property
    def extras(self) -> Mapping[str, ExtraSpec]:
        """The tensors of theirs that are no factors."""
        return self.decision.check.extras

    def _check_previous(self, state: State) -> None:
        cohort, method = self.walk.cohort, self.settings.method
        if method.reads_previous == "state":
            check_modules(state, method, cohort.modules)
        else:
            check_pair(state, method, {name: cohort.spec(name) for name in cohort.modules})
            check_experts(state, cohort.clients[0].name, cohort.adapters[0])

    def execute(
        self, folder: OutputFolder | None, seen: dict[Any, None], started: float, journal: Journal | None = None
    ) -> tuple[Delivered, dict[str, Any]]:
        """Survey if needed, combine, write; return what is delivered and the report. Nothing is committed if anything fails.

        What ``journal`` tells of is there already; the survey is made again.
        """
        try:
            return self._executed(folder, seen, started, journal)
        finally:
            self.walk.carry.close()

    def _executed(
        self, folder: OutputFolder | None, seen: dict[Any, None], started: float, journal: Journal | None
    ) -> tuple[Delivered, dict[str, Any]]:
        settings = self.settings
        plan = self.decision.decide()
        self._check_means()
        walk, method = self.walk, settings.method
        if self.decision.alignment is not None:
            walk.alignment = None
        delivery = self._delivery(folder, journal)
        try:
            rows = self._combined(plan, delivery, journal, seen)
            extras, kept = self._extras(delivery, rows)
            parameters = delivery.parameters
            summary = totals(rows, len(self.roster), parameters, parameters * walk.dtype.itemsize)
            summary |= efficiency(method, rows)
            check_unchanged(walk.cohort.clients)
            if settings.state is not None:
                settings.state.check_unchanged()
            delivery.finish(kept, certificates(summary), method.remember(plan) if "state" in method.gives else None)
        except BaseException:
            delivery.abandon()
            raise
        for k, client in enumerate(walk.cohort.clients):
            client.folder = delivery.place(k)
        walk.seconds["total"] = time.perf_counter() - started
        report = self._report(rows, extras, summary, seen, plan)
        return delivery.commit(report), report

    def _combined(
        self, plan: Any, delivery: Delivery, journal: Journal | None, seen: dict[Any, None]
    ) -> list[dict[str, Any]]:
        """The rows of the report; what a size is shared over waits until all spectra are known."""
        budget, walk, write = self.settings.budget, self.walk, self.settings.write
        if budget is None:
            done = [] if journal is None else self._gone_on(journal, seen)

            def sink(modules: Sequence[ModuleOutput], rows: list[dict[str, Any]], compared: Any) -> None:
                delivery.add(modules)
                if journal is not None:
                    journal.append(rows, compared, delivery.mark(), seen)

            return combine(walk, plan, sink, done, told=journal is not None)
        if (init := kept_init(walk.cohort.adapters[0].config)) is not None:
            raise InputError(
                f"{budget}: init='keep' keeps the ranks of the clients, which {printable(init)} needs. Use init_factors=, or leave "
                "the rule out"
            )
        specs = {name: walk.cohort.spec(name) for name in walk.cohort.modules}
        share = Share.of(budget, specs, walk.dtype, keep_all=not write.drop_zero, uniform=write.pads)
        held = Held(share, walk.carry)
        rows = combine(walk, plan, lambda modules, *_: held.add(modules))
        with walk.timed("write"):
            return held.deliver(rows, delivery.add)

    def _gone_on(self, journal: Journal, seen: dict[Any, None]) -> list[list[dict[str, Any]]]:
        """The rows of the slabs that are done; what else is known of them is taken over."""
        done = journal.done
        seen.update(dict.fromkeys(journal.seen))
        if self.walk.comparison is not None:
            self.walk.comparison.go_on(journal.compared)
        elif self.walk.alignment is not None and journal.compared:
            self.walk.alignment.go_on(journal.compared[-1])
        if done:
            there, every = sum(map(len, done)), len(self.walk.cohort.modules)
            self.notes.append(f"resumed: {there} of {every} modules were there from a run that was ended")
        return done

    def _check_means(self) -> None:
        """Refuse weights that a mean of absolute values cannot have before the factors are combined, not after."""
        if self.settings.method.own_extras or self.settings.read.extras == "first":
            return
        for name, spec in self.extras.items():
            if spec.rule != "lora_bias":
                check_mean(name, self.walk.cohort.weights)

    def _delivery(self, folder: OutputFolder | None, journal: Journal | None) -> Delivery:
        settings, cohort = self.settings, self.walk.cohort
        settings.write.check_extras(self.extras)
        metadata = {
            "fedlora.version": __version__,
            "fedlora.method": settings.method.name,
            "fedlora.rule": str(settings.rule or ""),
            "fedlora.round": str(settings.round),
            "fedlora.weights": json.dumps(list(cohort.weights)),
            "fedlora.clients": json.dumps([client.name for client in cohort.clients]),
        }
        return Delivery(settings, cohort, self.extras, self.walk.dtype, metadata, folder, journal)

    def _extras(
        self, delivery: Delivery, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, ExtraSpec]]:
        """Combine and write the tensors that are no factors; a bias goes with its module if that is left out."""
        left_out = {row["name"] for row in rows if row["rank"] == 0}
        cohort, read = self.walk.cohort, self.settings.read
        described, kept = [], {}
        for name, spec in self.extras.items():
            if spec.rule == "lora_bias" and spec.module in left_out:
                continue
            scales, weights = None, cohort.weights
            if spec.rule == "lora_bias":
                row = [cohort.index[spec.module or ""]]
                scales = cohort.scales(row)[0].tolist()
                # decided for its matrix, it is decided for its bias
                weights = weights if cohort.table is None else cohort.table[row][0].tolist()
            kept[name] = spec
            if self.settings.method.own_extras:
                for k, client in enumerate(cohort.clients):
                    if name in client.opened.extras:
                        delivery.add_extra(name, own_extra(name, client, scales and scales[k], self.walk.dtype), k)
                described.append({"name": name, "rule": "own", "shape": list(spec.tensor.shape)})
                continue
            value, how = combine_extra(
                name,
                cohort.clients,
                weights,
                scales,
                rule=read.extras,
                missing=read.missing,
                dtype=self.walk.dtype,
            )
            delivery.add_extra(name, value)
            described.append({"name": name, "rule": how, "shape": list(value.shape)})
        return described, kept

    def _report(
        self,
        rows: list[dict[str, Any]],
        extras: list[dict[str, Any]],
        summary: dict[str, Any],
        seen: Mapping[Any, None],
        plan: Any,
    ) -> dict[str, Any]:
        settings, walk = self.settings, self.walk
        used = dict.fromkeys(entry.backend for entry in seen if isinstance(entry, backends.Choice))
        fallbacks = [entry._asdict() for entry in seen if isinstance(entry, backends.Fallback)]
        rule = settings.rule
        warned, noted = target_findings(settings.write.target, [row["rank"] for row in rows])
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
            "robust": self.decision.robust,
            "decision": self._decision(plan),
            "normalize": settings.normalize,
            "round": settings.round,
            "seed": settings.seed,
            "dtype": str(walk.dtype).removeprefix("torch."),
            "clients": self._client_rows(),
            "modules": rows,
            "comparison": None if walk.comparison is None else walk.comparison.report(walk.cohort.modules),
            "extras": extras,
            "totals": summary,
            "warnings": list(dict.fromkeys([*self.warnings, *self.decision.warnings, *warned])),
            "notes": [*self._notes(rows), *noted],
            "passes": self.decision.passes,
            "seconds": {stage: round(spent, 6) for stage, spent in walk.seconds.items()},
        }

    def _decision(self, plan: Any) -> dict[str, Any] | None:
        """What the method decided, as plain values."""
        if plan is None:
            return None
        return self.settings.method.describe(plan, [client.name for client in self.walk.cohort.clients]) or None

    def _notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Facts for the report only: from reading, and of modules."""
        notes = [text for client in self.roster if client.adapter for text in client.adapter.notes]
        notes += module_notes(rows, self.walk.cohort, self.settings.rule)
        notes += self._alignment_notes()
        return list(dict.fromkeys(notes + self.decision.notes + self.notes))

    def _alignment_notes(self) -> list[str]:
        """Clients that stand out from the others, as far as they were looked at."""
        walk, decision = self.walk, self.decision
        found = decision.alignment or walk.alignment
        if found is None:
            return []
        notes = [f"client {printable(name)!r}: {text}" for name, text in aloof(found).items()]
        # after a survey norms are known, and have been looked at, of the whole model
        if decision.passes == 1 and walk.cohort.owns.all():
            notes += [f"{text}{found.extent}" for text in norm_outliers(walk.cohort, found.norms[None])]
        return notes

    def _client_rows(self) -> list[dict[str, Any]]:
        cohort = self.walk.cohort
        weights = dict(zip((client.name for client in cohort.clients), cohort.weights, strict=True))
        return [client.row(weights.get(client.name, 0.0)) for client in self.roster]
