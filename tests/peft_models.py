"""Tiny models with every kind of layer, PEFT adapters on them, and PEFT's own word on what an adapter does."""

import copy
import warnings

import peft
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class Layers(nn.Module):
    """Embedding, attention and convolutions one after another; no layer is square."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(17, 10)
        self.attn = nn.MultiheadAttention(10, 2, batch_first=True)
        self.proj = Conv1D(12, 10)
        self.conv1d = nn.Conv1d(12, 7, 3)
        self.conv3x3 = nn.Conv2d(7, 5, 3, padding=1)
        self.conv1x1 = nn.Conv2d(5, 8, 1)
        self.conv3d = nn.Conv3d(8, 3, (1, 2, 3))
        self.norm = nn.LayerNorm(18)
        self.head = nn.Linear(18, 4)

    def forward(self, tokens):
        hidden = self.emb(tokens)
        hidden = self.proj(self.attn(hidden, hidden, hidden)[0])
        hidden = torch.tanh(self.conv1d(hidden.mT))
        hidden = torch.tanh(self.conv1x1(self.conv3x3(hidden[..., None].expand(-1, -1, -1, 4))))
        return self.head(self.norm(self.conv3d(hidden[:, :, None]).flatten(1)))


def layers():
    torch.manual_seed(3)
    return Layers().eval()


def language_model(tied=True):
    torch.manual_seed(4)
    sizes = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


def gpt2():
    torch.manual_seed(5)
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=12, n_embd=8, n_layer=1, n_head=2)).eval()


def untied():
    return language_model(tied=False)


EVERY = ["emb", "attn", "proj", "conv1d", "conv3x3", "conv1x1", "conv3d", "head"]
RANKS = {"attn": 2, "conv3x3": 5, "emb": 4, "conv1x1": 1}
ALPHAS = {"conv1d": 7, "emb": 5, "attn": 2.5}
CASES = {
    "embedding": (layers, {"target_modules": ["emb"]}),
    "MultiheadAttention": (layers, {"target_modules": ["attn"]}),
    "Conv1D": (layers, {"target_modules": ["proj"], "fan_in_fan_out": True}),
    "conv 1d": (layers, {"target_modules": ["conv1d"]}),
    "conv 3x3": (layers, {"target_modules": ["conv3x3"]}),
    "conv 1x1": (layers, {"target_modules": ["conv1x1"]}),
    "conv 3d": (layers, {"target_modules": ["conv3d"]}),
    "every kind": (layers, {}),
    "rslora": (layers, {"use_rslora": True}),
    "rank_pattern": (layers, {"rank_pattern": RANKS}),
    "alpha_pattern": (layers, {"alpha_pattern": ALPHAS}),
    "both and rslora": (layers, {"rank_pattern": RANKS, "alpha_pattern": ALPHAS, "use_rslora": True}),
    "bias all": (layers, {"bias": "all"}),
    "bias lora_only": (layers, {"bias": "lora_only", "rank_pattern": RANKS}),
    "lora_bias": (layers, {"lora_bias": True, "target_modules": EVERY[2:], "alpha_pattern": ALPHAS}),
    "modules_to_save": (layers, {"target_modules": EVERY[:-1], "modules_to_save": ["head", "norm"]}),
    "tied head": (language_model, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied head, rslora": (
        language_model,
        {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True, "use_rslora": True},
    ),
    "tied head, regex": (
        language_model,
        {
            "target_modules": r"(.*\.)?(embed_tokens|down_proj|q_proj)",
            "ensure_weight_tying": True,
            "rank_pattern": {"q_proj": 2},
        },
    ),
    "tied tokens": (
        language_model,
        {"target_modules": ["q_proj"], "trainable_token_indices": [2, 9], "ensure_weight_tying": True},
    ),
    "layer_replication": (
        language_model,
        {
            "target_modules": ["down_proj"],
            "layer_replication": [[0, 1], [0, 1]],
            "rank_pattern": {"layers.1.mlp.down_proj": 2},
        },
    ),
    "GPT-2": (
        gpt2,
        {"target_modules": ["c_attn", "mlp.c_fc", "wte"], "fan_in_fan_out": True, "rank_pattern": {"wte": 4}},
    ),
    "tied modules_to_save": (
        language_model,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embedding and head": (untied, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding of a tied model": (language_model, {"target_modules": ["embed_tokens", "q_proj"]}),
    "trainable tokens": (language_model, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1, 16]}),
    "trainable tokens of two layers": (
        untied,
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [3, 2], "lm_head": [0, 4, 7]}},
    ),
}


def trained(case, seed=7, **more):
    """A PEFT model with every trainable parameter drawn at random, and its base."""
    make, fields = CASES[case]
    base = make()
    return fitted(base, seed=seed, **{"r": 3, "lora_alpha": 5, "target_modules": EVERY, **fields, **more}), base


def fitted(base, std=0.5, seed=None, **fields):
    """A PEFT model on a copy of its base, with every trainable parameter drawn at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    if seed is not None:
        torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model.eval()


def saved(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


HARMLESS = (
    ".*fan_in_fan_out.*",
    ".*embedding layers found.*",
    ".*tie_word_embeddings.*",
    ".*no tied modules.*",
    # looked for among targeted modules alone, though applied to parameters all the same
    ".*_pattern keys did not match any targeted module.*",
)
TOKENS = torch.randint(0, 17, (5, 6), generator=torch.Generator().manual_seed(1))


def loaded(base, path):
    """Load by PEFT with warnings as errors, but for `HARMLESS` ones: a missing key is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message=message)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), path).eval()


def logits(model, inputs=TOKENS, dtype=torch.float64):
    with torch.no_grad():
        found = copy.deepcopy(model).to(dtype)(inputs.to(dtype) if inputs.is_floating_point() else inputs)
    return getattr(found, "logits", found)


def same_logits(one, two, limit=1e-5, inputs=TOKENS, dtype=torch.float64):
    """Whether two models say the same, in float64: the layers amplify the rounding of float32 beyond that of an adapter."""
    expected, found = logits(one, inputs, dtype), logits(two, inputs, dtype)
    return (expected - found).abs().max() <= limit * expected.abs().max()
