"""Modules that some clients lack, and tensors that are no factors."""

import pytest
import torch
from adapter_problems import FIRST, PREFIX, client, clients, distance, poison, products, updates, weighted, without

from fedlora_kernels.adapters.options import ReadOptions, WriteOptions
from fedlora_kernels.aggregate import aggregate
from fedlora_kernels.errors import InputError, MismatchError, NonFiniteError, WeightError
from fedlora_kernels.linalg.rules import Energy

ALL = Energy(1.0)
HEAD = "classifier.weight"
BIAS = f"{FIRST}.lora_B.bias"


def lacking():
    pairs = clients()
    return [pairs[0], without(pairs[1], FIRST), pairs[2]], pairs


def test_a_missing_module_is_an_error():
    with pytest.raises(MismatchError, match=r"client 'client_1', module '.*q_proj': missing here"):
        aggregate(lacking()[0])


@pytest.mark.filterwarnings("ignore:method 'hetlora' uses no weights")
@pytest.mark.parametrize("method", ["florist", "flora", "zero_pad", "hetlora"])
def test_missing_zero_counts_the_client_with_no_update(method):
    sources, pairs = lacking()
    result = aggregate(sources, method, weights=[1, 2, 3], read=ReadOptions(missing="zero"), **options(method))
    found = products(result.adapter)
    if method in ("florist", "flora"):
        wanted = weighted(pairs, [1, 2, 3])
        wanted[FIRST] = sum(w / 6 * updates(pairs[k])[FIRST] for k, w in ((0, 1), (2, 3)))
        assert distance(found, wanted) < 1e-6
    row = next(row for row in result.report["modules"] if row["name"] == FIRST)
    assert row["ranks"] == [4, 0, 5]


def options(method):
    return {"rule": ALL} if method == "florist" else {}


def test_missing_renormalize_is_the_mean_over_the_owners():
    sources, pairs = lacking()
    result = aggregate(sources, rule=ALL, weights=[1, 2, 3], read=ReadOptions(missing="renormalize"))
    wanted = weighted(pairs, [1, 2, 3])
    wanted[FIRST] = sum(w / 4 * updates(pairs[k])[FIRST] for k, w in ((0, 1), (2, 3)))
    assert distance(products(result.adapter), wanted) < 1e-6
    assert result.report["notes"] == [
        f"modules that some clients lack (1, '{FIRST}' first) are the means over their owners"
    ]


def test_renormalize_keeps_the_sum_of_free_weights():
    sources, pairs = lacking()
    read = ReadOptions(missing="renormalize")
    result = aggregate(sources, rule=ALL, weights=[1.0, 0.5, 2.0], normalize=False, read=read)
    wanted = sum(w * 3.5 / 3.0 * updates(pairs[k])[FIRST] for k, w in ((0, 1.0), (2, 2.0)))
    assert distance({FIRST: products(result.adapter)[FIRST]}, {FIRST: wanted}) < 1e-6
    with pytest.raises(WeightError, match="owners sum to 0"):
        aggregate(sources, weights=[1.0, 0.5, -1.0], normalize=False, read=read)


def test_a_module_of_the_first_client_keeps_its_place():
    sources, _ = lacking()
    result = aggregate(sources[::-1], read=ReadOptions(missing="zero"))
    assert list(result.adapter) == list(updates(sources[2]))


def with_extra(pair, key, value, **settings):
    return {**pair[0], f"{PREFIX}{key}": value}, {**pair[1], **settings}


def heads(count=3, dtype=torch.float32, **settings):
    made = torch.Generator().manual_seed(3)
    values = [torch.randn(5, 7, generator=made, dtype=torch.float64).to(dtype) for _ in range(count)]
    settings.setdefault("modules_to_save", ["classifier"])
    return [with_extra(pair, HEAD, value, **settings) for pair, value in zip(clients(), values, strict=False)], values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_to_save_are_averaged(dtype, tmp_path):
    sources, values = heads(dtype=dtype)
    result = aggregate(sources, weights=[1, 2, 3], out=tmp_path / "out")
    wanted = sum(w / 6 * value.double() for w, value in zip((1, 2, 3), values, strict=True))
    found = result.adapter.extra(HEAD)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
    assert result.adapter.config["modules_to_save"] == ["classifier"]
    assert result.report["extras"] == [{"name": HEAD, "rule": "mean", "shape": [5, 7]}]


def test_modules_to_save_of_one_client_only():
    sources, values = heads()
    sources[1] = clients()[1]
    with pytest.raises(MismatchError, match="client_1"):
        aggregate(sources)
    owners = aggregate(sources, weights=[1, 2, 3], read=ReadOptions(extras="owners"))
    torch.testing.assert_close(owners.adapter.extra(HEAD), (values[0] + 3 * values[2]) / 4)
    first = aggregate(sources, weights=[1, 2, 3], read=ReadOptions(extras="first"))
    assert torch.equal(first.adapter.extra(HEAD), values[0])
    assert first.report["extras"][0]["rule"] == "first"


def test_weights_that_do_not_sum_to_one_cannot_average_values():
    sources, values = heads()
    with pytest.raises(InputError, match=r"classifier.weight.*sum to 1\.5.*extras='first'"):
        aggregate(sources, weights=[1.0, 1.0, -0.5], normalize=False)
    kept = aggregate(sources, weights=[1.0, 1.0, -0.5], normalize=False, read=ReadOptions(extras="first"))
    assert torch.equal(kept.adapter.extra(HEAD), values[0])


def test_heads_of_different_sizes_are_refused():
    sources, _ = heads()
    sources[2] = with_extra(clients()[2], HEAD, torch.zeros(6, 7), modules_to_save=["classifier"])
    with pytest.raises(MismatchError, match="client_2"):
        aggregate(sources)


def biased(scale_alpha=8):
    pairs = [client(k, rank=4, alpha=scale_alpha * (k + 1), lora_bias=True) for k in range(3)]
    made = torch.Generator().manual_seed(4)
    values = [torch.randn(37, generator=made) for _ in pairs]
    return [with_extra(pair, BIAS, value) for pair, value in zip(pairs, values, strict=True)], values


def test_lora_bias_is_a_change_with_the_scale():
    sources, values = biased()
    result = aggregate(sources, weights=[1, 2, 3])
    wanted = sum(w / 6 * s * v.double() for w, s, v in zip((1, 2, 3), (2.0, 4.0, 6.0), values, strict=True))
    torch.testing.assert_close(result.adapter.extra(BIAS).double(), wanted, rtol=1e-6, atol=1e-6)
    assert result.adapter.config["lora_bias"] is True
    assert result.report["extras"][0]["rule"] == "sum"


def test_lora_bias_takes_weights_of_any_sum():
    sources, values = biased()
    result = aggregate(sources, weights=[1, 1, 1], normalize=False)
    wanted = sum(s * v.double() for s, v in zip((2.0, 4.0, 6.0), values, strict=True))
    torch.testing.assert_close(result.adapter.extra(BIAS).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("missing", "share"), [("zero", 6.0), ("renormalize", 4.0)])
def test_lora_bias_of_a_missing_module_follows_the_module(missing, share):
    sources, values = biased()
    sources[1] = without(sources[1], FIRST)
    result = aggregate(sources, weights=[1, 2, 3], read=ReadOptions(missing=missing))
    wanted = sum(w / share * s * v.double() for w, s, v in zip((1, 0, 3), (2.0, 4.0, 6.0), values, strict=True))
    torch.testing.assert_close(result.adapter.extra(BIAS).double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_bias_is_clipped_with_its_client():
    from fedlora_kernels.adapters.policy import Policy

    sources, values = biased()
    result = aggregate(sources, policy=Policy("clip", max_update_norm=100.0))
    factors = [row["factor"] for row in result.report["clients"]]
    assert min(factors) < 1.0
    wanted = sum(f * s / 3 * v.double() for f, s, v in zip(factors, (2.0, 4.0, 6.0), values, strict=True))
    torch.testing.assert_close(result.adapter.extra(BIAS).double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_bad_extra_is_named_or_drops_its_client(tmp_path):
    sources, values = heads()
    state = sources[1][0]
    state[f"{PREFIX}{HEAD}"] = poison(float("inf"), (2, 3))(values[1].clone())
    with pytest.raises(NonFiniteError, match=r"client 'client_1', tensor 'classifier.weight': inf at index \(2, 3\)"):
        aggregate(sources, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(UserWarning, match="client 'client_1' was dropped"):
        result = aggregate(sources, policy="drop")
    torch.testing.assert_close(result.adapter.extra(HEAD), (values[0] + values[2]) / 2)


def test_target_vllm_takes_no_extras():
    with pytest.raises(InputError, match="vllm"):
        aggregate(heads()[0], write=WriteOptions(target="vllm"))


def test_weight_zero_owns_no_extra():
    sources, values = heads()
    result = aggregate(sources, weights=[0, 1, 1], read=ReadOptions(extras="first"))
    assert torch.equal(result.adapter.extra(HEAD), values[1])
