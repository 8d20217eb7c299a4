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
from fedlora_kernels.adapters.writer import (
    OutputFolder,
    PeftFileWriter,
    SafetensorsWriter,
    WriteOptions,
    check_out,
    disc_errors,
    pad_to_uniform,
    peft_config,
    save_adapter,
    verify_adapter,
    write_config,
)

__all__ = [
    "Adapter",
    "ClientCheck",
    "ExtraSpec",
    "Failure",
    "Limits",
    "LoRAFactors",
    "ModuleSpec",
    "OutputFolder",
    "PeftFileWriter",
    "Policy",
    "ReadOptions",
    "SafetensorsFile",
    "SafetensorsWriter",
    "StateDict",
    "TensorSource",
    "TensorSpec",
    "WriteOptions",
    "check_out",
    "disc_errors",
    "open_adapter",
    "pad_to_uniform",
    "path_name",
    "peft_config",
    "printable",
    "save_adapter",
    "validate_clients",
    "verify_adapter",
    "write_config",
]
