"""The independent checks: what PEFT loads, the dense sum, and that both notice a wrong file."""

import shutil

import pytest
import torch
from demo_problems import write_archive, write_encoder
from safetensors.torch import load_file, save_file

from fedlora_kernels.demo import compare
from fedlora_kernels.demo.data import read_domains
from fedlora_kernels.demo.model import Encoder
from fedlora_kernels.demo.settings import Client, Settings
from fedlora_kernels.demo.train import train_client
from fedlora_kernels.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
SETTINGS = Settings(clients=(Client("tweets", 3, 6), Client("movies", 2, 1)), steps=4, batch=5, learning_rate=2e-2)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    encoder = write_encoder(folder / "encoder")
    domains = read_domains(write_archive(folder / "a.tar.gz"))
    for client in SETTINGS.clients:
        train_client(client, domains[client.domain], encoder, folder / client.domain, SETTINGS)
    return folder, encoder, domains


def test_updates_are_scale_times_b_times_a(problem):
    folder, encoder, _ = problem
    for client in SETTINGS.clients:
        found = compare.updates(compare.load_adapter(encoder, folder / client.domain, 0))
        stored = load_file(folder / client.domain / "adapter_model.safetensors")
        name = "bert.encoder.layer.1.attention.self.value"
        B, A = (stored[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
        assert B.abs().max() > 0
        assert torch.equal(found[f"{name}.weight"], client.alpha / client.rank * (B @ A))
        assert torch.equal(found["classifier.bias"], stored["base_model.model.classifier.bias"].double())
        assert len(found) == 6


def test_training_is_reproducible(problem, tmp_path):
    folder, encoder, domains = problem
    train_client(SETTINGS.clients[0], domains["tweets"], encoder, tmp_path / "again", SETTINGS)
    first, again = (load_file(f / "adapter_model.safetensors") for f in (folder / "tweets", tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_lost_or_foreign_tensor_is_noticed(problem, tmp_path):
    folder, encoder, _ = problem
    stored = load_file(folder / "tweets" / "adapter_model.safetensors")
    key = next(k for k in stored if "lora_B" in k)
    lost = {k: v for k, v in stored.items() if k != key}
    foreign = stored | {"base_model.model.stray.weight": torch.ones(3)}
    for wrong, text in ((lost, "missing adapter keys"), (foreign, "PEFT did not load 1 of")):
        shutil.copytree(folder / "tweets", tmp_path / "w", dirs_exist_ok=True)
        save_file(wrong, tmp_path / "w" / "adapter_model.safetensors")
        with pytest.raises(RunError, match=text):
            compare.load_adapter(encoder, tmp_path / "w", 0)


def test_dense_model_has_the_logits_of_the_adapter(problem):
    folder, encoder, domains = problem
    model = compare.load_adapter(encoder, folder / "tweets", 0)
    other = compare.load_adapter(encoder, folder / "movies", 0)
    sample = Encoder(encoder, domains["movies"].test, 16)
    ideal = compare.updates(model)
    assert compare.logit_gap(compare.dense_model(encoder, ideal, 0), model, sample) < 1e-12
    assert compare.logit_gap(compare.dense_model(encoder, ideal, 0), other, sample) > 1e-4


def test_weighted_sum_and_relative_error():
    torch.manual_seed(0)
    parts = [{"a": torch.randn(7, 5).double(), "classifier.weight": torch.randn(2, 5).double()} for _ in range(3)]
    ideal = compare.weighted_sum(parts, [1, 2, 5])
    for name in ideal:
        assert torch.allclose(
            ideal[name], sum(w / 8 * p[name] for w, p in zip((1, 2, 5), parts, strict=True)), rtol=1e-14
        )
    assert compare.relative_error(ideal, ideal) == 0
    scaled = {"a": 1.25 * ideal["a"], "classifier.weight": torch.zeros(2, 5)}
    assert compare.relative_error(ideal, scaled) == pytest.approx(0.25, rel=1e-12)


def test_size_counts_factors_only(problem):
    folder, _, _ = problem
    assert compare.size(folder / "tweets") == (4 * 3, 4 * 3 * (20 + 20) * 4)
