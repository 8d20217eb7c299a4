"""Reports whose pages are tried: small ones, large ones, and ones full of hostile names."""

import torch
from adapter_problems import changed, client, clients

import fedlora_kernels as fk

HOSTILE = [
    "</script><script>console.error('run')</script>",
    '"><img src=x onerror="console.error(1)">',
    "\u202edesrever\u2066",
    "a\x1b[31m\x00\n\ttab",
    "<b>bold</b> %{x} ${y} &lt;i&gt; <a href='http://127.0.0.1:9/x'>link</a>",
    "\ud800 \u2028 ]]> <!-- <script>",
]


def hostile():
    """An aggregation in which every name that a client chooses is an attack."""
    # a key of a file has no surrogates
    shapes = {f"model.layers.{i}.{name}".replace("\ud800", "-"): (7 + i, 5) for i, name in enumerate(HOSTILE)}
    made = {name: client(seed=k, rank=2 + k, shapes=shapes) for k, name in enumerate(HOSTILE)}
    bad = next(iter(shapes))
    made["dropped <img src=x onerror=alert(1)>"] = changed(
        client(9, 2, shapes=shapes), "B", torch.Tensor.log, module=bad
    )
    return fk.aggregate(made, compare=True, policy="drop").report


def sizeable(layers=32):
    """As many modules as a model of today has: seven in each of its layers."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    shapes = {f"model.layers.{i}.{kind}": (13 + 2 * len(kind), 17 + len(kind)) for i in range(layers) for kind in kinds}
    pairs = [client(seed=k, rank=rank, shapes=shapes) for k, rank in enumerate((4, 2, 5))]
    names = ("hospital_berlin", "hospital_oslo_with_a_rather_long_name", "hospital_lima")
    return fk.aggregate(dict(zip(names, pairs, strict=True)), rule=fk.Energy(0.9), compare=True, policy="clip").report


def plainest():
    """No comparison, no spectrum, no measured error: a mean of factors as it comes from Python."""
    return fk.aggregate(clients((3, 3)), "fedit", measure=False).report


def zero():
    """Nothing but zeros."""
    return fk.aggregate([still(1), still(2)], compare=True).report


def still(seed):
    """A client that was never trained."""
    state, settings = client(seed)
    return {key: torch.zeros_like(x) if ".lora_B." in key else x for key, x in state.items()}, settings
