"""validate_clients: every misfit is found by headers alone, named, and reported together."""

import pytest
import torch
from adapter_files import config, folder, one, state

from fedlora_kernels.adapters.policy import Limits
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.adapters.validation import failure_text, validate_clients
from fedlora_kernels.errors import InputError, LimitError, MismatchError

SHAPES = {"l.0.q": (11, 7, 2), "l.0.v": (5, 13, 2)}


def client(shapes=None, more=None, **fields):
    tensors = state(shapes or SHAPES) | {key: torch.ones(shape) for key, shape in (more or {}).items()}
    ranks = {name: r for name, (_, _, r) in (shapes or SHAPES).items()}
    return open_adapter((tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": ranks, **fields}))


def check(*adapters, **options):
    return validate_clients({f"c{i}": adapter for i, adapter in enumerate(adapters)}, **options)


def texts(found):
    return [(failure.client, str(failure)) for failure in found.failures]


def test_clients_that_fit_have_no_failures():
    mixed = client({"l.0.v": (5, 13, 4), "l.0.q": (11, 7, 1)}, use_rslora=True)
    found = check(client(), mixed, client(SHAPES, lora_alpha=9))
    assert found.failures == ()
    assert list(found.modules) == ["l.0.q", "l.0.v"]


def test_no_clients_is_an_error():
    with pytest.raises(InputError, match="no clients"):
        validate_clients({})


def test_a_rank_one_client_beside_rank_eight_is_accepted():
    assert check(client({"q": (11, 7, 8)}), client({"q": (11, 7, 1)})).failures == ()


def test_a_shape_that_differs_from_most_is_named_with_both_shapes_and_clients():
    odd = client({"l.0.q": (11, 8, 2), "l.0.v": (5, 13, 2)})
    for order, who, holder in (((odd, client(), client()), "c0", "c1"), ((client(), client(), odd), "c2", "c0")):
        ((name, text),) = texts(check(*order))
        assert name == who
        assert text == (f"client '{who}', module 'l.0.q': 11 x 8 but 11 x 7 in client '{holder}'; equal shapes needed")


def test_a_missing_module_fails_the_client_that_lacks_it():
    less = client({"l.0.q": (11, 7, 2)})
    found = check(client(), less, client())
    assert [failure.client for failure in found.failures] == ["c1"]
    assert "client 'c1', module 'l.0.v': missing here, present in most clients" in str(found.failures[0])
    assert found.failures[0].error is MismatchError
    assert "missing='renormalize'" in str(found.failures[0])
    assert [failure.client for failure in check(less, client(), less).failures] == ["c1"]
    assert "present here, missing in most" in str(check(less, client(), less).failures[0])


@pytest.mark.parametrize("missing", ["renormalize", "zero"])
def test_with_missing_allowed_modules_are_the_union_in_order_of_first_appearance(missing):
    found = check(client({"b": (5, 3, 1), "a": (7, 2, 1)}), client({"c": (5, 3, 1), "a": (7, 2, 1)}), missing=missing)
    assert found.failures == ()
    assert list(found.modules) == ["b", "a", "c"]


@pytest.mark.parametrize("missing", ["error", "renormalize"])
def test_disjoint_module_sets_show_one_name_of_each_side(missing):
    odd = client({"x.l.0.q": (11, 7, 2)})
    found = check(client(), odd, client(), missing=missing)
    ((who, text),) = texts(found)
    assert who == "c1"
    assert "no module in common with client 'c0': 'x.l.0.q' here, 'l.0.q' there" in text
    assert check(client(), odd, missing=missing).failures != ()
    assert [f.client for f in check(odd, client(), client(), missing=missing).failures] == ["c0"]


def test_two_camps_without_a_common_module_do_not_mix():
    ours, theirs = client({"a": (5, 3, 1), "b": (5, 3, 1)}), client({"x.b": (5, 3, 1), "x.c": (5, 3, 1)})
    bridge, other_bridge = client({"b": (5, 3, 1), "d": (5, 3, 1)}), client({"x.c": (5, 3, 1)})
    assert list(check(theirs, ours, bridge, other_bridge, missing="zero").failed) == ["c1", "c2"]
    assert list(check(ours, theirs, bridge, client({"d": (5, 3, 1)}), missing="renormalize").failed) == ["c1"]


@pytest.mark.parametrize(
    "fields", [{"fan_in_fan_out": True}, {"bias": "all"}, {"lora_bias": True}, {"layer_replication": [[0, 2]]}]
)
def test_configurations_that_must_agree_are_compared(fields):
    ((who, text),) = texts(check(client(), client(**fields), client()))
    assert who == "c1"
    assert f"client 'c1', configuration: {next(iter(fields))} is" in text


def test_configurations_that_only_choose_modules_may_differ():
    found = check(
        client(target_modules=["q", "v"], modules_to_save=None, bias="none"),
        client(target_modules="all-linear", modules_to_save=[], layers_to_transform=[0], exclude_modules=["k"]),
    )
    assert found.failures == ()


def test_extra_tensors_strict():
    with_score = client(more={"score.weight": (3, 5)}, modules_to_save=["score"])
    without = client(modules_to_save=["score"])
    assert list(check(with_score, with_score).extras) == ["score.weight"]
    ((who, text),) = texts(check(with_score, without, with_score))
    assert (who, "tensor 'score.weight': missing here" in text) == ("c1", True)
    ((who, text),) = texts(check(without, with_score, without))
    assert (who, "tensor 'score.weight': present here" in text) == ("c1", True)


def test_extra_tensors_by_other_rules():
    with_score = client(more={"score.weight": (3, 5)}, modules_to_save=["score"])
    without = client(modules_to_save=["score"])
    owners = check(without, with_score, extras="owners")
    assert (owners.failures, list(owners.extras)) == ((), ["score.weight"])
    ignored = check(without, with_score, extras="ignore")
    assert (ignored.failures, dict(ignored.extras)) == ((), {})
    assert "tensor 'score.weight' is missing in client 'c0' and was dropped" in ignored.warnings[0]
    assert dict(check(without, with_score, extras="first").extras) == {}
    assert list(check(with_score, without, extras="first").extras) == ["score.weight"]


def test_vocabulary_sizes_that_differ_are_both_named():
    sizes = [client(more={"lm_head.weight": (size, 5)}) for size in (97, 97, 101)]
    ((who, text),) = texts(check(*sizes))
    assert who == "c2"
    assert "shape (101, 5) but (97, 5) in client 'c0'" in text


def test_a_bias_of_a_module_that_may_be_missing_is_not_asked_for():
    tensors, settings = one("a", lora_bias=True)
    tensors["a.lora_B.bias"] = torch.ones(5)
    both = state({"a": (5, 7, 2), "b": (3, 7, 2)}) | {"a.lora_B.bias": torch.ones(5), "b.lora_B.bias": torch.ones(3)}
    found = check(open_adapter((tensors, settings)), open_adapter((both, settings)), missing="zero")
    assert (found.failures, sorted(found.extras)) == ((), ["a.lora_B.bias", "b.lora_B.bias"])


def test_all_failures_come_together_in_at_most_twenty_lines():
    good = {f"l.{i}": (5, 7, 2) for i in range(30)}
    bad = {f"l.{i}": (5, 8, 2) for i in range(30)}
    found = check(client(good), client(good), client(bad))
    assert len(found.failures) == 30
    assert list(found.failed) == ["c2"]
    lines = failure_text(found.failures).splitlines()
    assert len(lines) == 20
    assert lines[-1] == "... and 11 more"


def test_failures_of_several_clients_stand_in_the_callers_order():
    found = check(client(bias="all"), client(), client({"l.0.q": (11, 7, 2)}), client())
    assert list(found.failed) == ["c0", "c2"]


@pytest.mark.parametrize("cap", ["rank_per_client", "bytes_per_client", "name_length"])
def test_caps_on_one_client_are_its_failures(cap):
    big = client({"a.very.long.name.q": (11, 7, 6)})
    limits = Limits(**{"rank_per_client": 5} if cap == "rank_per_client" else {cap: 10})
    found = check(big, limits=limits)
    assert found.failures[0].error is LimitError
    assert f"ReadOptions(limits=Limits({cap}=" in found.failures[0].text
    assert cap.replace("_", " ") in found.failures[0].text


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(clients=2), r"clients is 3; at most 2. Raise it with ReadOptions\(limits=Limits\(clients=3\)\)"),
        (Limits(bytes_total=100), "bytes total is"),
        (Limits(stacked_rank=5), "module 'l.0.q': stacked rank is 6; at most 5"),
        (Limits(output_elements=60), "module 'l.0.q': output elements is 66; at most 60"),
    ],
)
def test_caps_on_all_clients_together_stop(limits, text):
    with pytest.raises(LimitError, match=text):
        check(client(), client(), client(), limits=limits)


def test_limits_are_checked():
    for bad in (0, -1, 1.5, True, "8"):
        with pytest.raises(InputError, match=r"stacked_rank is .*; an integer of at least 1 needed"):
            Limits(stacked_rank=bad)


def test_the_same_folder_twice_and_other_bases_are_warnings(tmp_path):
    path = folder(tmp_path / "c")
    twice = validate_clients({"a": open_adapter(path), "b": open_adapter(path)})
    assert twice.failures == ()
    assert twice.warnings == ("clients 'a' and 'b' are the same adapter; it counts twice",)
    bases = check(client(base_model_name_or_path="x/1"), client(), client(base_model_name_or_path="x/2"))
    assert bases.failures == ()
    assert "base_model_name_or_path differs: 'x/1' in client 'c0', 'x/2' in client 'c2'" in bases.warnings[0]


def test_names_of_clients_reach_messages_clean():
    found = validate_clients({"a\x1b[2J": client(), "b": client(), "c\n": client(bias="all")})
    assert str(found.failures[0]).startswith("client 'c?', configuration: bias")


def test_config_of_helpers_is_readable():
    assert open_adapter((state(), config())).warnings == ()
