"""Every method from files to files, 8 clients x 224 modules, against the loop over modules that a user would write, in one run.

Shapes are those of TinyLlama's seven projections, over 32 layers. Ours is `aggregate` with ``out=``: reading, checking,
combining, writing, reading back. The loop reads the same files with safetensors into dictionaries, works in plain torch
float32, at the better of one and all threads, and writes one file; where a loop is too slow for all modules it is timed on a
few of each shape, and the rest is in proportion (`modules timed`). It writes as many files as ours, none of them durably. All
write where nothing is: what it takes to delete an old output is no part of any figure.

The floor is what no program can do without: every byte of the clients read once and every byte of the answer written once and
made durable, nothing between. It reads into one buffer of 1 MiB, which stays in the caches and needs no fresh memory, and
writes from another; the space of each file is taken at once, and the files are synced one after another. Its reading, with
the files in the page cache, is a tenth of a second at most; the rest is the disc, which no method shares out otherwise, and
wobbles as the disc does. So all figures are medians of runs that take turns, `floor_read_s` and `durable_s` say what of the
floor was reading and what was waiting for the disc, and `cpu_s`, `theirs_cpu_s` are processor time, which does not wobble.

`work_ratio` leaves files out: the loop's work against `seconds.compute` of our report. All
methods are also timed with the exact distance from the weighted sum (``measure``), which the loops do not give. Accuracy: the
largest relative distance of a module's product from the loop's own answer in float64.

    python bench/methods.py [--quick] [--width N] [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from method_peers import LOOPS, Clients, Made, Pairs
from safetensors.torch import load_file, save_file
from timing import arguments, machine, save, show
from torch import Tensor

import fedlora_kernels as fk
from fedlora_kernels.methods.contract import method_class

PREFIX = "base_model.model."
SHAPES = {
    "q": (1, 1),
    "k": (0.125, 1),
    "v": (0.125, 1),
    "o": (1, 1),
    "gate": (2.75, 1),
    "up": (2.75, 1),
    "down": (1, 2.75),
}
EQUAL = (16,) * 8
MIXED = (4, 4, 8, 8, 16, 16, 32, 32)
MIXED_METHODS = ("zero_pad", "hetlora", "prelort", "flora", "florist", "flexlora", "raflora", "geometric_median")
FROZEN_METHODS = ("ffa", "rolora", "fedsvd")
PIECE = 1 << 20
RUNS = 5
SLOW = 20.0
"""A loop that takes more seconds than this, in proportion, is run once."""
MEANS = ("fedit", "zero_pad", "hetlora", "ffa", "rolora", "fedsa", "prelort", "fedtree")
"""Methods without a decomposition; the others have one in every module (flora and fedex: stacks of factors)."""


def shapes(width: int, layers: int) -> dict[str, tuple[int, int]]:
    """(m, n) of every module."""
    return {
        f"model.layers.{layer}.{name}_proj": (int(m * width), int(n * width))
        for layer in range(layers)
        for name, (m, n) in SHAPES.items()
    }


def write_clients(folder: Path, sizes: Mapping[str, tuple[int, int]], ranks: Sequence[int], frozen: bool) -> list[Path]:
    """Write clients that share a base pair and differ by noise; A is common where it is ``frozen``."""
    made = torch.Generator().manual_seed(0)
    top = max(ranks)
    base = {
        n: (torch.randn(a, top, generator=made), torch.randn(top, b, generator=made)) for n, (a, b) in sizes.items()
    }
    paths = []
    for k, r in enumerate(ranks):
        state = {}
        for name, (B, A) in base.items():
            noise_B, noise_A = (0.3 * torch.randn(x.shape, generator=made) for x in (B, A))
            state[f"{PREFIX}{name}.lora_B.weight"] = (B + noise_B)[:, :r].contiguous()
            state[f"{PREFIX}{name}.lora_A.weight"] = (A if frozen else A + noise_A)[:r].contiguous()
        config = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": 2 * r,
            "target_modules": [f"{name}_proj" for name in SHAPES],
        }
        path = folder / f"client_{k}"
        path.mkdir(parents=True)
        save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def read(paths: Sequence[Path], names: Sequence[str], dtype: torch.dtype = torch.float32) -> list[Pairs]:
    """All clients by module, with the scale 2 in B."""
    clients = []
    for path in paths:
        state = load_file(path / "adapter_model.safetensors")
        pairs = {n: (state[f"{PREFIX}{n}.lora_B.weight"], state[f"{PREFIX}{n}.lora_A.weight"]) for n in names}
        clients.append({n: (2.0 * B.to(dtype), A.to(dtype)) for n, (B, A) in pairs.items()})
    return clients


def write(folder: Path, made: Made) -> None:
    """One file, as a user's script ends."""
    state = {}
    for name, (B, A) in made.items():
        state[f"{PREFIX}{name}.lora_B.weight"], state[f"{PREFIX}{name}.lora_A.weight"] = B.contiguous(), A.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def few(sizes: Mapping[str, tuple[int, int]], count: int) -> list[str]:
    """``count`` modules whose shapes stand in the proportion of the model; all of them for 0."""
    names = list(sizes)
    return names if count == 0 else names[:count]


class Case:
    """One method on its clients: ours, the loop, the floor."""

    def __init__(self, name: str, paths: Sequence[Path], sizes: Mapping[str, tuple[int, int]], place: Path) -> None:
        self.name, self.paths, self.sizes, self.place = name, list(paths), sizes, place
        self.loop, count = LOOPS[name]
        self.names = few(sizes, count)
        self.weights = [(k + 1) / sum(range(1, len(paths) + 1)) for k in range(len(paths))]
        self.options: dict[str, Any] = {"weights": self.weights}
        self.per_client = "common" not in method_class(name).gives
        self.before: Pairs = {}
        if name == "fedtree":
            self.options["weights"] = None
        if name == "fedrot":
            fk.aggregate(self.paths, "fedrot", out=place / "before", **self.options)
            state = load_file(place / "before" / "adapter_model.safetensors")
            keys = {n: (f"{PREFIX}{n}.lora_B.weight", f"{PREFIX}{n}.lora_A.weight") for n in sizes}
            self.before = {n: (state[b], state[a]) for n, (b, a) in keys.items()}
            self.options["previous"] = place / "before"

    def clear(self) -> None:
        """Remove what was written."""
        for folder in ("ours", *(f"theirs_{k}" for k in range(len(self.paths)))):
            shutil.rmtree(self.place / folder, ignore_errors=True)

    def ours(self, measure: bool = False) -> fk.Result:
        """From files to files."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fk.aggregate(
                self.paths,
                self.name,
                out=self.place / "ours",
                overwrite=True,
                measure=measure,
                per_client=self.per_client,
                **self.options,
            )

    def theirs(self) -> dict[str, float]:
        """Seconds of the loop's parts at the better number of threads: reading, working (in proportion), writing what came out."""
        most = torch.get_num_threads()
        parts = []
        for count in sorted({1, most}):
            torch.set_num_threads(count)
            parts.append(self._theirs())
        torch.set_num_threads(most)
        return min(parts, key=lambda part: part["read"] + part["work"] + part["write"])

    def _theirs(self) -> dict[str, float]:
        clients: list[Pairs] = []
        made: Made = {}
        self.clear()
        begin = time.process_time()
        reading = seconds(lambda: clients.extend(read(self.paths, list(self.sizes))))
        working = seconds(lambda: made.update(self.loop(clients, self.weights, self.before, self.names)))
        files = len(self.paths) if self.per_client else 1
        writing = seconds(lambda: [write(self.place / f"theirs_{k}", made) for k in range(files)])
        cpu, share = time.process_time() - begin, self._share()
        return {"read": reading, "work": working / share, "write": writing / share, "cpu": cpu / share}

    def floor(self) -> dict[str, float]:
        """Seconds of reading every byte of the clients once, of writing every byte of the answer once, and of making it durable."""
        sizes = [target.stat().st_size for target in sorted((self.place / "ours").rglob("*.safetensors"))]
        self.clear()
        buffer, wanted = bytearray(PIECE), memoryview(bytes(PIECE))

        def read() -> None:
            for path in self.paths:
                with open(path / "adapter_model.safetensors", "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        def write() -> None:
            for number, size in enumerate(sizes):
                with open(self.place / f"copy_{number}", "wb", buffering=0) as file:
                    os.posix_fallocate(file.fileno(), 0, size)
                    done = 0
                    while done < size:
                        done += file.write(wanted[: size - done])

        def sync() -> None:
            for number in range(len(sizes)):
                fd = os.open(self.place / f"copy_{number}", os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)

        parts = {"read": seconds(read), "write": seconds(write), "durable": seconds(sync)}
        for number in range(len(sizes)):
            (self.place / f"copy_{number}").unlink()
        return parts

    def accuracy(self, result: fk.Result) -> tuple[float | None, float | None]:
        """Largest relative distance of ours and of the loop from the loop in float64; None where the loop answers something else."""
        if result.adapter is None or self.name in ("clair", "geometric_median"):
            return None, None
        compared = self.names[:2]
        names = self.names if self.name == "hetlora" else compared  # its weights are those of the whole model
        before = {n: (B.double(), A.double()) for n, (B, A) in self.before.items()}
        exact = self._answer(read(self.paths, names, torch.float64), before, names)
        single = self._answer(read(self.paths, names), self.before, names)
        ours = {n: (result.adapter[n].B, result.adapter[n].A) for n in compared}
        return max(_distance(ours[n], exact[n]) for n in compared), max(
            _distance(single[n], exact[n]) for n in compared
        )

    def _answer(self, clients: Clients, before: Pairs, names: Sequence[str]) -> Made:
        torch.manual_seed(0)
        return self.loop(clients, self.weights, before, names)

    def _share(self) -> float:
        cost = {n: float(m) * k for n, (m, k) in self.sizes.items()}
        return sum(cost[n] for n in self.names) / sum(cost.values())


def _distance(pair: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    product = exact[0].double() @ exact[1].double()
    return float(torch.linalg.norm(pair[0].double() @ pair[1].double() - product) / torch.linalg.norm(product))


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that goes away."""
    folder = Path(tempfile.mkdtemp(prefix="fedlora-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(case: Case, repeats: int) -> dict[str, Any]:
    """One row: medians of interleaved runs."""
    result = case.ours()
    accuracy = case.accuracy(result)
    taken: dict[str, list[float]] = {
        f"{name}_s": []
        for name in (
            *("ours", "cpu", "ours_work", "measured", "measured_cpu", "floor", "floor_read", "durable"),
            *("theirs", "theirs_cpu", "theirs_work"),
        )
    }
    loop: dict[str, float] = {}
    for _ in range(repeats):
        made: list[fk.Result] = []
        for name, cpu, measure in (("ours", "cpu", False), ("measured", "measured_cpu", True)):
            case.clear()
            begin = time.process_time()
            taken[f"{name}_s"].append(seconds(lambda made=made, measure=measure: made.append(case.ours(measure))))
            taken[f"{cpu}_s"].append(time.process_time() - begin)
        taken["ours_work_s"].append(made[0].report["seconds"]["compute"])
        floor = case.floor()
        taken["floor_s"].append(sum(floor.values()))
        taken["floor_read_s"].append(floor["read"])
        taken["durable_s"].append(floor["durable"])
        loop = case.theirs() if not loop or taken["theirs_s"][0] < SLOW else loop
        taken["theirs_s"].append(loop["read"] + loop["work"] + loop["write"])
        taken["theirs_cpu_s"].append(loop["cpu"])
        taken["theirs_work_s"].append(loop["work"])
    median = {name: statistics.median(times) for name, times in taken.items()}
    row: dict[str, Any] = {"method": case.name, "kind": "means" if case.name in MEANS else "decomposition", **median}
    row |= {"ratio": median["theirs_s"] / median["ours_s"]}
    row |= {"work_ratio": median["theirs_work_s"] / median["ours_work_s"]}
    row |= {
        "times_floor": median["ours_s"] / median["floor_s"],
        "measured_times": median["measured_s"] / median["ours_s"],
    }
    row |= {
        "width": case.sizes["model.layers.0.q_proj"][0],
        "modules": len(case.sizes),
        "modules_timed": len(case.names),
        "runs": repeats,
    }
    row |= {"ours_distance": accuracy[0], "theirs_distance": accuracy[1], "work": _work(result)}
    return row


def _work(result: fk.Result) -> dict[str, float]:
    return {stage: spent for stage, spent in result.report["seconds"].items() if math.isfinite(spent)}


def main() -> None:
    parser = arguments(__doc__, "4 layers, an eighth of the width")
    parser.add_argument("--only", nargs="*", choices=sorted(LOOPS), help="these methods alone")
    parser.add_argument("--width", type=int, default=2048, help="hidden size; the other sizes are in proportion")
    options = parser.parse_args()
    sizes = shapes(256, 4) if options.quick else shapes(options.width, 32)
    print(machine())
    rows = []
    with scratch() as folder:
        sets = {
            "equal": write_clients(folder / "equal", sizes, EQUAL, frozen=False),
            "mixed": write_clients(folder / "mixed", sizes, MIXED, frozen=False),
            "frozen": write_clients(folder / "frozen", sizes, EQUAL, frozen=True),
        }
        for name in options.only or LOOPS:
            kind = "mixed" if name in MIXED_METHODS else "frozen" if name in FROZEN_METHODS else "equal"
            place = folder / "work"
            place.mkdir()
            row = compare(Case(name, sets[kind], sizes, place), RUNS) | {"ranks": kind}
            shutil.rmtree(place)
            rows.append(row)
            show(row)
    save(options.json, rows)


if __name__ == "__main__":
    main()
