"""Federations for the engine's tests: who is there in which round, what they send, and whether two runs agree bit by bit."""

import json
from pathlib import Path

import torch
from adapter_problems import SHAPES, client

from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.methods import contract

NAMES = ("ada", "ben", "cleo", "dora", "emil")
EQUAL, MIXED = (4,) * 5, (2, 3, 3, 5, 8)
MIXED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)
PRESENT = ((0, 1, 2, 3, 4), (4, 1, 2), (0, 1, 2), (3, 1), (2, 0, 4, 3), (1,))
"""Who is there, round by round; in another order than before, and without the client of largest rank now and then."""
REMEMBERING = {"fedrot": EQUAL, "prelort": MIXED, "raflora": MIXED, "fedtree": EQUAL}
"""The methods that read the round before, and ranks that show it."""


def federation(number, ranks=EQUAL, present=None, dtypes=(torch.float32,) * 5, shapes=SHAPES, groups=(0, 1, 1, 0, 1)):
    """Clients of round ``number``, by name; those of one group resemble each other in the deeper layer, all do in the first."""
    chosen = PRESENT[number % len(PRESENT)] if present is None else present
    made = {}
    for k in chosen:
        state, settings = client(100 * number + k, rank=ranks[k], alpha=2 * ranks[k], shapes=shapes)
        for place, key in enumerate(state):
            if "lora_B" in key:
                kind = groups[k] + 1 if "layers.1." in key else 0
                source = torch.Generator().manual_seed(10_000 + 100 * kind + place)
                state[key] = torch.randn(state[key].shape[0], 16, generator=source)[:, : ranks[k]] + 0.2 * state[key]
        # in the order that a file has
        made[NAMES[k]] = {key: state[key].to(dtypes[k]) for key in sorted(state)}, settings
    return made


def in_rounds(method, ranks, rounds, root=None, dtypes=(torch.float32,) * 5, **options):
    """The results of some rounds, each with the one before as ``previous``: in memory, or as folders below ``root``."""
    results, previous = [], None
    if root is not None:
        Path(root).mkdir(exist_ok=True)
    for number in range(rounds):
        place = {}
        if root is not None:
            place = {"out": Path(root) / f"round_{number}", "per_client": "personal" in gives(method)}
        clients = federation(number, ranks, dtypes=dtypes)
        results.append(aggregate(clients, method, previous=previous, **place, **options, **reported(method, clients)))
        previous = results[-1] if root is None else place["out"]
    return results


def reported(method, clients):
    """What clients report beside their factors, where the method takes it."""
    if not contract.method_class(method).takes_client_state:
        return {}
    return {"client_state": {name: 0.125 * (k + 1) for k, name in enumerate(sorted(clients))}}


def gives(method):
    return contract.method_class(method).gives


def same_adapter(one, other):
    """Whether two adapters (or None) hold the same modules, extras and configuration, bit by bit."""
    if one is None or other is None:
        return one is other
    assert list(one) == list(other)
    assert list(one.extras) == list(other.extras)
    assert dict(one.config) == dict(other.config)
    for name in one:
        first, second = one[name], other[name]
        if not (same(first.B, second.B) and same(first.A, second.A)):
            return False
    return all(same(one.extra(name), other.extra(name)) for name in one.extras)


def same(x, y):
    """Whether two tensors are the same bits."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (x, y)))


def same_result(one, other):
    """Whether two results hold the same, bit by bit."""
    assert dict(one.state.tensors).keys() == dict(other.state.tensors).keys()
    assert one.personal.keys() == other.personal.keys()
    memories = one.state.memory, other.state.memory
    return (
        same_adapter(one.adapter, other.adapter)
        and same_adapter(one.residual, other.residual)
        and all(same_adapter(one.personal[name], other.personal[name]) for name in one.personal)
        and all(same(one.state.tensors[key], other.state.tensors[key]) for key in one.state.tensors)
        and (memories[0] is None) == (memories[1] is None)
        and (memories[0] is None or _same_memory(*memories))
        and one.report["decision"] == other.report["decision"]
    )


def _same_memory(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    return one.facts == other.facts and all(same(one.tensors[key], other.tensors[key]) for key in one.tensors)


def report_of(out):
    """The report of an output folder; parsing it says that it is JSON."""
    return json.loads((Path(out) / "report.json").read_text(), parse_constant=lambda text: 1 / 0)


def registered(monkeypatch, cls):
    """Register a method of the test's own for its time."""
    monkeypatch.setattr(contract, "_REGISTRY", dict(contract._REGISTRY))
    return contract.register(cls)


def files_below(folder):
    """Every file below a folder, by its path within."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
