"""Everything that decides the demonstration's figures, in one frozen record."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Client", "Settings"]


@dataclass(frozen=True)
class Client:
    """A client: the domain that it holds, and the rank and alpha of its adapter."""

    domain: str
    rank: int
    alpha: int

    @property
    def scale(self) -> float:
        """s_k = alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Settings:
    """The run. Ranks and scales s_k = alpha / rank (1, 2, 4, 2) differ between clients, as they do in the wild."""

    clients: tuple[Client, ...] = (
        Client("tweets", rank=16, alpha=16),
        Client("products", rank=8, alpha=16),
        Client("movies", rank=4, alpha=16),
        Client("editorials", rank=16, alpha=32),
    )
    seed: int = 0
    steps: int = 60
    batch: int = 32
    learning_rate: float = 2e-3
    max_length: int = 64
    threshold: float = 0.3
    test_share: float = 0.2
    train_limit: int = 3000
    test_limit: int = 500
