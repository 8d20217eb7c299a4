"""The table of methods as it stands in README and docs, from what each method declares of itself."""

from __future__ import annotations

from fedlora_kernels.methods.contract import method_class, method_names

__all__ = ["method_table"]

_HEAD = ("method", "what it sends", "exact", "mixed ranks", "numbers per client and layer", "passes over the data")


def method_table() -> str:
    """Return the methods that can be called by name, as a Markdown table."""
    rows = [_HEAD, ("---",) * len(_HEAD)]
    for name in method_names():
        cls = method_class(name)
        passes = "2" if cls.needs_decision else "1"
        mixed = "no" if cls.equal_ranks else "yes"
        rows.append((f"`{name}`", cls.summary, cls.exact, mixed, cls.download, passes))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
