"""Aggregation methods, one file each; importing this package registers them."""

from fedlora_kernels.methods import (
    fedex,
    fedit,
    fedmomentum,
    fedrot,
    flexlora,
    flora,
    florist,
    geometric_median,
    hetlora,
    krum,
    lora_fair,
    norm_rules,
    prelort,
    raflora,
    zero_pad,
)

__all__ = [
    "fedex",
    "fedit",
    "fedmomentum",
    "fedrot",
    "flexlora",
    "flora",
    "florist",
    "geometric_median",
    "hetlora",
    "krum",
    "lora_fair",
    "norm_rules",
    "prelort",
    "raflora",
    "zero_pad",
]
