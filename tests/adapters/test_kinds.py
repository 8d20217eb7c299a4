"""Kinds of layers as they are read: modules, extra tensors, and what is refused."""

import pytest
import torch
from kind_problems import NAMES, PREFIX, client, tensors

from fedlora_kernels import ReadOptions, aggregate
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import FormatError, MismatchError, UnsupportedVariantError

TOKENS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"


def changed(pair, part, change):
    """A copy of a client with ``change(tensor)`` in place of each tensor whose key holds ``part``; None takes it out."""
    state, config = pair
    made = {key: change(tensor) if part in key else tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in made.items() if tensor is not None}, config


def test_every_kind_has_its_matrices():
    state, config = client(rank=3)
    adapter = open_adapter((state, config))
    assert list(adapter) == NAMES
    for name, spec in adapter.modules.items():
        pair = adapter[name]
        assert pair.B.shape == (spec.m, 3)
        assert pair.A.shape == (3, spec.n)
    assert torch.equal(adapter["conv3d"].A, state[f"{PREFIX}conv3d.lora_A.weight"].reshape(3, 24))
    assert torch.equal(adapter["model.embed_tokens"].A, state[f"{PREFIX}model.embed_tokens.lora_embedding_A"])
    assert adapter["conv1d"].A.data_ptr() == state[f"{PREFIX}conv1d.lora_A.weight"].data_ptr()


def test_what_is_written_has_the_keys_and_shapes_of_what_was_read(tmp_path):
    state, config = client()
    open_adapter((state, config)).save(tmp_path / "out")
    found = tensors(open_adapter(tmp_path / "out"))
    assert {key: x.shape for key, x in found.items()} == {key: x.shape for key, x in state.items()}


@pytest.mark.parametrize("part", ["lm_head.lora_A", "lm_head.lora_B"])
def test_a_head_that_is_not_its_embeddings_transpose_is_refused(part):
    with pytest.raises(
        FormatError,
        match=f"client 'c', module 'lm_head': '.*{part}.weight' is not the transpose of .*ensure_weight_tying",
    ):
        open_adapter(changed(client(), part, lambda x: x * 1.01), name="c")


def test_a_tied_head_of_another_scale_is_refused():
    with pytest.raises(
        FormatError, match=r"module 'lm_head': scale 3, but 1.66667 in 'model.embed_tokens'.*one scale needed"
    ):
        open_adapter(client(alpha_pattern={"lm_head": 9}))


def test_a_head_is_a_module_of_its_own_where_nothing_ties_it():
    assert "lm_head" in open_adapter(client(ensure_weight_tying=False))
    named = changed(client(target_modules=["embed_tokens", "lm_head"]), "lm_head.lora_A", torch.neg)
    assert "lm_head" in open_adapter(named)


def test_a_head_that_is_tied_and_a_layer_of_its_own_is_refused():
    """PEFT would tie it on loading, and the sums of both would overwrite each other."""
    with pytest.raises(
        FormatError, match=r"client 'c', module 'lm_head': holds the transposes of 'model.embed_tokens'"
    ):
        open_adapter(client(target_modules=["embed_tokens", "lm_head"]), name="c")


def test_tied_and_untied_clients_do_not_mix():
    with pytest.raises(MismatchError, match="client 'client_1', configuration: ensure_weight_tying is"):
        aggregate([client(0), client(1, ensure_weight_tying=False)])


def test_nested_layers_that_are_no_attention_are_refused():
    state, config = changed(client(), "attn.lora_", lambda x: None)
    with pytest.raises(
        UnsupportedVariantError, match=r"client 'c': adapter uses nested base layers \(.*attn.base_layer.out_proj"
    ):
        open_adapter((state, config), name="c")


@pytest.mark.parametrize(
    ("key", "error", "text"),
    [
        ("e.lora_embedding_A.weight", UnsupportedVariantError, "lora_embedding_A has no .weight"),
        ("e.lora_embedding_A.x.y", UnsupportedVariantError, "lora_embedding_A has no .weight"),
        ("e.lora_embedding_C", UnsupportedVariantError, "unknown tensor"),
        ("e.lora_embedding_A", FormatError, "module 'e': lora_A without lora_B"),
        ("layers.0.q_proj.lora_embedding_A", FormatError, "are ambiguous"),
    ],
)
def test_other_keys_of_embeddings_are_refused(key, error, text):
    state, config = client()
    with pytest.raises(error, match=text):
        open_adapter(({**state, key: torch.ones(3, 4)}, config))


def test_factors_of_two_kinds_are_no_pair():
    state, config = client()
    state = {key: x for key, x in state.items() if "q_proj" not in key}
    mixed = {"q_proj.lora_A.weight": torch.ones(3, 10), "q_proj.lora_embedding_B": torch.ones(7, 3)}
    with pytest.raises(
        FormatError,
        match=r"module 'q_proj': 'q_proj.lora_A.weight' beside 'q_proj.lora_embedding_B'; two factors of one kind",
    ):
        open_adapter(({**state, **mixed}, config))


def test_embeddings_of_other_vocabularies_are_refused_with_both_sizes():
    def longer(state, config):
        made = {key: torch.cat([x, x[:, :1]], 1) if "lora_embedding_A" in key else x for key, x in state.items()}
        made[f"{PREFIX}lm_head.lora_B.weight"] = made[f"{PREFIX}model.embed_tokens.lora_embedding_A"].t()
        return made, config

    with pytest.raises(
        MismatchError,
        match=r"client 'client_1', module 'model.embed_tokens': embedding 6 x 18, .* but embedding 6 x 17, ",
    ):
        aggregate([client(0), longer(*client(1))])


def tokens(seed, rows=3, **fields):
    state, config = client(seed, **{"trainable_token_indices": [5, 1, 7], **fields})
    return {**state, TOKENS: torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))}, config


def test_token_rows_are_values_and_have_a_weighted_mean(tmp_path):
    pairs = [tokens(0), tokens(1)]
    result = aggregate(pairs, weights=[3.0, 1.0], out=tmp_path / "out")
    name = TOKENS.removeprefix(PREFIX)
    wanted = 0.75 * pairs[0][0][TOKENS] + 0.25 * pairs[1][0][TOKENS]
    assert torch.allclose(result.adapter.extra(name), wanted, atol=1e-6)
    assert result.adapter.config["trainable_token_indices"] == [5, 1, 7]


def test_token_rows_of_a_live_model_have_its_adapters_name():
    state, config = tokens(0)
    live = {f"{key}.default" if key == TOKENS else key: x for key, x in state.items()}
    assert list(open_adapter((live, config)).extras) == [TOKENS.removeprefix(PREFIX)]


@pytest.mark.parametrize(
    ("indices", "error", "text"),
    [
        (
            [5, 1],
            FormatError,
            r"trainable_tokens_delta \(3, 6\), but trainable_token_indices names 2 tokens; a row for each",
        ),
        ({"embed_tokens": [5, 1, 7, 8]}, FormatError, "names 4 tokens"),
        ({"lm_head": [5, 1, 7]}, FormatError, "unknown tensor .*trainable_tokens_delta"),
        (None, FormatError, "unknown tensor .*trainable_tokens_delta"),
        ([5, -1, 7], FormatError, "trainable_token_indices is .*; a list of token numbers"),
        ({"embed_tokens": 3}, FormatError, "a list of token numbers"),
        (3, FormatError, "a list of token numbers"),
    ],
)
def test_token_rows_without_their_indices_are_refused(indices, error, text):
    with pytest.raises(error, match=text):
        open_adapter(tokens(0, trainable_token_indices=indices))


def test_token_rows_of_other_tokens_are_refused():
    with pytest.raises(
        MismatchError,
        match=r"client 'client_1', configuration: trainable_token_indices is \[5, 7, 1\] but \[5, 1, 7\] in client",
    ):
        aggregate([tokens(0), tokens(1, trainable_token_indices=[5, 7, 1])])


def test_embeddings_saved_along_have_a_weighted_mean():
    def with_base(seed):
        state, config = client(seed)
        made = torch.Generator().manual_seed(seed)
        base = {
            f"{PREFIX}{name}.base_layer.weight": torch.randn(17, 6, generator=made)
            for name in ("model.embed_tokens", "lm_head")
        }
        return {**state, **base}, config

    pairs = [with_base(0), with_base(1)]
    adapter = aggregate(pairs, weights=[3.0, 1.0]).adapter
    for name in ("model.embed_tokens", "lm_head"):
        key = f"{PREFIX}{name}.base_layer.weight"
        wanted = 0.75 * pairs[0][0][key] + 0.25 * pairs[1][0][key]
        assert torch.allclose(adapter.extra(f"{name}.base_layer.weight"), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "transformer.wte", "gpt_neox.embed_in", "shared"])
def test_embeddings_of_a_larger_vocabulary_are_saved_whole(name):
    state, config = client(ensure_weight_tying=False, target_modules=["q_proj"])
    state = {key: x for key, x in state.items() if "q_proj" in key}
    pairs = [({**state, f"{PREFIX}{name}.weight": torch.full((19, 6), value)}, config) for value in (1.0, 4.0)]
    adapter = aggregate(pairs, weights=[2.0, 1.0]).adapter
    assert torch.equal(adapter.extra(f"{name}.weight"), torch.full((19, 6), 2.0))
    with pytest.raises(FormatError, match="unknown tensor"):
        open_adapter(({**state, f"{PREFIX}model.norm.weight": torch.ones(6)}, config))


def test_embeddings_of_any_name_are_saved_along():
    state = {
        "wte.lora_embedding_A": torch.ones(2, 9),
        "wte.lora_embedding_B": torch.ones(4, 2),
        "wte.base_layer.weight": torch.ones(9, 4),
    }
    adapter = open_adapter((state, {"peft_type": "LORA", "r": 2}))
    assert adapter.extras["wte.base_layer.weight"].module == "wte"


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_attention_are_values(bias):
    state, config = client(bias=bias)
    state[f"{PREFIX}attn.base_layer.out_proj.base_layer.bias"] = torch.ones(11)
    adapter = open_adapter((state, config))
    assert adapter.extras["attn.base_layer.out_proj.base_layer.bias"].module == "attn.base_layer.out_proj"
    state[f"{PREFIX}attn.base_layer.in_proj_bias"] = torch.ones(33)
    if bias == "all":
        assert "attn.base_layer.in_proj_bias" in open_adapter((state, config)).extras
    else:
        with pytest.raises(FormatError, match=r"unknown tensor '.*in_proj_bias'"):
            open_adapter((state, config))


@pytest.mark.parametrize("field", ["layer_replication", "fan_in_fan_out", "lora_bias", "bias", "target_parameters"])
def test_fields_that_change_the_meaning_must_agree(field):
    values = {"layer_replication": [[0, 1], [0, 2]], "bias": "all", "target_parameters": []}
    other = client(1, **{field: values.get(field, True)})
    if field == "target_parameters":
        assert len(aggregate([client(0), other]).adapter) == len(NAMES)  # an empty list says nothing
        return
    with pytest.raises(MismatchError, match=f"client 'client_1', configuration: {field} is"):
        aggregate([client(0), other])


def test_the_rank_of_attention_is_looked_up_under_its_own_name():
    state, config = client(rank=3, rank_pattern={"attn": 3, "out_proj": 9}, alpha_pattern={"attn": 6})
    adapter = open_adapter((state, config))
    assert adapter.modules["attn"].scale == adapter.modules["attn.base_layer.out_proj"].scale == 2.0
    with pytest.raises(FormatError, match="module 'attn': the configuration says rank 4, the tensors have 3"):
        open_adapter((state, {**config, "rank_pattern": {"attn": 4}}))
    loose = open_adapter((state, {**config, "rank_pattern": {"attn": 4}}), ReadOptions(rank_from="tensor"))
    assert any("module 'attn' and 1 more: the configuration says rank 4" in text for text in loose.warnings)
