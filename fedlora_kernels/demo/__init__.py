"""``fedlora demo``: four clients with real text fine-tune a real pretrained model, and their adapters become one.

Every client holds one domain and trains a LoRA adapter of its own rank and scale on it; ``fedlora aggregate``, the very
command line, combines the four folders; every adapter is scored on held-out sentences of all domains. Nothing is downloaded.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from fedlora_kernels.demo.settings import Client, Settings

__all__ = ["CACHE", "OUT", "Client", "Settings", "run"]

CACHE = Path(".cache/demo")
OUT = Path("demo_output")


def run(
    data: Path | str = CACHE, out: Path | str = OUT, cache: Path | str = CACHE, *, settings: Settings | None = None
) -> int:
    """Run the demonstration; print the table to stdout and progress to stderr; return 0.

    Args:
        data: the sdist of vaderSentiment 3.3.2, or the folder that holds it.
        out: folder for the adapters, the results (JSON), the table and the picture.
        cache: folder where trained adapters and scores are kept for the next run.
        settings: ranks, steps and seeds; the default is what the documentation shows.

    Raises:
        InputError: something is missing; the message holds the command that fetches it.
        RunError: PEFT did not load what was written, or its logits are not those of the dense sum.
    """
    from fedlora_kernels.demo.demonstration import Demonstration

    with warnings.catch_warnings():
        # deprecations inside transformers are not ours to mend, and they would bury the table
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
        Demonstration(Path(data), Path(cache), settings or Settings()).run(Path(out))
    return 0
