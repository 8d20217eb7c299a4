"""How adapters are read, and what an output adapter looks like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora_kernels.adapters.names import printable
from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.errors import InputError

__all__ = ["WRITTEN_HERE", "ReadOptions", "WriteOptions"]


@dataclass(frozen=True)
class ReadOptions:
    """How adapters are read; checked on creation.

    Args:
        config: configuration for sources without one of their own.
        adapter_name: which adapter, where the keys carry several adapter names.
        rank_from: "config" refuses a rank in the configuration that differs from the tensors'; "tensor" takes theirs.
        extras: tensors that are no factors: "strict" refuses unknown ones and sets that differ among clients, "ignore" drops
            them with a warning, "owners" averages over those who have one, "first" takes the first client's.
        missing: modules that some clients lack: "error", "renormalize" (mean over owners) or "zero".
        limits: size caps.
        parameter_order: parameters of a module that ``target_parameters`` names, such as ("gate_up_proj", "down_proj"), in the
            order in which the model registers them; needed where the patterns give them different ranks or alphas.
        adalora: "fold" reads AdaLoRA with its singular values folded into B; None refuses it.
        drop_state: leave out what VeLoRA keeps beside its factors.
        init: "keep" takes adapters whose initialisation changed the base weights (PiSSA, OLoRA, ...) as they are: the result is
            for that residual base, keeps the flag and the rank, and needs weights that sum to 1.
        init_factors: the adapter that those clients started from, as anything that can be opened or as (A0, B0, s0) by module:
            what is combined is ``s B A - s0 B0 A0``, and the result is for the original base.
    """

    config: Mapping[str, Any] | None = None
    adapter_name: str | None = None
    rank_from: str = "config"
    extras: str = "strict"
    missing: str = "error"
    adalora: str | None = None
    drop_state: bool = False
    init: str | None = None
    init_factors: Any = None
    limits: Limits = field(default_factory=Limits)
    parameter_order: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _one_of("rank_from", self.rank_from, ("config", "tensor"))
        _one_of("extras", self.extras, ("strict", "ignore", "owners", "first"))
        _one_of("missing", self.missing, ("error", "renormalize", "zero"))
        _one_of("adalora", self.adalora, (None, "fold"))
        _one_of("init", self.init, (None, "keep"))
        if not isinstance(self.drop_state, bool):
            raise InputError(f"ReadOptions: drop_state is {printable(self.drop_state)!r}; True or False needed")
        if self.init is not None and self.init_factors is not None:
            raise InputError("ReadOptions: init and init_factors exclude each other; give one of them")
        if self.config is not None and not isinstance(self.config, Mapping) and not hasattr(self.config, "to_dict"):
            raise InputError(f"ReadOptions: config is of type {type(self.config).__name__}; a mapping needed")
        if self.adapter_name is not None and (not isinstance(self.adapter_name, str) or not self.adapter_name):
            raise InputError(f"ReadOptions: adapter_name is {printable(self.adapter_name)!r}; a name needed")
        order = self.parameter_order
        if order is not None and not (
            isinstance(order, list | tuple) and all(isinstance(name, str) and name for name in order)
        ):
            raise InputError(f"ReadOptions: parameter_order is {printable(order)!r}; a list of names needed")
        if not isinstance(self.limits, Limits):
            raise InputError(f"ReadOptions: limits is of type {type(self.limits).__name__}; Limits(...) needed")


@dataclass(frozen=True)
class WriteOptions:
    """What an output adapter looks like; checked on creation.

    Args:
        target: who loads the output: "peft", "kohya" (a file, from kohya clients), or "vllm" (one rank, no extra tensors); None:
            as the first client.
        output: singular values on B ("left") or half on each factor ("balanced").
        uniform_rank: pad all modules to the largest rank; None: only for vllm.
        fill: padding rows of A are "zero", or "random" so that they can be trained (columns of B stay zero).
        drop_zero: leave modules out whose aggregate is zero.
    """

    target: str | None = None
    output: str = "left"
    uniform_rank: bool | None = None
    fill: str = "zero"
    drop_zero: bool = False

    def __post_init__(self) -> None:
        known: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("target", (None, "peft", "kohya", "vllm")),
            ("output", ("left", "balanced")),
            ("uniform_rank", (None, True, False)),
            ("fill", ("zero", "random")),
            ("drop_zero", (True, False)),
        )
        for name, values in known:
            value = getattr(self, name)
            if not any(value is allowed or (isinstance(allowed, str) and value == allowed) for allowed in values):
                listing = ", ".join(str(allowed) for allowed in values)
                raise InputError(f"WriteOptions: {name} is {printable(value)!r}; one of {listing} needed")
        if self.target == "vllm" and self.uniform_rank is False:
            raise InputError("WriteOptions: target 'vllm' needs one rank for all modules; leave uniform_rank out")

    @property
    def pads(self) -> bool:
        """Whether all modules are padded to one rank."""
        return self.target == "vllm" if self.uniform_rank is None else self.uniform_rank

    def check_extras(self, names: Iterable[str]) -> None:
        """Raise InputError where the target cannot hold the extra tensors ``names``."""
        first = next(iter(names), None)
        if self.target == "vllm" and first is not None:
            raise InputError(
                f"target 'vllm' holds no extra tensors, but there is {printable(first)!r}; write target 'peft', or drop "
                "them with extras='ignore' from adapters without modules_to_save and bias"
            )


def _one_of(name: str, value: Any, known: tuple[str | None, ...]) -> None:
    if not any(value is None if allowed is None else value == allowed for allowed in known):
        raise InputError(f"ReadOptions: {name} is {printable(value)!r}; one of {', '.join(map(str, known))} needed")


WRITTEN_HERE = ReadOptions(init="keep", limits=Limits(modules_per_client=1 << 62))
"""For what this package wrote: the union of many clients' modules may exceed the cap on one client's."""
