"""The table of methods as it stands in README and docs, from what each method declares of itself."""

from __future__ import annotations

from fedlora_kernels.methods.contract import Method, method_class, method_names
from fedlora_kernels.methods.robust import RobustRule

__all__ = ["method_table"]

_HEAD = ("method", "what it does", "exact", "mixed ranks", "sends", "numbers per client and layer", "needs")
_FROZEN = {"A": "A frozen and common", "B": "B frozen and common", "alternating": "A and B frozen in turn"}


def method_table() -> str:
    """Return the methods that can be called by name, as a Markdown table."""
    rows = [_HEAD, ("---",) * len(_HEAD)]
    for name in sorted(method_names()):
        cls = method_class(name)
        mixed = "no" if cls.equal_ranks else "yes"
        rows.append((f"`{name}`", cls.summary, cls.exact, mixed, cls.broadcast, cls.download, _needs(cls)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _needs(cls: type[Method]) -> str:
    needs = []
    if cls.frozen is not None:
        needs.append(_FROZEN[cls.frozen])
    if cls.needs_previous:
        needs.append("the round before")
    elif cls.reads_previous:
        needs.append("the round before, if any")
    if cls.needs_round and not cls.needs_previous:
        needs.append("the round")
    if cls.needs_decision or issubclass(cls, RobustRule):
        needs.append("a second pass")
    if "common" not in cls.gives:
        needs.append("`--per-client`")
    return ", ".join(needs)
