"""Every exception the package raises on purpose.

Two families. `InputError` (also a `ValueError`) is anything that can be seen in arguments or input: the command line
exits with status 2. `RunError` (also a `RuntimeError`) is a failure of the run itself: exit status 1.
Messages read ``client 'c3', module 'layers.0.q_proj': <found>; <needed>. <what to do>``.
"""

__all__ = [
    "BackendError",
    "ConvergenceError",
    "FedLoRAError",
    "FormatError",
    "InputError",
    "LimitError",
    "MismatchError",
    "NonFiniteError",
    "OutputOverflowError",
    "RunError",
    "UnsupportedVariantError",
    "WeightError",
]


class FedLoRAError(Exception):
    """Base of every error raised by fedlora_kernels."""


class InputError(FedLoRAError, ValueError):
    """The arguments or the input are wrong; nothing was computed or written."""


class FormatError(InputError):
    """A file, a configuration or a key layout cannot be read as a LoRA adapter."""


class UnsupportedVariantError(InputError):
    """A known adapter variant whose update is not ``scale * B @ A``."""


class MismatchError(InputError):
    """Clients (or factors) that do not fit each other."""


class NonFiniteError(InputError):
    """NaN or Inf in an input."""


class LimitError(InputError):
    """A size cap was exceeded; the message names the cap and how to raise it."""


class WeightError(InputError):
    """Client weights of the wrong number, sign or value."""


class RunError(FedLoRAError, RuntimeError):
    """The run itself failed."""


class ConvergenceError(RunError):
    """An iteration hit its guard, or a library solver missed its residual check."""


class BackendError(RunError):
    """A backend named explicitly cannot run here, or tensors sit on different devices."""


class OutputOverflowError(RunError):
    """A result does not fit the range of the output dtype."""
