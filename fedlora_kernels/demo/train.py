"""Train one client's adapter: LoRA on query and value, the classification head trained along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedlora_kernels.demo.data import Domain
from fedlora_kernels.demo.model import Encoder, load_classifier
from fedlora_kernels.demo.settings import Client, Settings

__all__ = ["train_client"]


def train_client(client: Client, domain: Domain, model_folder: Path, out: Path, settings: Settings) -> None:
    """Train and save the adapter of one client as a PEFT folder ``out``.

    All clients start from the same head (drawn from ``settings.seed``); the LoRA factors and the order of the sentences
    are drawn from the seed and the client's position.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    base = load_classifier(model_folder, settings.seed)
    own_seed = settings.seed + 1 + settings.clients.index(client)
    torch.manual_seed(own_seed)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=client.rank,
        lora_alpha=client.alpha,
        lora_dropout=0.0,
        target_modules=["query", "value"],
    )
    model = get_peft_model(base, config)
    _fit(model, Encoder(model_folder, domain.train, settings.max_length), own_seed, settings)
    model.save_pretrained(str(out), save_embedding_layers=False)


def _fit(model: Any, data: Encoder, seed: int, settings: Settings) -> None:
    """AdamW at a constant learning rate: so few steps leave no time for a warm-up or a decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate)
    rows = _rows(len(data), settings.steps * settings.batch, seed)
    model.train()
    for step in range(settings.steps):
        chosen = rows[step * settings.batch : (step + 1) * settings.batch]
        loss = torch.nn.functional.cross_entropy(model(**data.batch(chosen)).logits, data.labels[chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    model.eval()


def _rows(count: int, needed: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    while len(rows) < needed:
        rows += torch.randperm(count, generator=generator).tolist()
    return rows[:needed]
