"""What an aggregation answers: the common adapter, what each client receives, the report."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.adapters.config import peft_config, rank_patterns
from fedlora_kernels.adapters.forms import own_keys, target_ranks, written_numbers
from fedlora_kernels.adapters.model import Adapter
from fedlora_kernels.adapters.names import printable
from fedlora_kernels.engine.budget import Share
from fedlora_kernels.engine.output import adapter_in_memory, resize_pair
from fedlora_kernels.engine.report import certificates, cut_row, efficiency, totals
from fedlora_kernels.engine.state import State
from fedlora_kernels.errors import InputError, OutputOverflowError
from fedlora_kernels.linalg import select_rank
from fedlora_kernels.linalg.rules import Budget, Energy, RankRule
from fedlora_kernels.methods.contract import Method

__all__ = ["Result"]

SMALLEST_ENERGY = 2.0**-960
"""Below it the squares of small singular values underflow."""


@dataclass(frozen=True)
class Result:
    """Answer of `aggregate`.

    ``adapter`` is the common adapter with scale 1, in memory or opened from the output folder, None where the method has none;
    ``report`` plain values of schema 1; ``state`` what the next round needs; ``residual`` what the base weight gains beside the
    pair, None for most methods; ``personal`` the clients' own adapters with scale 1, by name, of methods that make them.
    """

    adapter: Adapter | None
    report: Mapping[str, Any]
    state: State
    residual: Adapter | None = None
    clients: Mapping[str, Adapter] = field(default_factory=dict)
    method: Method = field(default_factory=Method)
    personal: Mapping[str, Adapter] = field(default_factory=dict)

    def __repr__(self) -> str:
        method, summary = self.report["method"], self.report["totals"]
        error = "unknown" if summary["error"] is None else f"{summary['error']:.3g}"
        rule = f", {method['rule']}" if method["rule"] else ""
        return (
            f"Result({method['name']}{rule}, {summary['modules']} modules, total rank {summary['rank']}, error {error})"
        )

    def for_client(self, key: str | int, *, rank: int | None = None, scale: str | float = "client") -> Adapter:
        """Return what the method sends to a client, as an adapter in memory.

        Args:
            key: the client's name, or its position in the caller's order.
            rank: cut every pair to this rank, or pad it (random rows of A, zero columns of B: the product stays, and the
                padding can be trained). None is the method's own choice.
            scale: "client" divides B, in float64, by the client's own scale of each module, and holds the modules that the
                client has, under the client's own keys; 1.0 gives the baked form of all modules.

        Raises InputError for an unknown client, a rank below 1, one that would cut off what clients started from (``init_factors``)
        or a client whose scale is 0, OutputOverflowError where the dtype cannot hold B divided by the scale.
        """
        name, client = self._client(key)
        if rank is not None:
            found, rank = rank, _whole(rank)
            if rank is None or rank < 1:
                raise InputError(f"for_client: rank is {found!r}; an integer of at least 1 needed")
        if scale not in ("client", 1.0):
            raise InputError(f"for_client: scale is {scale!r}; 'client' or 1.0 needed")
        own = scale == "client"
        source, cut = self._source(name)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        scales: dict[str, float] = {}
        for module in source:
            spec = client.modules.get(module)
            if own and spec is None:
                continue
            pair = source[module]
            p = pair.A.shape[0]
            wanted = rank or p
            if rank is not None:
                self._check_cut(module, rank, p)
            elif spec is not None and cut:
                wanted = self.method.client_rank(self.method.own_rank(spec.trained, spec.rank), p)
            B, A = resize_pair(pair.B, pair.A, wanted, seed=self.report["seed"], round=self.state.round, module=module)
            scales[module] = spec.scale if own and spec is not None else 1.0
            pairs[module] = (
                _divided(B, scales[module] / pair.scale, f"client {printable(name)!r}, module {printable(module)!r}"),
                A,
            )
        if not pairs:
            raise InputError(f"client {printable(name)!r} has none of the modules of the result; use scale=1.0")
        extras = {
            extra: _divided(
                source.extra(extra), scales[spec.module], f"client {printable(name)!r}, {printable(extra)!r}"
            )
            if spec.rule == "lora_bias" and spec.module is not None
            else source.extra(extra)
            for extra, spec in source.extras.items()
            if spec.rule != "lora_bias" or spec.module in pairs
        }
        config = self._config(name, client, source, {module: A.shape[0] for module, (_, A) in pairs.items()}, scales)
        known = {extra: client.extras[extra] for extra in extras if extra in client.extras}
        keys = own_keys({module: client.modules[module] for module in pairs}, known) if own else None
        return adapter_in_memory(pairs, source.modules, extras, config, label=name, keys=keys)

    def _client(self, key: str | int) -> tuple[str, Adapter]:
        names = [row["name"] for row in self.report["clients"]]
        position = _whole(key)
        if position is not None and 0 <= position < len(names):
            key = names[position]
        if isinstance(key, str) and key in names and key not in self.clients:
            raise InputError(
                f"for_client: client {printable(key)!r} could not be read, so nothing is known of its modules"
            )
        if not isinstance(key, str) or key not in self.clients:
            raise InputError(
                f"for_client: no client {printable(str(key))!r}; clients: {', '.join(map(printable, names[:20]))}"
            )
        return key, self.clients[key]

    def _check_cut(self, module: str, rank: int, p: int) -> None:
        """Refuse to cut pairs whose later columns are what clients started from: without them the rest fits no base."""
        specs = (client.modules.get(module) for client in self.clients.values())
        if rank < p and not self.method.sorted_pair and any(spec is not None and spec.start for spec in specs):
            raise InputError(
                f"for_client: rank is {rank}, but module {printable(module)!r} has rank {p} with what the clients started from "
                f"(init_factors), which method {self.method.name!r} cannot cut; leave rank out, or use florist or flexlora"
            )

    def _source(self, name: str) -> tuple[Adapter, bool]:
        """The adapter that a client's pairs are taken from, and whether they are still to be cut to what the method sends."""
        if "personal" in self.method.gives:
            if name in self.personal:
                return self.personal[name], False
            took_part = any(row["name"] == name and row["folder"] for row in self.report["clients"])
            why = "its folder is gone" if took_part else "it took no part, or personal adapters were not kept"
            raise InputError(
                f"client {printable(name)!r} has no adapter of its own in this result: {why}. per_client=True keeps them on disc"
            )
        assert self.adapter is not None
        return self.adapter, True

    @staticmethod
    def _config(
        key: str, client: Adapter, source: Adapter, ranks: Mapping[str, int], scales: Mapping[str, float]
    ) -> dict[str, Any]:
        """The client's configuration with alphas that give back its own scales at the ranks handed out."""
        config = peft_config([client], ranks, dict(source.extras), modules=source.modules)
        common = target_ranks(ranks, source.modules)
        alphas: dict[str, float] = {}
        for module, scale in scales.items():
            form = source.modules[module].form
            for name in form.names:
                if alphas.setdefault(name, alpha := _plain(scale * common[form.target])) != alpha:
                    raise InputError(
                        f"for_client: client {printable(key)!r}, module {printable(form.target)!r}: its pairs have different "
                        "scales, and no key says which is whose; one scale needed. Use scale=1.0"
                    )
        first = next(iter(alphas.values()))
        config["lora_alpha"] = first
        patterns = rank_patterns(alphas, first)
        config.pop("alpha_pattern", None)
        return {**config, "alpha_pattern": patterns} if patterns else config

    def at(self, rule: RankRule) -> Result:
        """Return the result of another rank rule from the same decomposition, in memory.

        Only for florist with ``Energy(1.0)``, whose pair holds every direction; InputError otherwise. The padding of
        ``uniform_rank`` is cut away.
        """
        full = getattr(self.method, "rule", None)
        if (
            self.method.name != "florist"
            or not isinstance(full, Energy)
            or full.threshold < 1.0
            or full.cap is not None
        ):
            raise InputError(
                "at(rule) needs the whole spectrum: aggregate with method 'florist' and rule=Energy(1.0) first"
            )
        if not isinstance(rule, RankRule):
            raise InputError(f"at({rule}): a rank rule needed, such as Energy(0.9), Rank(16) or Budget('10MB')")
        assert self.adapter is not None
        rows = self._shared(rule) if isinstance(rule, Budget) else [self._cut(r, rule) for r in self.report["modules"]]
        ranks = {row["name"]: row["rank"] for row in rows if row["name"] in self.adapter}
        emptied = {row["name"] for row in rows if not row["singular_values"]}
        pairs = {}
        for module, p in ranks.items():
            pair = self.adapter[module]
            pairs[module] = (pair.B[:, :p].clone(), pair.A[:p].clone())
            if module in emptied:
                pairs[module][0].zero_()
        extras = {name: self.adapter.extra(name) for name in self.adapter.extras}
        common = target_ranks(ranks, self.adapter.modules)
        written = {name: common[self.adapter.modules[name].form.target] for name in ranks}
        config = peft_config([self.adapter], written, self.adapter.extras)
        parameters = sum(written_numbers(self.adapter.modules[name]) * rank for name, rank in written.items())
        nbytes = parameters * next(iter(pairs.values()))[0].element_size()
        summary = totals(rows, self.report["totals"]["clients"], parameters, nbytes) | efficiency(self.method, rows)
        metadata = {**self.adapter.metadata, "fedlora.rule": str(rule), **certificates(summary)}
        keys = own_keys(self.adapter.modules, self.adapter.extras)
        adapter = adapter_in_memory(
            pairs, self.adapter.modules, extras, config, label=self.adapter.label, metadata=metadata, keys=keys
        )
        report = {
            **self.report,
            "method": {**self.report["method"], "rule": str(rule)},
            "modules": rows,
            "totals": summary,
        }
        method = dataclasses.replace(self.method, rule=rule)  # type: ignore[call-arg]
        state = dataclasses.replace(self.state, adapter=adapter)
        return dataclasses.replace(self, adapter=adapter, report=report, method=method, state=state, personal={})

    def _shared(self, rule: Budget) -> list[dict[str, Any]]:
        """The rows of the report with one size shared over the modules of the adapter."""
        assert self.adapter is not None
        rows = self.report["modules"]
        specs = self.adapter.modules
        dtype = next(iter(specs.values())).B.dtype
        share = Share.of(rule, specs, dtype)
        ranks = share.ranks({row["name"]: row["singular_values"] for row in rows if row["name"] in specs})
        return [cut_row(row, ranks[row["name"]]) if row["singular_values"] else dict(row) for row in rows]

    @staticmethod
    def _cut(row: Mapping[str, Any], rule: RankRule) -> Mapping[str, Any]:
        values = row["singular_values"]
        if not values:  # a zero update keeps its rank of 1, or 0 where it was left out
            return row
        if row["energy"] is None or row["energy"] < SMALLEST_ENERGY:
            raise InputError(
                f"at({rule}): module {printable(row['name'])!r}: |D|_F^2 leaves float64; aggregate again with this rule"
            )
        S = torch.tensor([values], dtype=torch.float64)
        energy = torch.tensor([row["energy"]], dtype=torch.float64)
        # every value listed is above the noise floor already
        rank = int(select_rank(S, rule, total_energy=energy, floor=torch.zeros(1, dtype=torch.float64))[0])
        # what is cut to nothing is written as zero
        return cut_row(row, rank) if rank else {**cut_row(row, 0), "rank": 1}


def _whole(value: Any) -> int | None:
    """A whole number of any type, NumPy's too; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _divided(x: Tensor, scale: float, where: str) -> Tensor:
    if scale == 1.0:
        return x
    if scale == 0.0:
        raise InputError(f"{where}: the client's scale is 0, so nothing that it loads has an effect; use scale=1.0")
    result = (x.to(torch.float64) / scale).to(x.dtype)
    if not bool(torch.isfinite(result).all()):
        raise OutputOverflowError(
            f"{where}: divided by the client's scale {scale:g} it leaves the range of {x.dtype}; use scale=1.0"
        )
    return result


def _plain(value: float) -> float:
    """The whole number next to ``value`` where only rounding separates them."""
    nearest = round(value)
    return nearest if nearest and abs(value - nearest) <= 4 * 2.0**-52 * abs(value) else value
