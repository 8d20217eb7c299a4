"""Where the answers of the native kernels lie."""

from __future__ import annotations

from fedlora_kernels.memory import Reserve

__all__ = ["ANSWERS"]

ANSWERS = Reserve()
