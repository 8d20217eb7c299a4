"""What a LoRA adapter is: model, reader, writer, validation."""

from fedlora_kernels.adapters.model import Adapter, ExtraSpec, LoRAFactors, ModuleSpec, TensorSource, TensorSpec
from fedlora_kernels.adapters.reader import ReadOptions, SafetensorsFile, StateDict, open_adapter
from fedlora_kernels.adapters.validation import (
    ClientCheck,
    Failure,
    Limits,
    Policy,
    path_name,
    printable,
    validate_clients,
)

__all__ = [
    "Adapter",
    "ClientCheck",
    "ExtraSpec",
    "Failure",
    "Limits",
    "LoRAFactors",
    "ModuleSpec",
    "Policy",
    "ReadOptions",
    "SafetensorsFile",
    "StateDict",
    "TensorSource",
    "TensorSpec",
    "open_adapter",
    "path_name",
    "printable",
    "validate_clients",
]
