"""Makes and opens hostile inputs by number: ``fuzz_inputs.py FIRST COUNT FOLDER SECONDS BYTES``.

Prints one line of JSON for each that goes wrong, and one that counts how they ended.
"""

import copy
import json
import random
import resource
import shutil
import struct
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import torch

from fedlora_kernels.adapters.options import ReadOptions
from fedlora_kernels.adapters.reader import open_adapter
from fedlora_kernels.engine.state import previous_state
from fedlora_kernels.errors import FedLoRAError

DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
PREFIX = "base_model.model."
NUMBERS = [0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**400)]
ODD = [
    None,
    True,
    False,
    "",
    "x",
    "\ud800",
    "\x00",
    "LORA",
    1e308,
    1e-320,
    -0.0,
    [],
    {},
    [[]],
    {"": 0},
    [1, "2", None],
    *NUMBERS,
]
FIELDS = [
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save", "target_modules",
    "target_parameters", "trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out", "lora_bias", "layer_replication",
    "init_lora_weights", "use_dora", "velora_config", "init_r", "peft_version", "layers_to_transform", "exclude_modules",
]  # fmt: skip
PATTERNS = [
    "(a+)+b", ".*a.*a.*a", "q_proj|v", "^q$", "a" * 300, "[", "(", "\\", "q{1,99999}", "(a|b|c)" * 40, "\\1", "(?R)", ".*", "", "^^",
    "a{,3}", "[^]", "\\N{LATIN SMALL LETTER A}", "\\x4", "a{2,1}", "é", "\ud800", ".*" * 3, "q_proj", "layers.0.q_proj",
]  # fmt: skip
KINDS = ["peft", "adalora", "kohya", "sharded", "experts", "state", "previous", "pickle", "many"]


def tensors_of(rng, kind):
    """Names, dtypes and shapes of a valid adapter, and its configuration."""
    m, n, r = rng.choice([(5, 7, 2), (6, 4, 1), (3, 9, 3)])
    dtype = rng.choice(list(DTYPES))
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    modules = ["layers.0.q_proj", "layers.1.q_proj", "v_proj"]
    entries = {}
    if kind == "kohya":
        for name in ("lora_unet_q", "lora_te_v"):
            entries |= {f"{name}.lora_down.weight": (r, n), f"{name}.lora_up.weight": (m, r), f"{name}.alpha": ()}
        return entries, dtype, None
    if kind == "adalora":
        config |= {"peft_type": "ADALORA", "init_r": 4, "rank_pattern": {f"{modules[0]}.lora_E": [True] * r}}
        for name in modules:
            entries |= {
                f"{PREFIX}{name}.lora_A": (r, n),
                f"{PREFIX}{name}.lora_B": (m, r),
                f"{PREFIX}{name}.lora_E": (r, 1),
            }
        return entries, dtype, config
    if kind == "many":  # as many modules and patterns as a small file holds
        modules = [f"layers.{i}.{rng.choice('qkvo')}_proj" for i in range(rng.choice([10, 120]))]
        m, n, r = 1, 1, 1
        pieces = ["layers", r"\.", r"\d+", ".*", "(q|k)", "_proj", "[0-9]", "a?", "."]
        keys = [
            "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9))) for _ in range(rng.choice([5, 300, 3000]))
        ]
        config |= {"r": 1, "alpha_pattern": {key: 1 + k for k, key in enumerate(keys)}}
        for name in modules:
            entries |= {f"{PREFIX}{name}.lora_A.weight": (1, 1), f"{PREFIX}{name}.lora_B.weight": (1, 1)}
        return entries, dtype, config
    if kind == "experts":
        config |= {"target_parameters": ["experts.up"], "target_modules": []}
        entries = {f"{PREFIX}mlp.experts.lora_A.weight": (3 * r, n), f"{PREFIX}mlp.experts.lora_B.weight": (m, 3 * r)}
        return entries, dtype, config
    for name in modules:
        entries |= {f"{PREFIX}{name}.lora_A.weight": (r, n), f"{PREFIX}{name}.lora_B.weight": (m, r)}
    if rng.random() < 0.3:
        entries[f"{PREFIX}score.weight"] = (4, n)
        config["modules_to_save"] = ["score"]
    if rng.random() < 0.3:
        entries |= {f"{PREFIX}emb.lora_embedding_A": (r, 11), f"{PREFIX}emb.lora_embedding_B": (m, r)}
        entries |= {f"{PREFIX}conv.lora_A.weight": (r, 2, 3, 3), f"{PREFIX}conv.lora_B.weight": (m, r, 1, 1)}
    if rng.random() < 0.3:
        config["rank_pattern"] = {"v_proj": r}
        config["alpha_pattern"] = {r"layers\.\d+\.q_proj": 3}
    return entries, dtype, config


def mutate_value(rng, value, depth=0):
    """Another value in the place of ``value``: odd, nested, absurd, or a little different."""
    choice = rng.randrange(6)
    if isinstance(value, dict) and value and choice < 4:
        made = dict(value)
        key = rng.choice(list(made))
        if choice == 0:
            made.pop(key)
        elif choice == 1:
            made[rng.choice(PATTERNS)] = made[key]
        else:
            made[key] = mutate_value(rng, made[key], depth + 1)
        return made
    if isinstance(value, list) and value and choice < 4:
        made = list(value)
        at = rng.randrange(len(made))
        made[at] = mutate_value(rng, made[at], depth + 1)
        return made * rng.choice([1, 1, 2, 50])
    if isinstance(value, int) and choice < 2:
        return value + rng.choice([-1, 1, 2, 10**6])
    if choice == 5 and depth < 3:
        for _ in range(rng.choice([1, 5, 40])):
            value = rng.choice([[value], {"a": value}])
        return value
    return copy.deepcopy(rng.choice(ODD))


def mutate_config(rng, config):
    made = dict(config)
    for _ in range(rng.choice([1, 1, 2, 4])):
        field = rng.choice(FIELDS)
        choice = rng.randrange(5)
        if choice == 0 and field in made:
            del made[field]
        elif choice == 1:
            table = {rng.choice(PATTERNS): rng.choice([1, 2, 3, *ODD]) for _ in range(rng.choice([1, 3, 30]))}
            made[rng.choice(["rank_pattern", "alpha_pattern"])] = table
        else:
            made[field] = mutate_value(rng, made.get(field, rng.choice(ODD)))
    return made


def mutate_entries(rng, entries):
    """Keys, shapes and letters that do not fit each other."""
    made = dict(entries)
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(list(made)) if made else "x"
        shape = made.pop(key, (1,))
        choice = rng.randrange(8)
        if choice == 0:
            continue
        if choice == 1:
            shape = (*shape, rng.choice([0, 1, 2]))
        elif choice == 2 and shape:
            at = rng.randrange(len(shape))
            shape = (*shape[:at], rng.choice([0, 1, shape[at] + 1, 64]), *shape[at + 1 :])
        elif choice == 3:
            swap = rng.choice(
                [
                    ("lora_A", "lora_B"),
                    ("lora_", "lora_x"),
                    (".", ".."),
                    ("weight", "default.weight"),
                    ("lora_A", "lora_E"),
                ]
            )
            made[key] = shape
            key = key.replace(*swap)
        elif choice == 4:
            key = key.replace("base_model.model.", rng.choice(["", "model.base_model.model.", "module.", "_orig_mod."]))
        elif choice == 5:
            cut = rng.randrange(len(key) + 1)
            key = (
                key[:cut]
                + rng.choice(["\ud83d\ude00", "\x1b[31m", "\u202e", ".", "/../", "é" * 500, "\x00"])
                + key[cut:]
            )
        elif choice == 6:
            markers = [
                "lora_magnitude_vector",
                "lora_diag",
                "hada_w1_a",
                "lora_mid.weight",
                "dora_scale",
                "trainable_tokens_delta",
                "diff",
            ]
            made[key] = shape
            key = f"q.{rng.choice(markers)}"
        made[key] = shape
    return made


def header_of(rng, entries, dtype, wrong):
    """A header and the data beside it; where ``wrong``, one of its entries lies."""
    header, begin = {}, 0
    for key, shape in entries.items():
        size = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype] if shape else DTYPES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    if wrong and header:
        entry = header[rng.choice(list(header))]
        field = rng.choice(["dtype", "shape", "data_offsets", "offsets", "extra", "metadata"])
        if field == "dtype":
            entry["dtype"] = rng.choice(["I8", "F8_E4M3", "C64", "F4", "BOOL", "F33", 3, None, "F64", "F16"])
        elif field == "shape":
            entry["shape"] = rng.choice(
                [[2**40, 2**40], [2**62], [-1, 7], [1.5], "x", [[1]], [10**30], [True], [1] * 70, [0, 7]]
            )
        elif field == "data_offsets":
            entry["data_offsets"] = mutate_value(rng, entry["data_offsets"])
        elif field == "offsets":
            shift = rng.choice([-8, -1, 1, 8, 2**40])
            entry["data_offsets"] = [at + shift for at in entry["data_offsets"]]
        elif field == "extra":
            entry[rng.choice(["x", "", "dtype2"])] = 1
        else:
            header["__metadata__"] = mutate_value(rng, {"format": "pt", "a": "b"})
    return header, begin


def file_bytes(rng, entries, dtype, seed):
    """Bytes of a safetensors file, most of them broken in one way."""
    header, size = header_of(rng, entries, dtype, rng.random() < 0.35)
    text = json.dumps(header).encode()
    choice = rng.randrange(20)
    if choice == 0:  # a key twice
        text = text[:-1] + b"," + text[1:] if len(text) > 2 else text
    elif choice == 1:  # nesting
        depth = rng.choice([10, 1000, 100_000])
        text = rng.choice([b"[", b'{"a":']) * depth
    elif choice == 2:
        text = text.replace(b'"', rng.choice([b"'", b"\xff", b'"\\ud800']), rng.choice([1, 2]))
    elif choice == 3:
        text = text.replace(b"1", rng.choice([b"NaN", b"1e999", b"9" * 5000, b"-0", b"Infinity"]), 1)
    length = len(text)
    if choice == 4:
        length = rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
    data = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8).tobytes() if size < 1 << 20 else b""
    made = bytearray(struct.pack("<Q", length) + text + data)
    if choice == 5 and made:
        del made[rng.randrange(len(made)) :]
    elif choice == 6:
        for _ in range(rng.choice([1, 3, 20])):
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    elif choice == 7:
        made += bytes(rng.choice([1, 8, 4096]))
    return bytes(made)


def config_bytes(rng, config):
    text = json.dumps(config)
    choice = rng.randrange(24)
    if choice == 0:
        return text.encode()[: rng.randrange(len(text) + 1)]
    if choice == 1:
        return text[:-1].encode() + b',"r":' + str(rng.choice(NUMBERS)).encode() + b"}"
    if choice == 2:
        return b'{"peft_type":' * rng.choice([5, 5000, 80_000]) + b"1"
    if choice == 3:
        return text.replace(":", rng.choice([": NaN,", ": 1e999 ,", "::", ":" + "9" * 6000 + ","]), 1).encode()
    if choice == 4:
        return b"\xff\xfe" + text.encode("utf-16")
    if choice == 5:
        return text.encode() + b" " * (1 << 20)
    return text.encode()


def make(seed, folder):
    """The source of input ``seed`` and the options to open it with."""
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    entries, dtype, config = tensors_of(rng, kind)
    mutated = rng.random()
    if mutated < 0.4:
        entries = mutate_entries(rng, entries)
    if config is not None and 0.3 < mutated < 0.8:
        config = mutate_config(rng, config)
    options = ReadOptions(
        rank_from=rng.choice(["config", "tensor"]),
        extras=rng.choice(["strict", "ignore"]),
        adalora=rng.choice([None, "fold"]),
        drop_state=rng.random() < 0.5,
        init=rng.choice([None, "keep"]),
        adapter_name=rng.choice([None, None, None, "default"]),
    )
    if kind == "state":
        return state_dict(rng, entries, dtype), config, options
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    if kind == "kohya":
        path = folder / "lora.safetensors"
        path.write_bytes(file_bytes(rng, entries, dtype, seed))
        return path, None, options
    name = "adapter_model.safetensors"
    if kind == "pickle":
        write_pickle(rng, folder, entries, dtype)
    elif kind == "sharded":
        write_shards(rng, folder, entries, dtype, seed)
    else:
        (folder / name).write_bytes(file_bytes(rng, entries, dtype, seed))
    if rng.random() < 0.97:
        (folder / "adapter_config.json").write_bytes(config_bytes(rng, config))
    if kind == "previous":
        write_state(rng, folder, seed)
        return folder, "previous", options
    return folder, None, options


def state_dict(rng, entries, dtype):
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    state = {}
    for key, shape in entries.items():
        choice = rng.randrange(25)
        value = torch.ones(shape, dtype=kinds[dtype])
        if choice == 0:
            value = rng.choice(
                [
                    None,
                    3,
                    "x",
                    [1.0],
                    value.to("meta"),
                    value.to_sparse(),
                    np.ones(shape, ">f4"),
                    np.ones(shape, object),
                ]
            )
        elif choice == 1:
            value = value.to(rng.choice([torch.int8, torch.complex64, torch.bool, torch.float8_e4m3fn]))
        elif choice == 2:
            value = np.ones(shape)
        state[key if choice != 3 else rng.choice([3, None, key, ("a",)])] = value
    return state


def write_pickle(rng, folder, entries, dtype):
    path = folder / "adapter_model.bin"
    state = state_dict(rng, entries, dtype)
    try:
        torch.save(
            {key: value for key, value in state.items() if not isinstance(value, np.ndarray) or value.dtype != object},
            path,
        )
    except RuntimeError:  # what has no bytes cannot be saved
        path.write_bytes(b"")
    made = bytearray(path.read_bytes())
    choice = rng.randrange(4)
    if choice == 0 and made:
        del made[rng.randrange(len(made)) :]
    elif choice == 1 and made:
        for _ in range(rng.choice([1, 3, 20])):
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    elif choice == 2:
        made = bytearray(
            rng.choice(
                [b"", b"\x80\x02.", b"cos\nsystem\n(S'exit 9'\ntR.", b"PK\x03\x04" * 9, b"\x80\x04\x95" + b"\xff" * 8]
            )
        )
    path.write_bytes(bytes(made))


def write_shards(rng, folder, entries, dtype, seed):
    half = dict(list(entries.items())[: len(entries) // 2]), dict(list(entries.items())[len(entries) // 2 :])
    placed = {}
    for k, part in enumerate(half):
        name = f"adapter_model-{k + 1:05}-of-00002.safetensors"
        placed |= dict.fromkeys(part, name)
        (folder / name).write_bytes(file_bytes(rng, part, dtype, seed + k))
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    if rng.random() < 0.7:
        del index["metadata"]
    if rng.random() < 0.5:
        index = mutate_value(rng, index)
    if (
        rng.random() < 0.3
        and isinstance(index, dict)
        and isinstance(index.get("weight_map"), dict)
        and index["weight_map"]
    ):
        key = rng.choice(list(index["weight_map"]))
        index["weight_map"][key] = rng.choice(
            ["../x", "/etc/passwd", "", ".", "a\x00b", 3, None, "nothing.safetensors", "\ud800"]
        )
    (folder / "adapter_model.safetensors.index.json").write_bytes(config_bytes(rng, index))


def write_state(rng, folder, seed):
    """What a run leaves for the next round, broken."""
    (folder / "fedlora_state.safetensors").write_bytes(
        file_bytes(rng, {"memory.x": (3, 2), "module.q.m": (2, 2)}, "F32", seed)
    )
    report = {"schema": 1, "method": {"name": "fedsvd", "options": {}}, "round": 3, "modules": [], "clients": []}
    (folder / "report.json").write_bytes(config_bytes(rng, mutate_value(rng, report)))


def touch(source, config, options):
    """Open an input and read all that it holds."""
    if config == "previous":
        state = previous_state(source)
        if state is not None and state.adapter is not None:
            list(state.adapter.pairs())
            state.adapter.close()
        return
    adapter = open_adapter((source, config) if config is not None else source, options, name="c")
    for _, pair in adapter.pairs():
        assert pair.B.shape[1] == pair.A.shape[0] > 0
    for name in adapter.extras:
        adapter.extra(name)
    adapter.close()


def main(first, count, folder, seconds, most):
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = {}
    tracemalloc.start()
    for seed in range(first, first + count):
        source, config, options = make(seed, folder / "c")
        size = (
            sum(path.stat().st_size for path in source.rglob("*"))
            if isinstance(source, Path) and source.is_dir()
            else 0
        )
        tracemalloc.reset_peak()
        before, began = tracemalloc.get_traced_memory()[0], time.process_time()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        problem = None
        try:
            touch(source, config, options)
            result = "opened"
        except FedLoRAError as error:
            result = type(error).__name__
            if not str(error) or not str(error).isprintable():
                problem = f"message {str(error)[:200]!r}"
        except BaseException as error:  # whatever it is, it must not leave the reader
            result, problem = "wrong", f"{type(error).__name__}: {error}"[:300]
        took, taken = time.process_time() - began, tracemalloc.get_traced_memory()[1] - before
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) << 10
        if took > seconds:
            problem = problem or f"{took:.2f} s"
        if taken > most + 8 * size or (grown > 4 * most + 8 * size and seed > first + 100):
            problem = problem or f"{taken >> 20} MiB traced, {grown >> 20} MiB resident for {size} bytes"
        counts[result] = counts.get(result, 0) + 1
        if problem:
            print(json.dumps({"seed": seed, "problem": problem, "result": result}), flush=True)
    print(json.dumps({"counts": counts}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
