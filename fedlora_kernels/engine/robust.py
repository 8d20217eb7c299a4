"""Robust rules in front of a method: coefficients from the update Gram in place of the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.errors import InputError
from fedlora_kernels.methods.robust import RobustRule, Verdict, describe_verdict, near_twins

__all__ = ["apply_rule"]

MOST_TWINS = 100
"""Pairs of near twins that a report lists."""


def apply_rule(rule: RobustRule, cohort: Cohort, gram: np.ndarray) -> dict[str, Any]:
    """Let ``rule`` replace weights and scales of ``cohort``; return what the report says of it.

    ``gram`` (L, K, K) holds the inner products of the scaled updates, clipping included. Scope "model": one decision on the sum over
    modules, and clients of coefficient 0 are "rejected". Scope "matrix": one decision per module among its owners.
    """
    names = [client.name for client in cohort.clients]
    told: dict[str, Any] = {"name": rule.name, "options": rule.options(), "scope": rule.scope}
    told["near_twins"] = [[names[i], names[j]] for i, j in near_twins(gram.sum(0))[:MOST_TWINS]]
    if rule.scope == "matrix":
        verdicts = _per_matrix(rule, cohort, gram)
        told["modules"] = {name: describe_verdict(v, [names[k] for k in own]) for name, (v, own) in verdicts.items()}
        return told
    verdict = rule.coefficients(gram.sum(0), np.asarray(cohort.weights))
    if not verdict.weight.any():
        raise InputError(f"robust rule {rule.name!r} rejects every client; other options needed")
    _scale(cohort, np.broadcast_to(verdict.factor, cohort.owns.shape))
    cohort.weights = verdict.weight.tolist()
    for client, weight, factor in zip(cohort.clients, verdict.weight, verdict.factor, strict=True):
        client.factor *= float(factor)
        if weight == 0.0:
            client.status = "rejected"
        elif factor != 1.0:
            client.status = "clipped"
    return {**told, "clients": describe_verdict(verdict, names)}


def _per_matrix(rule: RobustRule, cohort: Cohort, gram: np.ndarray) -> dict[str, tuple[Verdict, list[int]]]:
    table = cohort.module_weights(range(len(cohort.modules)))
    factors = np.ones_like(table)
    verdicts = {}
    for row, name in enumerate(cohort.modules):
        own = np.flatnonzero(cohort.owns[row])
        try:
            verdict = rule.coefficients(gram[row][np.ix_(own, own)], table[row, own])
        except InputError as error:
            raise type(error)(f"module {printable(name)!r}: {error}") from None
        table[row, own], factors[row, own] = verdict.weight, verdict.factor
        verdicts[name] = (verdict, own.tolist())
    _scale(cohort, factors)
    cohort.table = table
    return verdicts


def _scale(cohort: Cohort, factors: np.ndarray) -> None:
    if (factors != 1.0).any():
        cohort.factors = factors.copy() if cohort.factors is None else cohort.factors * factors
