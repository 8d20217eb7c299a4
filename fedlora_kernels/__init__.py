"""Many low-rank pairs into one: exact, batched, certified aggregation of LoRA adapters."""

from fedlora_kernels._version import __version__ as __version__
