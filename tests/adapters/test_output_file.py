"""An output that is one file: complete or not at all, never in place of a stranger, its report never another's."""

import json
import os

import pytest
import torch
from kohya_files import distance, kohya_file, tensors, updates
from safetensors.torch import load_file

from fedlora_kernels.adapters import folder as folder_module
from fedlora_kernels.adapters import output_file as output_file_module
from fedlora_kernels.adapters.folder import OutputFolder, check_out
from fedlora_kernels.adapters.output_file import report_beside
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.errors import InputError, OutputOverflowError, RunError

OURS = {"schema": 1, "tool": {"name": "fedlora_kernels", "version": "0"}}


def made(out, report=OURS, overwrite=False, seed=0):
    """Write an output file with its report."""
    with OutputFolder(out, overwrite) as folder:
        kohya_file(folder.path / "adapter_model.safetensors", seed=seed)
        (folder.path / "report.json").write_text(json.dumps(report))
        folder.commit()


def test_a_file_and_its_report_appear_together_and_nothing_else(tmp_path):
    out = tmp_path / "out.safetensors"
    made(out)
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "out.safetensors.report.json"]
    assert json.loads(report_beside(out).read_text()) == OURS


def test_an_existing_file_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out.safetensors"
    made(out)
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"out.safetensors exists; replace it with overwrite"):
        made(out, seed=1)
    assert out.read_bytes() == before
    made(out, {**OURS, "round": 1}, overwrite=True, seed=1)
    assert out.read_bytes() != before
    assert json.loads(report_beside(out).read_text())["round"] == 1


@pytest.mark.parametrize("content", [b"", b"text", b"\2\0\0\0\0\0\0\0{}", bytes(100)])
def test_a_file_that_is_no_lora_is_never_replaced(tmp_path, content):
    out = tmp_path / "out.safetensors"
    out.write_bytes(content)
    with pytest.raises(InputError, match="is no LoRA file; name another one"):
        check_out(out, overwrite=True)
    assert out.read_bytes() == content


def test_a_model_is_never_replaced(tmp_path):
    out = kohya_file(tmp_path / "model.safetensors", {"lm_head.weight": torch.ones(2, 3)})
    with pytest.raises(InputError, match="is no LoRA file"):
        check_out(out, overwrite=True)


@pytest.mark.parametrize("report", ["{}", "text", "[1]", '{"tool": {"name": "other"}}', "[" * 100_000])
def test_a_report_that_is_not_ours_is_never_replaced(tmp_path, report):
    out = tmp_path / "out.safetensors"
    report_beside(out).write_text(report)
    with pytest.raises(InputError, match=r"report.json was not written here"):
        check_out(out, overwrite=True)


def test_a_report_without_its_file_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out.safetensors"
    report_beside(out).write_text(json.dumps(OURS))
    with pytest.raises(InputError, match=r"report.json exists"):
        check_out(out)
    made(out, overwrite=True)


def test_links_pipes_and_missing_folders_are_refused(tmp_path):
    kohya_file(tmp_path / "a.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "a.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="symbolic link"):
        check_out(tmp_path / "link.safetensors", overwrite=True)
    with pytest.raises(InputError, match="is no LoRA file"):
        check_out(tmp_path / "pipe.safetensors", overwrite=True)
    with pytest.raises(InputError, match="does not exist"):
        check_out(tmp_path / "none" / "a.safetensors")


def test_a_folder_of_that_name_stays_a_folder(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with OutputFolder(tmp_path / "x.safetensors", overwrite=True) as folder:
        (folder.path / "report.json").write_text("{}")
        folder.commit()
    assert os.listdir(tmp_path / "x.safetensors") == ["report.json"]


def test_what_one_file_cannot_hold_is_refused_and_the_old_one_stays(tmp_path):
    out = tmp_path / "out.safetensors"
    made(out)
    before = out.read_bytes()
    with OutputFolder(out, True) as folder:
        kohya_file(folder.path / "adapter_model.safetensors", seed=1)
        (folder.path / "adapter_config.json").write_text("{}")
        with pytest.raises(InputError, match=r"one file cannot hold 'adapter_config\.json'"):
            folder.commit()
    assert out.read_bytes() == before
    assert report_beside(out).exists()
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failure_on_the_way_leaves_the_old_file_or_the_new_one_whole(tmp_path, monkeypatch, failing):
    out = tmp_path / "out.safetensors"
    made(out)
    before = out.read_bytes()
    real = getattr(os, failing)
    calls = []

    def once(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    monkeypatch.setattr(folder_module.os, failing, once)
    with pytest.raises(RunError, match="cannot be written: No space left"):
        made(out, overwrite=True, seed=1)
    monkeypatch.undo()
    assert out.read_bytes() == before
    assert not report_beside(out).exists() or json.loads(report_beside(out).read_text()) == OURS
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("works", "report"), [(0, False), (1, False), (2, True)])
def test_a_report_is_never_beside_another_file_than_its_own(tmp_path, monkeypatch, works, report):
    out = tmp_path / "out.safetensors"
    made(out)
    before, real, calls = out.read_bytes(), os.replace, []

    def few(*args):
        calls.append(args)
        if len(calls) > works:
            raise OSError(5, "Input/output error")
        real(*args)

    monkeypatch.setattr(output_file_module.os, "replace", few)
    if works < 2:
        with pytest.raises(RunError, match="Input/output error"):
            made(out, overwrite=True, seed=1)
    else:
        made(out, overwrite=True, seed=1)
    assert (out.read_bytes() == before) == (works == 0)
    assert report_beside(out).exists() == report


def test_saving_a_kohya_adapter_bakes_the_scale_and_keeps_the_metadata(tmp_path):
    path = kohya_file(tmp_path / "a.safetensors", alpha=0.7, metadata={"ss_seed": "7", "ss_training_comment": "cats"})
    adapter = open_adapter(path)
    adapter.save(tmp_path / "b.safetensors")
    assert distance(updates(tmp_path / "b.safetensors"), updates(path)) < 1e-6
    again = open_adapter(tmp_path / "b.safetensors")
    assert {module.scale for module in again.modules.values()} == {1.0}
    assert again.metadata["ss_seed"] == "7"
    assert again.metadata["ss_training_comment"].endswith("; cats")
    with pytest.raises(InputError, match="exists"):
        adapter.save(tmp_path / "b.safetensors")
    adapter.save(tmp_path / "b.safetensors", overwrite=True)
    with pytest.raises(InputError, match=r"a kohya file; name one that ends in .safetensors"):
        adapter.save(tmp_path / "b")


def test_saving_keeps_the_dtype_where_all_scales_are_one(tmp_path):
    made_here = tensors(alpha=None, dtype=torch.bfloat16)
    open_adapter(made_here).save(tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in made_here.items())


def test_a_scale_that_leaves_the_dtype_is_an_overflow_and_leaves_nothing(tmp_path):
    big = {**tensors({"lora_unet_x": (3, 5)}), "lora_unet_x.alpha": torch.tensor(3e38)}
    big["lora_unet_x.lora_up.weight"] *= 1e3
    with pytest.raises(OutputOverflowError, match="lora_unet_x"):
        open_adapter(big).save(tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_peft_adapter_is_no_file(tmp_path):
    from adapter_files import one

    with pytest.raises(InputError, match=r"a PEFT folder; name one without .safetensors"):
        open_adapter(one()).save(tmp_path / "b.safetensors")
