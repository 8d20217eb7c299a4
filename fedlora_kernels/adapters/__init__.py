"""What a LoRA adapter is: model, reader, writer, validation."""

from fedlora_kernels.adapters.model import Adapter, LoRAFactors
from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.adapters.policy import Limits, Policy
from fedlora_kernels.adapters.reader import open_adapter

__all__ = ["Adapter", "Limits", "LoRAFactors", "Policy", "ReadOptions", "WriteOptions", "open_adapter"]
