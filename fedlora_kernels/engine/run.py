"""One aggregation from admitted clients to a finished output and its report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlora_kernels import backends
from fedlora_kernels._version import __version__
from fedlora_kernels.adapters.folder import OutputFolder
from fedlora_kernels.adapters.inits import kept_init
from fedlora_kernels.adapters.model import ExtraSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.validation import ClientCheck
from fedlora_kernels.engine.budget import Held, Share
from fedlora_kernels.engine.clients import PRESENT, Client, check_unchanged
from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.engine.combine import combine
from fedlora_kernels.engine.delivery import Delivered, Delivery, ModuleOutput
from fedlora_kernels.engine.extras import check_mean, combine_extra, own_extra
from fedlora_kernels.engine.journal import Journal
from fedlora_kernels.engine.notes import module_notes
from fedlora_kernels.engine.policy import (
    admit,
    beyond_bound,
    blame,
    check_kept,
    check_ranks,
    clip,
    common_ground,
    drop,
    norm_outliers,
)
from fedlora_kernels.engine.report import SCHEMA, certificates, efficiency, number, totals
from fedlora_kernels.engine.robust import apply_rule
from fedlora_kernels.engine.settings import Settings
from fedlora_kernels.engine.state import State, check_experts, check_modules, check_pair
from fedlora_kernels.engine.survey import Survey, census, make_survey
from fedlora_kernels.engine.target import target_findings
from fedlora_kernels.engine.twins import same_content
from fedlora_kernels.engine.walk import Walk
from fedlora_kernels.errors import InputError
from fedlora_kernels.methods.contract import Method
from fedlora_kernels.methods.robust import RobustRule

__all__ = ["Run"]


class Run:
    """One aggregation from admitted clients to a finished output."""

    def __init__(self, settings: Settings, roster: list[Client], check: ClientCheck) -> None:
        self.settings = settings
        self.roster = roster
        self.check = check
        self.notes: list[str] = []
        self.warnings = [text for client in roster if client.adapter for text in client.adapter.warnings]
        self.warnings += check.warnings
        if not settings.method.uses_weights and len({client.weight for client in roster} - {0.0}) > 1:
            self.warnings.append(
                f"method {settings.method.name!r} uses no weights; the unequal ones given change nothing"
            )
        self.warnings += _dropped(roster)
        check_ranks(settings.method, check.modules, roster)
        self.walk = Walk(settings, self._cohort())
        check_kept(self.walk.cohort, settings)
        self.warnings += same_content(self.walk.cohort.clients)
        self.passes = 1
        self.robust: dict[str, Any] | None = None
        if settings.state is not None:
            self._check_previous(settings.state)

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
        plan = self._decide()
        self._check_means()
        walk, method = self.walk, settings.method
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

            return combine(walk, plan, sink, done)
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
        if done:
            there, every = sum(map(len, done)), len(self.walk.cohort.modules)
            self.notes.append(f"resumed: {there} of {every} modules were there from a run that was ended")
        return done

    def _check_means(self) -> None:
        """Refuse weights that a mean of absolute values cannot have before the factors are combined, not after."""
        if self.settings.method.own_extras or self.settings.read.extras == "first":
            return
        for name, spec in self.check.extras.items():
            if spec.rule != "lora_bias":
                check_mean(name, self.walk.cohort.weights)

    def _cohort(self) -> Cohort:
        settings = self.settings
        return Cohort.of(
            self.roster, list(self.check.modules), normalize=settings.normalize, missing=settings.read.missing
        )

    def _decide(self) -> Any:
        """What the method decides over the whole model, after policy and robust rule have looked at all data."""
        settings, method = self.settings, self.settings.method
        memory = None if settings.state is None else settings.state.memory
        surveys = method.needs_decision and method.surveys(memory)
        first = settings.policy.kind != "strict" or settings.policy.measures or settings.robust is not None
        if not (first or surveys):
            return method.decide({}, census(self.walk.cohort, settings)) if method.needs_decision else None
        self.passes += 1
        gram = settings.robust is not None or (surveys and method.needs_gram())
        # a method looks at what it will combine: after the rule, where there is one
        own = surveys and settings.robust is None
        survey, changed = self._without_failing(make_survey(self.walk, gram=gram, own=own))
        changed |= self._clip(survey)
        if settings.robust is not None:
            survey = self._robust(settings.robust, survey)
            changed = True
        if not method.needs_decision:
            return None
        if changed and surveys and looks_itself(method):
            self.passes += 1
            again = make_survey(self.walk, gram=False, own=True)
            survey = dataclasses.replace(survey, stats=again.stats)
        return method.decide(survey.stats, survey.census(self.walk.cohort, settings))

    def _clip(self, survey: Survey) -> bool:
        """Note the clients' norms; scale down those beyond the policy's bound, and say whether there are any."""
        cohort, policy = self.walk.cohort, self.settings.policy
        norms = np.sqrt(np.maximum(survey.squares, 0.0))
        for k, client in enumerate(cohort.clients):
            client.norm = number(float(np.sqrt((norms[:, k] ** 2).sum())))
        self.notes += norm_outliers(cohort, norms)
        if policy.kind != "clip":
            return False
        clip(cohort, norms, policy)
        return any(client.status == "clipped" for client in cohort.clients)

    def _robust(self, rule: RobustRule, survey: Survey) -> Survey:
        """Let a robust rule replace the weights; the survey of the clients that it leaves."""
        gram = survey.scaled_gram(self.walk.cohort)
        assert gram is not None
        self.robust = apply_rule(rule, self.walk.cohort, gram)
        self._warn_of_weights(rule)
        if self.walk.cohort.table is not None:
            self.walk = self.walk.rebuilt()
            return survey
        return self._narrowed(survey)

    def _warn_of_weights(self, rule: RobustRule) -> None:
        """Say so where a rule weighs clients for a method that uses no weights: only rejections count then."""
        cohort, method = self.walk.cohort, self.settings.method
        if not method.uses_weights and len({weight for weight in cohort.weights if weight != 0.0}) > 1:
            self.warnings.append(
                f"method {method.name!r} uses no weights; those of robust rule {rule.name!r} change nothing, only the clients "
                "that it rejects are left out"
            )

    def _without_failing(self, survey: Survey) -> tuple[Survey, bool]:
        cohort, settings = self.walk.cohort, self.settings
        beyond_bound(cohort, survey.squares, settings.policy)
        failing = blame(cohort.clients, survey.errors, list(self.check.extras))
        if not failing:
            return survey, False
        drop(self.roster, failing, settings.policy)
        self.warnings += _dropped(cohort.clients)
        self.check = admit(self.roster, settings.policy, settings.read)
        self._warn_of_lost_modules(cohort)
        self.walk = self.walk.narrowed(self._cohort())
        return survey.select(*cohort.places(self.walk.cohort)), True

    def _narrowed(self, survey: Survey) -> Survey:
        """Go on with the clients that are left, with the weights and factors decided for them."""
        cohort = self.walk.cohort
        if all(client.status in PRESENT for client in cohort.clients):
            return survey
        self.check = common_ground(self.roster, self.settings.read)
        self._warn_of_lost_modules(cohort)
        self.walk = self.walk.narrowed(cohort.narrowed(self._cohort()))
        return survey.select(*cohort.places(self.walk.cohort))

    def _warn_of_lost_modules(self, before: Cohort) -> None:
        """Say which modules go with the clients that leave: nobody else has them."""
        lost = [name for name in before.modules if name not in self.check.modules]
        if lost:
            self.warnings.append(
                f"modules that only dropped or rejected clients have ({len(lost)}, {printable(lost[0])!r} first) are left out"
            )

    def _delivery(self, folder: OutputFolder | None, journal: Journal | None) -> Delivery:
        settings, cohort = self.settings, self.walk.cohort
        settings.write.check_extras(self.check.extras)
        metadata = {
            "fedlora.version": __version__,
            "fedlora.method": settings.method.name,
            "fedlora.rule": str(settings.rule or ""),
            "fedlora.round": str(settings.round),
            "fedlora.weights": json.dumps(list(cohort.weights)),
            "fedlora.clients": json.dumps([client.name for client in cohort.clients]),
        }
        return Delivery(settings, cohort, self.check.extras, self.walk.dtype, metadata, folder, journal)

    def _extras(
        self, delivery: Delivery, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, ExtraSpec]]:
        """Combine and write the tensors that are no factors; a bias goes with its module if that is left out."""
        left_out = {row["name"] for row in rows if row["rank"] == 0}
        cohort, read = self.walk.cohort, self.settings.read
        described, kept = [], {}
        for name, spec in self.check.extras.items():
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
            "robust": self.robust,
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
            "warnings": list(dict.fromkeys([*self.warnings, *warned])),
            "notes": [*self._notes(rows), *noted],
            "passes": self.passes,
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
        return list(dict.fromkeys(notes + self.notes))

    def _client_rows(self) -> list[dict[str, Any]]:
        cohort = self.walk.cohort
        weights = dict(zip((client.name for client in cohort.clients), cohort.weights, strict=True))
        return [client.row(weights.get(client.name, 0.0)) for client in self.roster]


def _dropped(clients: Sequence[Client]) -> list[str]:
    return [client.drop_text for client in clients if client.status == "dropped"]


def looks_itself(method: Method) -> bool:
    """Whether a method has a survey of its own."""
    return type(method).survey is not Method.survey
