"""A tiny archive of the real layout, and a tiny pretrained encoder: what the demo's tests run on without a download."""

import io
import json
import random
import tarfile
from pathlib import Path

import torch

from fedlora_kernels.demo.data import DOMAINS, INNER

CACHE = Path(__file__).parents[2] / ".cache" / "demo"
"""Where `make demo` leaves what it fetches."""

GOOD = ("good", "lovely", "bright", "fine")
BAD = ("bad", "awful", "grey", "poor")
REST = ("film", "phone", "today", "city", "vote", "it", "was", "a", "very")


def lines(name, count, seed=0):
    """Ground-truth lines: ID, rating, text between tabs; a good word for a positive rating, a bad one for a negative."""
    draw = random.Random(f"{name}{seed}")
    out = []
    for number in range(count):
        rating = draw.choice((-2.4, -1.0, -0.3, -0.1, 0.0, 0.2, 0.3, 1.6))
        words = [*draw.choices(REST, k=5), draw.choice(GOOD if rating > 0 else BAD), f"{name}{number}"]
        out.append(f"{number}\t{rating}\t{' '.join(words)}.")
    return "\r\n".join(out) + "\r\n"


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_archive(path: Path, texts=None, count=60):
    """Write a source distribution with the inner archive; ``texts`` replaces the file of a domain."""
    raw = {name: lines(name, count) for name in DOMAINS} | (texts or {})
    inner = tar({f"hutto/{DOMAINS[name]}": text.encode() for name, text in raw.items()})
    path.write_bytes(tar({"vader/setup.py": b"", f"vader/additional_resources/{INNER}": inner}))
    return path


def write_encoder(folder: Path):
    """Save a BERT encoder of two small layers without a head, and a word tokenizer, as a pretrained model is packaged."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *REST]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")
    fast.save_pretrained(str(folder))
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(words), hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=28,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(str(folder))
    return folder


def report_of(spectra):
    """A report of the form that an aggregation writes, from singular values by module name."""
    modules = [
        {"name": name, "m": 40, "n": 36, "rank": len(s), "ranks": [3, 2], "singular_values": list(s), "error": 0.0}
        for name, s in spectra.items()
    ]
    return json.loads(json.dumps({"schema": 1, "modules": modules}))
