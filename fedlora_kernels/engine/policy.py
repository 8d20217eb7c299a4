"""What happens to clients that fail a check: left out, scaled down, or the end of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora_kernels.adapters.inits import kept_init
from fedlora_kernels.adapters.model import Adapter, ModuleSpec
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.policy import Policy
from fedlora_kernels.adapters.validation import ClientCheck, Failure, failure_text, validate_clients
from fedlora_kernels.engine.clients import Client, present
from fedlora_kernels.engine.cohort import Cohort
from fedlora_kernels.engine.extras import scan_extras
from fedlora_kernels.engine.outliers import outliers
from fedlora_kernels.engine.settings import Settings
from fedlora_kernels.errors import FedLoRAError, InputError, LimitError, MismatchError
from fedlora_kernels.methods.contract import Method
from fedlora_kernels.methods.norm_rules import clip_factors

__all__ = [
    "admit",
    "beyond_bound",
    "blame",
    "check_kept",
    "check_ranks",
    "clip",
    "common_ground",
    "drop",
    "dropped_texts",
    "norm_outliers",
    "start_notes",
]


def admit(roster: Sequence[Client], policy: Policy, read: ReadOptions) -> ClientCheck:
    """Check all headers against each other; return what the clients that take part have in common.

    "strict" raises for all failures together, "drop" and "clip" leave the failing clients out.
    """
    warnings: dict[str, None] = {}
    while True:
        healthy = [client for client in roster if not client.failures]
        check = _check(healthy, read) if healthy else None
        if check is not None:
            warnings.update(dict.fromkeys(check.warnings))
            for client in healthy:
                client.failures.extend(check.failed.get(client.name, []))
        failing = [client for client in roster if client.failures and client.status != "dropped"]
        if not failing:
            break
        drop(roster, failing, policy)
    _check_remaining(roster, policy)
    check = common_ground(roster, read)
    warnings.update(dict.fromkeys(check.warnings))
    return replace(check, warnings=tuple(warnings))


def common_ground(roster: Sequence[Client], read: ReadOptions) -> ClientCheck:
    """What the clients that take part have in common; all of them have passed the check of headers."""
    return _check(present(roster), read)


def drop(roster: Sequence[Client], failing: Sequence[Client], policy: Policy) -> None:
    """Leave failing clients out, or raise: always under "strict", else if too few clients or too little weight remain."""
    if policy.kind == "strict":
        found = [failure for client in failing for failure in client.failures]
        kind = found[0].error if isinstance(found[0], Failure) else type(found[0])
        raise kind(failure_text(found))
    for client in failing:
        client.status = "dropped"
    _check_remaining(roster, policy)


def dropped_texts(clients: Sequence[Client]) -> list[str]:
    """What is said of the clients that were dropped."""
    return [client.drop_text for client in clients if client.status == "dropped"]


def check_ranks(method: Method, modules: Sequence[str], roster: Sequence[Client]) -> None:
    """Refuse mixed ranks, by their headers, where the method cannot take them."""
    if method.columnwise and any(_starts(client.opened) for client in present(roster)):
        _check_starts(method, modules, present(roster))
    for name in modules if method.equal_ranks else ():
        owners = [client for client in present(roster) if name in client.opened.modules]
        first, rank = owners[0], owners[0].opened.modules[name].trained
        for client in owners:
            if (found := client.opened.modules[name].trained) != rank:
                raise MismatchError(
                    f"client {printable(client.name)!r}, module {printable(name)!r}: rank {found}, but {rank} in client "
                    f"{printable(first.name)!r}; method {method.name!r} needs one rank. florist, flexlora, prelort and "
                    "zero_pad take mixed ranks"
                )


def start_notes(method: Method, roster: Sequence[Client]) -> list[str]:
    """Said where what clients receive is wider than what they trained, since their start is in it and nothing cuts it away."""
    if not method.columnwise or method.sorted_pair or not any(_starts(client.opened) for client in present(roster)):
        return []
    return [
        f"method {method.name!r} keeps what clients started from (init_factors) in columns of its own: its pairs have twice the rank "
        "that clients trained"
    ]


def _starts(adapter: Adapter) -> bool:
    return any(module.start for module in adapter.modules.values())


def _check_starts(method: Method, modules: Sequence[str], clients: Sequence[Client]) -> None:
    """Refuse clients whose columns do not mean the same, where one of them has its start beside what it trained."""
    for name in modules:
        specs = {client.name: client.opened.modules[name] for client in clients if name in client.opened.modules}
        first, one = next(iter(specs.items()))
        for client, spec in specs.items():
            if (spec.trained, spec.start) != (one.trained, one.start):
                raise MismatchError(
                    f"client {printable(client)!r}, module {printable(name)!r}: rank {_rank_text(spec)}, but {_rank_text(one)} in client "
                    f"{printable(first)!r}; with init_factors method {method.name!r} needs one rank and a start in all clients. florist, "
                    "flora and flexlora take any"
                )


def _rank_text(spec: ModuleSpec) -> str:
    return f"{spec.trained} {'with' if spec.start else 'without'} a start"


def check_kept(cohort: Cohort, settings: Settings) -> None:
    """Refuse what would leave the residual base of clients that keep their initialisation."""
    init = kept_init(cohort.adapters[0].config)
    if init is None:
        return
    whole = math.fsum(cohort.weights)
    method, write = settings.method, settings.write
    ranks = {max(row) for row in cohort.ranks}
    checks = (
        (abs(whole - 1.0) > 1e-9, f"the weights sum to {whole:g}; 1 needed"),
        (
            settings.read.missing != "error",
            f"missing={settings.read.missing!r}; the same modules needed, missing='error'",
        ),
        (write.drop_zero, "drop_zero=True leaves modules out; all of them needed"),
        (
            write.pads and len(ranks) > 1,
            f"uniform_rank=True changes ranks from {min(ranks)} to {max(ranks)}; equal needed",
        ),
        (settings.robust is not None, "a robust rule compares updates, which these factors are not; none needed"),
        (
            settings.policy.measures,
            f"policy {settings.policy.kind!r} compares norms of updates, which these factors are not",
        ),
        (
            not {"common", "state"}.issuperset(method.gives),
            f"method {method.name!r} gives {', '.join(method.gives)}; a common pair alone needed",
        ),
    )
    for wrong, text in checks:
        if wrong:
            raise InputError(
                f"init='keep' of {printable(init)}: {text}. Use init_factors=, and the result fits the original base"
            )


def blame(clients: Sequence[Client], errors: Mapping[int, FedLoRAError], extras: Sequence[str]) -> list[Client]:
    """Charge clients with the bad numbers in their factors, ``errors`` by position, and extras; return those that fail."""
    for k, error in errors.items():
        clients[k].failures.append(error)
    for client, extra_error in scan_extras(clients, extras):
        client.failures.append(extra_error)
    return [client for client in clients if client.failures]


def beyond_bound(cohort: Cohort, squares: np.ndarray, policy: Policy) -> None:
    """Charge clients whose update is beyond the bound, where the policy does not scale it down; ``squares`` is (L, K)."""
    bound = policy.max_update_norm
    if policy.kind == "clip" or not isinstance(bound, int | float):
        return
    norms = np.sqrt(squares if policy.per == "module" else squares.sum(0, keepdims=True))
    for k, client in enumerate(cohort.clients):
        for row in np.flatnonzero(norms[:, k] > bound).tolist():
            where = f", module {printable(cohort.modules[row])!r}" if policy.per == "module" else ""
            client.failures.append(
                LimitError(
                    f"client {printable(client.name)!r}{where}: the norm of its update is {norms[row, k]:.4g}; at most {bound:g} "
                    "allowed by max_update_norm. Raise it, leave the client out with policy='drop' or scale it down with policy='clip'"
                )
            )


def norm_outliers(cohort: Cohort, norms: np.ndarray) -> list[str]:
    """Texts on clients whose update is much larger or smaller than most; ``norms`` is (L, K)."""
    found = outliers(np.sqrt((norms**2).sum(0)).tolist())
    return [f"client {printable(cohort.clients[k].name)!r}: {text}" for k, text in found.items()]


def clip(cohort: Cohort, norms: np.ndarray, policy: Policy) -> None:
    """Scale updates beyond the bound down to it: a factor on s_k, per client or per client and module; ``norms`` is (L, K)."""
    size = norms if policy.per == "module" else np.sqrt((norms**2).sum(0, keepdims=True))
    owns: np.ndarray = cohort.owns if policy.per == "module" else np.any(cohort.owns, axis=0, keepdims=True)
    factors = clip_factors(size, policy.max_update_norm, owns)
    cohort.factors = np.broadcast_to(factors, norms.shape).copy()
    for k, client in enumerate(cohort.clients):
        client.factor = float(factors[:, k].min())
        if client.factor < 1.0:
            client.status = "clipped"


def _check(clients: Sequence[Client], read: ReadOptions) -> ClientCheck:
    adapters = {client.name: client.opened for client in clients}
    return validate_clients(adapters, missing=read.missing, extras=read.extras, limits=read.limits)


def _check_remaining(roster: Sequence[Client], policy: Policy) -> None:
    left, top = present(roster), max(abs(client.weight) for client in roster)
    # scaled first, as in `normalised`
    total, remaining = (math.fsum(abs(client.weight) / top for client in part) for part in (roster, left))
    share = remaining / total
    needed = max(1, policy.min_clients)
    if len(left) < needed or share < policy.min_weight:
        reasons = failure_text([failure for client in roster for failure in client.failures])
        remedy, listing = ("Repair the failing clients", f":\n{reasons}") if reasons else ("Add clients", "")
        raise InputError(
            f"policy {policy.kind!r}: {len(left)} of {len(roster)} clients with {share:.3g} of the weight remain; at least {needed} "
            f"and {policy.min_weight:g} needed. {remedy}, or lower min_clients= or min_weight={listing}"
        )
