"""What the tests of the CUDA library share: memory that notices, inputs in any layout, the orders of the simulated device."""

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCHEDULES = ["forward", "reverse", "7", "1234567"]
CANARY, BESIDE = 0x5A, 64


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def same_bits(a, b):
    """Equal to the bit, signs of zero and NaNs included."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return (
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


def same_numbers(a, b):
    """Equal to the bit, signs of zero included, but for the kind of NaN, which is a device's own."""
    bad = a.isnan()
    return torch.equal(bad, b.isnan()) and same_bits(a.masked_fill(bad, 0), b.masked_fill(bad, 0))


def same_answer(one, other):
    """The same bits in every field."""
    return all(same_bits(a, b) for a, b in zip(one, other, strict=True))


def home(answer):
    """An answer on the CPU."""
    return type(answer)(*(field.cpu() for field in answer))


class Guards:
    """Answers of a library in memory with canaries on both sides."""

    def __init__(self, monkeypatch, library):
        self.kept = []
        monkeypatch.setattr(library, "empty", self.empty)

    def empty(self, shape, dtype, device):
        size = torch.Size(shape).numel()
        width = torch.empty(0, dtype=dtype).element_size()
        memory = torch.full((size * width + 2 * BESIDE,), CANARY, dtype=torch.uint8, device=device)
        self.kept.append(memory)
        return memory[BESIDE : BESIDE + size * width].view(dtype).view(tuple(shape))

    def hold(self):
        """Whether nothing beside the answers was written."""
        return bool(self.kept) and all(
            bool((memory[:BESIDE] == CANARY).all()) and bool((memory[len(memory) - BESIDE :] == CANARY).all())
            for memory in self.kept
        )


def offset(x):
    """The same numbers, one element further on in memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def strided(x):
    """The same numbers, with others between."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def turned(x):
    """The same numbers, by columns in memory."""
    return x.mT.contiguous().mT


LAYOUTS = {"offset": offset, "strided": strided, "turned": turned, "both": lambda x: turned(strided(x))}
