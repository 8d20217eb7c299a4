"""Aggregation methods, one file each; importing this package registers them."""

from fedlora_kernels.methods import (
    fedex,
    fedit,
    fedmomentum,
    flexlora,
    flora,
    florist,
    hetlora,
    lora_fair,
    prelort,
    raflora,
    zero_pad,
)

__all__ = [
    "fedex",
    "fedit",
    "fedmomentum",
    "flexlora",
    "flora",
    "florist",
    "hetlora",
    "lora_fair",
    "prelort",
    "raflora",
    "zero_pad",
]
