"""Before anything is combined: who takes part with which weights, and what the method makes of the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.validation import ClientCheck
from fedlora_kernels.engine.alignment import Alignment
from fedlora_kernels.engine.clients import PRESENT, Client
from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.engine.policy import (
    admit,
    beyond_bound,
    blame,
    clip,
    common_ground,
    drop,
    dropped_texts,
    norm_outliers,
)
from fedlora_kernels.engine.report import number
from fedlora_kernels.engine.robust import apply_rule
from fedlora_kernels.engine.settings import Settings
from fedlora_kernels.engine.survey import Survey, census, make_survey
from fedlora_kernels.engine.walk import Walk
from fedlora_kernels.methods.contract import Method
from fedlora_kernels.methods.robust import RobustRule

__all__ = ["Decision"]


class Decision:
    """Policy, robust rule and method look at all data; ``walk`` and ``check`` are those of the clients that are left.

    ``passes`` counts how often the factors are read, the last pass included; ``robust`` is what a robust rule tells of itself;
    ``alignment`` the clients beside each other, before such a rule, where all inner products were needed.
    """

    def __init__(self, settings: Settings, roster: Sequence[Client], check: ClientCheck) -> None:
        self.settings = settings
        self.roster = roster
        self.check = check
        self.walk = Walk(settings, self._cohort())
        self.passes = 1
        self.robust: dict[str, Any] | None = None
        self.alignment: Alignment | None = None
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def decide(self) -> Any:
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
        self._align(survey)
        if settings.robust is not None:
            survey = self._robust(settings.robust, survey)
            changed = True
        if not method.needs_decision:
            return None
        if changed and surveys and _looks_itself(method):
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

    def _align(self, survey: Survey) -> None:
        cohort = self.walk.cohort
        gram = survey.scaled_gram(cohort)
        if gram is None:
            return
        self.alignment = Alignment([client.name for client in cohort.clients], len(cohort.modules))
        for own, weight in zip(gram, cohort.module_weights(range(len(cohort.modules))), strict=True):
            self.alignment.add(own, weight)

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
        self.warnings += dropped_texts(cohort.clients)
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

    def _cohort(self) -> Cohort:
        settings = self.settings
        return Cohort.of(
            self.roster, list(self.check.modules), normalize=settings.normalize, missing=settings.read.missing
        )


def _looks_itself(method: Method) -> bool:
    """Whether a method has a survey of its own."""
    return type(method).survey is not Method.survey
