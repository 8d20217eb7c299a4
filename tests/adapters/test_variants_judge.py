"""PEFT's own variants, saved by it: each is refused by its name, or read with the update that PEFT computes."""

import copy
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from torch import nn

from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import UnsupportedVariantError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(12, 8)
        self.up = nn.Linear(8, 6)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


def saved(folder, config):
    """An adapter with every trainable parameter drawn at random, and the logits of its model."""
    torch.manual_seed(3)
    base = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    return base, logits(model.eval())


def logits(model):
    with torch.no_grad():
        return model(torch.randn(5, 12, generator=torch.Generator().manual_seed(1)))


def lora(**fields):
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=["down", "up"], **fields)


REFUSED = {
    "DoRA": lambda: lora(use_dora=True),
    "KaSA": lambda: lora(kasa_config=KasaConfig()),
    "VeLoRA": lambda: lora(velora_config=VeloraConfig(num_groups=2)),
    "BD-LoRA": lambda: peft.LoraConfig(
        r=4,
        target_modules=["down", "up"],
        use_bdlora=BdLoraConfig(target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=2),
    ),
    "LoHa": lambda: peft.LoHaConfig(r=3, target_modules=["down", "up"]),
    "LoKr": lambda: peft.LoKrConfig(r=3, target_modules=["down", "up"]),
    "VeRA": lambda: peft.VeraConfig(r=3, target_modules=["up"]),
    "IA3": lambda: peft.IA3Config(target_modules=["down", "up"], feedforward_modules=["down"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=2, r=0, target_modules=["down", "up"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=2, target_modules=["up"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["down", "up"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_variant_that_peft_saved_is_refused_by_its_name(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = REFUSED[name]()
    saved(tmp_path / "c", config)
    with pytest.raises(UnsupportedVariantError) as caught:
        open_adapter(tmp_path / "c", name="c")
    assert str(caught.value).startswith(f"client 'c': adapter uses {name} (")
    assert "cannot be aggregated here. " in str(caught.value)


def test_velora_without_its_state_is_the_update_that_peft_computes(tmp_path):
    base, wanted = saved(tmp_path / "c", lora(velora_config=VeloraConfig(num_groups=2)))
    adapter = open_adapter(tmp_path / "c", ReadOptions(drop_state=True))
    assert any("lora_velora_embed" in key for key in adapter.source.tensors)
    assert "tensors beside the factors were dropped" in adapter.warnings[0]
    adapter.save(tmp_path / "out")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    assert (logits(back) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
