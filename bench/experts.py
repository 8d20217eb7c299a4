"""Experts out of flat tensors: their B sorted into place while it is read, against kernels that take it where it lies.

B (m, r * E) has the expert fastest, so that one expert's column is a number out of every E. `product_svd` takes such views as they
are; sorted, it takes what `read_flat` made of them. Both answers are compared bit by bit. One client is read from memory, as the
page cache would give it; the decomposition is that of so many clients.

    python bench/experts.py [--quick] [--json FILE]
"""

from __future__ import annotations

from typing import Any

import torch
from timing import arguments, machine, measure, save, show

import fedlora_kernels as fk
from fedlora_kernels.adapters.flat import read_flat

PATH = "model.layers.0.mlp.experts"
SIZES = ((64, 1536, 1024, 16, 4), (128, 2880, 1440, 16, 2))


def client(E: int, m: int, n: int, rank: int, seed: int) -> fk.Adapter:
    """One parameter of E experts."""
    made = torch.Generator().manual_seed(seed)
    key = f"base_model.model.{PATH}.lora_"
    state = {f"{key}A.weight": torch.randn(E * rank, n, generator=made)}
    state[f"{key}B.weight"] = torch.randn(m, rank * E, generator=made)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_parameters": ["experts.down_proj"]}
    return fk.open_adapter((state, settings))


def compare(E: int, m: int, n: int, rank: int, clients: int, seconds: float) -> list[dict[str, Any]]:
    """Seconds of `product_svd` on views and on sorted factors, and of the sorting."""
    adapters = [client(E, m, n, rank, seed) for seed in range(clients)]
    specs = list(adapters[0].modules.values())
    B = [torch.empty(E, m, rank) for _ in adapters]
    A = [torch.empty(E, rank, n) for _ in adapters]

    def read() -> None:
        for adapter, own_B, own_A in zip(adapters, B, A, strict=True):
            read_flat(adapter.source, specs, own_B, own_A)

    read()
    flat = [adapter.source.read(specs[0].B.key).view(m, rank, E).permute(2, 0, 1) for adapter in adapters]
    calls = {
        "product_svd of views": lambda: fk.product_svd(flat, A, rule=fk.Rank(rank), output="left"),
        "product_svd of sorted factors": lambda: fk.product_svd(B, A, rule=fk.Rank(rank), output="left"),
        "reading and sorting": read,
    }
    one, other = (calls[name]() for name in list(calls)[:2])
    took = measure(calls, seconds=seconds)
    rows = [{"route": name, "seconds": spent.pop("median"), **spent} for name, spent in took.items()]
    facts = {
        "E": E,
        "m": m,
        "n": n,
        "r": rank,
        "clients": clients,
        "same_bits": bool(torch.equal(one.left, other.left)),
    }
    return [{**row, **facts, "of_sorted": row["seconds"] / rows[1]["seconds"]} for row in rows]


def main() -> None:
    options = arguments(__doc__, "16 experts of 96 x 80").parse_args()
    print(machine())
    sizes, seconds = (((16, 96, 80, 8, 3),), 0.1) if options.quick else (SIZES, 3.0)
    rows = [row for size in sizes for row in compare(*size, seconds)]
    for row in rows:
        show(row)
    save(options.json, rows)


if __name__ == "__main__":
    main()
