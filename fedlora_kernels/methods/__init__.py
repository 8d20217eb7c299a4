"""Aggregation methods, one file each; importing this package registers them."""

from fedlora_kernels.methods import fedit, flora, florist, hetlora, zero_pad

__all__ = ["fedit", "flora", "florist", "hetlora", "zero_pad"]
