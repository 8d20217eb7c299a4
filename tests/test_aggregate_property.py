"""Any clients, any weights, any memory: at full energy the answer is the dense weighted sum."""

import torch
from adapter_problems import client as make_client
from adapter_problems import products, updates
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.linalg.rules import Energy

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
NAMES = ("a.q_proj", "b.q_proj", "c.down_proj")


@st.composite
def problems(draw):
    shapes = {name: (draw(st.integers(1, 23)), draw(st.integers(1, 19))) for name in NAMES}
    count = draw(st.integers(1, 5))
    dtypes = st.sampled_from(list(LIMIT))
    clients = []
    for _ in range(count):
        kept = draw(st.sets(st.sampled_from(NAMES[1:]))) | {NAMES[0]}
        clients.append(
            make_client(
                seed=draw(st.integers(0, 9)),
                rank=draw(st.integers(1, 9)),
                alpha=draw(st.sampled_from([1, 3, 8.5, 16])),
                shapes={name: shapes[name] for name in NAMES if name in kept},
                dtype=draw(dtypes),
                use_rslora=draw(st.booleans()),
            )
        )
    weights = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count).filter(any))
    return clients, weights, draw(st.sampled_from(["zero", "renormalize"])), draw(st.sampled_from([1, 5000, None]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_full_energy_is_the_dense_weighted_sum(problem):
    clients, weights, missing, memory = problem
    result = aggregate(clients, weights=weights, rule=Energy(1.0), memory=memory, read=ReadOptions(missing=missing))
    dense = [updates(client) for client in clients]
    present = [k for k, weight in enumerate(weights) if weight]
    wanted, scale = {}, {}
    for name in dict.fromkeys(name for k in present for name in dense[k]):
        owners = [k for k in present if name in dense[k]]
        total = sum(weights[k] for k in (owners if missing == "renormalize" else present))
        wanted[name] = sum(weights[k] / total * dense[k][name] for k in owners)
        scale[name] = sum(weights[k] / total * float(dense[k][name].norm()) for k in owners)
    assert list(result.adapter) == list(wanted)
    dtype = max((value.dtype for k in present for value in clients[k][0].values()), key=lambda d: d == torch.float64)
    found = products(result.adapter)
    for name, D in wanted.items():
        # against the size of what is summed: clients of one seed can cancel
        assert float((found[name] - D).norm()) <= LIMIT[dtype] * scale[name]
