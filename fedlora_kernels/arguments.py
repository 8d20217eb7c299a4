"""The parser of the command line: every flag, nothing heavy. `fedlora --help` and a wrong flag never load torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from fedlora_kernels._version import __version__
from fedlora_kernels.errors import InputError

__all__ = ["RULE_FLAGS", "parse"]

RULE_FLAGS = {
    "rank": ("Rank", int, "K", "keep K singular values"),
    "energy": ("Energy", float, "T", "keep this fraction of the energy |D|_F^2 (default: 0.9)"),
    "sv_ratio": ("SingularValueRatio", float, "X", "keep the singular values above s_1 / X"),
    "sv_cumulative": ("SingularValueSum", float, "T", "keep this fraction of the sum of singular values"),
    "sv_fro": ("Frobenius", float, "F", "keep this fraction of the Frobenius norm"),
    "absolute": ("Absolute", float, "E", "keep the singular values above E"),
    "budget": ("Budget", str, "SIZE", "share a size such as 10MB (or 10MiB) over all modules, where it keeps most"),
}
"""Rule flags by destination: name of the rule class, type of its number, placeholder, help."""

DTYPES = ("float64", "float32", "bfloat16", "float16")
_SIGNED_LIST = re.compile(r"-[\d.][^=]*")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See '{self.prog} --help'")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments after the program's name.

    Raises InputError for anything the parser refuses, SystemExit(0) for --help and --version.
    """
    options, unknown = _build().parse_known_args(_join_signed(argv))
    if unknown:
        raise InputError(f"unrecognized arguments: {' '.join(unknown)}. See 'fedlora {options.command} --help'")
    return options


def _join_signed(argv: Sequence[str]) -> list[str]:
    """Write ``--weights -1,2`` as ``--weights=-1,2``: argparse takes a value that starts with a minus for a flag."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] == "--weights" and _SIGNED_LIST.fullmatch(argument):
            joined[-1] = f"--weights={argument}"
        else:
            joined.append(argument)
    return joined


def _build() -> _Parser:
    parser = _Parser(
        prog="fedlora",
        allow_abbrev=False,
        description="Many LoRA adapters into one: exact, batched, certified.",
        epilog="Exit status: 0 done; 2 wrong arguments or input; 1 the run failed; 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"fedlora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    texts = {
        "aggregate": "combine the adapters of several clients into one",
        "resize": "cut adapters to smaller ranks, each for itself",
        "convert": "a PEFT folder to a kohya file or back: the same update, the same numbers",
        "inspect": "ranks, spectra, norms and cosines of adapters, and what looks wrong",
        "validate": "every kernel of every backend here on generated cases: worst error and limit",
        "bench": "this machine's speed beside the libraries', with the accuracy of both and the floor",
        "env": "versions, backends, why each is on or off, a one-second self-test",
        "demo": "federated LoRA on real text with a small model, end to end",
    }
    add = {
        "aggregate": _aggregate,
        "resize": _resize,
        "convert": _convert,
        "inspect": _inspect,
        "validate": _validate,
        "bench": _bench,
        "demo": _demo,
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        command.add_argument("--verbose", action="store_true", help="log every step; a failure shows its traceback")
        if name in add:
            add[name](command)
    return parser


def _aggregate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "clients", nargs="+", metavar="CLIENT", help="a PEFT folder, a kohya or diffusers file, or name=PATH"
    )
    _out(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what is done when the run is ended, and go on with it in the next one",
    )
    _aggregate_method(parser)
    _rules(parser)
    _aggregate_clients(parser)
    group = parser.add_argument_group("output")
    _format(group)
    _aggregate_output(group)
    _machine(parser)


def _resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="a PEFT folder, a kohya or diffusers file, or name=PATH; of several, each goes to OUT/NAME",
    )
    _out(parser)
    _rules(parser)
    group = parser.add_argument_group("adapters")
    _extras(group, "unknown tensors that are no factors")
    _reading(group)
    group = parser.add_argument_group("output")
    _format(group)
    _report(group, "a copy of the report, as JSON or as a page for a browser")
    group.add_argument("--quiet", action="store_true", help="no table, no progress bar")
    _machine(parser)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="IN", help="a PEFT folder, or a kohya or diffusers file")
    _out(parser)
    parser.add_argument("--to", choices=("peft", "kohya"), required=True, help="the format of OUT")
    group = parser.add_argument_group("names")
    group.add_argument(
        "--prefix",
        metavar="P",
        help="to kohya: what stands before every name, such as lora_unet_; to PEFT: take only modules that begin with it",
    )
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--names", metavar="FILE.json", help="an object from kohya name to module path")
    choice.add_argument("--base", metavar="DIR", help="to PEFT: the base model, whose keys give the module paths")
    group = parser.add_argument_group("adapter")
    _extras(group, "tensors that the other format has no form for")
    _reading(group)
    parser.add_argument("--quiet", action="store_true", help="print nothing")


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="folder to write, or FILE.safetensors for kohya files"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it holds only files written here, or is a LoRA file"
    )


def _extras(group: argparse._ActionsContainer, text: str) -> None:
    group.add_argument(
        "--extras", choices=("strict", "ignore"), default="strict", help=f"{text}: refuse or drop; default: strict"
    )


def _rules(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rank rule, one of, and an upper bound beside it")
    rules = group.add_mutually_exclusive_group()
    for name, (_, kind, metavar, text) in RULE_FLAGS.items():
        rules.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)
    group.add_argument("--max-rank", type=_positive, metavar="K", help="an upper bound on the rank, beside any rule")


def _aggregate_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--method", default="florist", metavar="NAME", help="default: florist")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="an option of the method, or of the robust rule as RULE.OPTION=VALUE; may be repeated",
    )
    group.add_argument(
        "--robust", metavar="NAME", help="a robust rule whose coefficients replace the weights: krum, trimmed_mean, ..."
    )
    group.add_argument("--previous", metavar="DIR", help="the result of the round before")
    group.add_argument("--client-state", metavar="FILE.json", help="what clients report, by name (method fedtree)")
    group.add_argument("--round", type=_count, metavar="N", help="0-based; default: the round of --previous + 1, or 0")


def _aggregate_clients(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clients")
    group.add_argument("--weights", type=_numbers, metavar="W,W,...", help="one per client; default: equal")
    group.add_argument(
        "--no-normalize", dest="normalize", action="store_false", help="take the weights as they are, negative too"
    )
    group.add_argument("--policy", choices=("strict", "drop", "clip"), default="strict", help="for bad clients")
    group.add_argument(
        "--max-update-norm",
        type=_norm,
        metavar="X|median",
        help="largest norm of an update: beyond it a client fails, or is scaled down with --policy clip",
    )
    group.add_argument("--min-clients", type=_positive, metavar="N", help="stop if fewer clients remain")
    group.add_argument("--min-weight", type=float, metavar="F", help="stop if less of the total weight remains")
    group.add_argument(
        "--missing",
        choices=("error", "renormalize", "zero"),
        default="error",
        help="modules that some clients lack: refuse, take the mean over the owners, or count as zero; default: error",
    )
    group.add_argument(
        "--extras",
        choices=("strict", "ignore", "owners", "first"),
        default="strict",
        help="tensors that are no factors: all clients have them, drop unknown ones, take the mean over the owners, or the "
        "first client's; default: strict",
    )
    _reading(group)


def _format(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--target",
        choices=("peft", "kohya", "vllm"),
        help="who loads OUT; vllm needs one rank; default: as the first client",
    )
    group.add_argument("--output", choices=("left", "balanced"), default="left", help="where singular values sit")
    group.add_argument(
        "--uniform-rank", action=argparse.BooleanOptionalAction, help="pad every module to the largest rank"
    )
    group.add_argument("--fill", choices=("zero", "random"), default="zero", help="rows of A in the padding")
    group.add_argument("--seed", type=_count, default=0, metavar="N", help="of random padding rows; default: 0")
    group.add_argument(
        "--drop-zero",
        action="store_true",
        help="leave out modules whose update is zero, or for which --budget has no room",
    )
    group.add_argument("--dtype", choices=DTYPES, help="default: float32, or float64 if an input is float64")


def _aggregate_output(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--per-client", action="store_true", help="also write OUT/clients/NAME, what each client receives"
    )
    group.add_argument(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="do not measure the distance of factor means from the weighted sum; faster",
    )
    group.add_argument(
        "--compare",
        action="store_true",
        help="report norms, cosines and cancellation of the clients and the spectra of their sum; part of every FILE.html",
    )
    _report(group, "a copy of the report, as JSON or as a page for a browser")
    group.add_argument("--quiet", action="store_true", help="no table, no progress bar")


def _machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--backend", default="auto", metavar="NAME", help="default: auto; see fedlora env")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; default: a GPU if there is one",
    )
    group.add_argument("--memory", metavar="SIZE", help="for data in flight, such as 512MiB; default: 1GiB")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="a PEFT folder, a kohya or diffusers file, or name=PATH"
    )
    parser.add_argument("--weights", type=_numbers, metavar="W,W,...", help="one per adapter; default: equal")
    parser.add_argument(
        "--no-normalize", dest="normalize", action="store_false", help="take the weights as they are, negative too"
    )
    _report(parser, "everything that is known, as JSON or as a page for a browser")
    _reading(parser)
    parser.add_argument("--backend", default="auto", metavar="NAME", help="default: auto; see fedlora env")
    parser.add_argument("--quiet", action="store_true", help="no table, no progress bar")


def _reading(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--rank-from",
        choices=("config", "tensor"),
        default="config",
        help="whose rank holds where they differ; config refuses it, tensor warns; default: config",
    )
    group.add_argument("--adapter-name", metavar="NAME", help="which adapter of a file that holds several")
    group.add_argument(
        "--parameter-order",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,NAME",
        help="target parameters of experts in the order of the model, such as gate_up_proj,down_proj, where their ranks differ",
    )
    group.add_argument("--adalora", choices=("fold",), help="read AdaLoRA, its singular values folded into B")
    group.add_argument("--drop-state", action="store_true", help="leave out what VeLoRA keeps beside its factors")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--init", choices=("keep",), help="of PiSSA, OLoRA, ...: stay on their residual base, at the clients' rank"
    )
    choice.add_argument(
        "--init-factors",
        metavar="DIR",
        help="of PiSSA, OLoRA, ...: subtract this adapter, which the clients started from",
    )
    group.add_argument(
        "--limit", action="append", default=[], metavar="CAP=N", help="raise a size cap, such as stacked_rank=32768"
    )


def _validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="all", metavar="NAME", help="default: all that can run here")
    parser.add_argument(
        "--op",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="operations, such as core_svd; default: all",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="a sample of the cases, half a minute (the default)")
    form.add_argument("--full", action="store_true", help="every generator on every shape, some ten minutes")
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="of all generators; default: 0")
    _json(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="such as small_svd or product_svd; default: all")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="who computes our side; default: auto")
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="the most to use, beside 1; default: torch's number"
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=0.5, metavar="S", help="at least, for each call; default: 0.5"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny problems: shows that all works, says nothing of speed"
    )
    _json(parser)


def _report(group: argparse._ActionsContainer, text: str) -> None:
    group.add_argument(
        "--report", action="append", default=[], metavar="FILE", help=f"{text}: FILE.json or FILE.html; may be repeated"
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE.json", help="everything found, with versions and machine")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", help="folder that holds the text; default: .cache/demo")
    parser.add_argument("--out", metavar="DIR", help="folder for adapters, table and picture; default: demo_output")
    parser.add_argument("--cache", metavar="DIR", help="folder for trained adapters; default: .cache/demo")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 0")
    return int(text)


def _positive(text: str) -> int:
    number = _count(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number > 0")
    return number


def _numbers(text: str) -> list[float]:
    numbers = []
    for position, part in enumerate(text.split(",")):
        try:
            numbers.append(float(part))
        except ValueError:
            message = f"weight {position + 1} is {part!r}; numbers separated by commas are needed"
            raise argparse.ArgumentTypeError(message) from None
    return numbers


def _norm(text: str) -> float | str:
    if text == "median":
        return text
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number > 0 nor 'median'")
    return number
