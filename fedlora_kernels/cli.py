"""The command line: arguments to calls, results to tables, failures to one line and an exit status.

Status 0: done. 2: anything that arguments or input show. 1: the run failed. 130: interrupted; 128 + n: ended by signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from fedlora_kernels.arguments import parse
from fedlora_kernels.errors import FedLoRAError, InputError

__all__ = ["main"]

_INPUT_ERRNO = frozenset(
    getattr(errno, name)
    for name in ("ENOENT", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "EEXIST", "EROFS", "ENAMETOOLONG", "ELOOP", "EINVAL")
)
"""System errors that name a wrong path. Every other one (disc full, I/O error) is a failure of the run."""

_OPTION = re.compile(r"\b(missing|extras|rank_from|output|backend|policy|dtype|device|adalora|init)='(\w+)'")
_LIMIT = re.compile(r"ReadOptions\(limits=Limits\((\w+=[0-9]+)\)\)")
_SWITCHES = {
    "normalize=False": "--no-normalize",
    "overwrite=True": "--overwrite",
    "resume=True": "--resume",
    "per_client=True": "--per-client",
    "drop_zero=False": "no --drop-zero",
    "drop_zero=True": "--drop-zero",
    "adapter_name=": "--adapter-name ",
    "init_factors=": "--init-factors",
    "drop_state=True": "--drop-state",
    "parameter_order=": "--parameter-order ",
    "previous=": "--previous",
    "target=": "--target",
    "min_clients=": "--min-clients",
    "min_weight=": "--min-weight",
    "round=0": "--round 0",
    "round=": "--round",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (default: the process's own) and return the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    verbose = "--verbose" in arguments
    try:
        with _ended_by_signal(), _tolerant_streams():
            return _run(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, verbose)
    except BrokenPipeError:
        # the reader of stdout went away (| head): what was asked for is done; python must not complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _fail(_describe(error), _status(error), verbose)


def _run(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "aggregate": _aggregate,
        "resize": _resize,
        "convert": _convert,
        "inspect": _inspect,
        "validate": _validate,
        "bench": _bench,
        "env": _env,
        "demo": _demo,
    }
    with _log_to_stderr(options.verbose), _warnings_after(options.verbose):
        return commands[options.command](options)


def _aggregate(options: argparse.Namespace) -> int:
    from fedlora_kernels.reporting.files import check_report, write_report
    from fedlora_kernels.reporting.tables import aggregate_tables
    from fedlora_kernels.reporting.terminal import ProgressBar, show
    from fedlora_kernels.request import aggregate_request

    reports = [check_report(path, options.out) for path in options.report]
    run = aggregate_request(options)
    with ProgressBar(quiet=options.quiet) as progress:
        result = run(progress)
    for adapter in (result.adapter, result.residual, *result.personal.values()):
        if adapter is not None:
            adapter.close()
    for path in reports:
        write_report(path, result.report)
    if not options.quiet:
        show(aggregate_tables(result.report, options.out))
    return 0


def _resize(options: argparse.Namespace) -> int:
    from fedlora_kernels.reporting.files import check_report, write_report
    from fedlora_kernels.reporting.resized import resize_tables
    from fedlora_kernels.reporting.terminal import ProgressBar, show
    from fedlora_kernels.request import resize_request
    from fedlora_kernels.resize import summary

    reports = [check_report(path, options.out) for path in options.report]
    run = resize_request(options)
    with ProgressBar(quiet=options.quiet) as progress:
        results = run(progress)
    for result in results.values():
        if result.adapter is not None:
            result.adapter.close()
    found = [result.report for result in results.values()]
    for path in reports:
        write_report(path, found[0] if len(found) == 1 else summary(results))
    if not options.quiet:
        show(resize_tables(found, options.out))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from fedlora_kernels.reporting.terminal import show, text
    from fedlora_kernels.request import convert_request

    adapter = convert_request(options)
    adapter.close()
    for warning in adapter.warnings:
        warnings.warn(warning, UserWarning, stacklevel=2)
    if not options.quiet:
        show(text(f"wrote {options.out}: {len(adapter)} modules of {options.adapter}"))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from fedlora_kernels.inspection import inspect_adapters
    from fedlora_kernels.reporting.files import check_report, write_report
    from fedlora_kernels.reporting.spectra import inspect_tables
    from fedlora_kernels.reporting.terminal import ProgressBar, show
    from fedlora_kernels.request import check_backend, named_paths, read_options

    reports = [check_report(path) for path in options.report]
    check_backend(options.backend)
    paths = named_paths(options.adapters)
    with ProgressBar(quiet=options.quiet) as progress:
        report = inspect_adapters(
            paths,
            weights=options.weights,
            normalize=options.normalize,
            read=read_options(options),
            backend=options.backend,
            progress=progress,
        )
    for path in reports:
        write_report(path, report)
    if not options.quiet:
        show(inspect_tables(report))
    return 0


def _validate(options: argparse.Namespace) -> int:
    from fedlora_kernels.reporting.json import check_target, write_json
    from fedlora_kernels.reporting.terminal import ProgressBar, show
    from fedlora_kernels.reporting.validation import validation_tables
    from fedlora_kernels.validate import run

    target = options.json and check_target(options.json, "--json")
    with ProgressBar(quiet=False, steps=True) as progress:
        report = run(backend=options.backend, ops=options.op, full=options.full, seed=options.seed, progress=progress)
    if target:
        write_json(target, report)
    show(validation_tables(report))
    return 0 if report["passed"] else 1


def _bench(options: argparse.Namespace) -> int:
    from fedlora_kernels.bench import run
    from fedlora_kernels.reporting.bench import bench_tables
    from fedlora_kernels.reporting.json import check_target, write_json
    from fedlora_kernels.reporting.terminal import ProgressBar, show

    target = options.json and check_target(options.json, "--json")
    wanted = {name: getattr(options, name) for name in ("backend", "threads", "seconds", "quick")}
    with ProgressBar(quiet=False, steps=True) as progress:
        report = run(options.suites, **wanted, progress=progress)
    if target:
        write_json(target, report)
    show(bench_tables(report))
    return 0 if report["passed"] else 1


def _env(_options: argparse.Namespace) -> int:
    from fedlora_kernels.environment import survey
    from fedlora_kernels.reporting.machine import env_tables
    from fedlora_kernels.reporting.terminal import show

    report = survey()
    show(env_tables(report))
    return 0 if report["healthy"] else 1


def _demo(options: argparse.Namespace) -> int:
    from fedlora_kernels import demo

    folders = {name: getattr(options, name) for name in ("data", "out", "cache")}
    try:
        return demo.run(**{name: folder for name, folder in folders.items() if folder is not None})
    except ModuleNotFoundError as error:
        raise InputError(
            f"the demo needs the package {error.name}, which is not installed. pip install 'fedlora-kernels[demo]'"
        ) from error


def _status(error: Exception) -> int:
    if isinstance(error, OSError):
        return 2 if error.errno in _INPUT_ERRNO else 1
    return 2 if isinstance(error, InputError) else 1


def _describe(error: Exception) -> str:
    if isinstance(error, FedLoRAError):
        return _flags(str(error))
    if isinstance(error, OSError):
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{place}{error.strerror or error}"
    if isinstance(error, MemoryError) or "alloc" in str(error) or "out of memory" in str(error):
        return f"out of memory: {error}. Give --memory a smaller size or aggregate on a larger machine"
    return f"unexpected {type(error).__name__}: {error}. --verbose shows where"


def _flags(message: str) -> str:
    """Name options as they are written here: ``missing='zero'`` becomes ``--missing zero``."""
    message = _OPTION.sub(lambda found: f"--{found[1].replace('_', '-')} {found[2]}", message)
    message = _LIMIT.sub(lambda found: f"--limit {found[1]}", message)
    for option, flag in _SWITCHES.items():
        message = message.replace(option, flag)
    return message


def _fail(message: str, status: int, verbose: bool) -> int:
    from fedlora_kernels.reporting.terminal import one_line

    if verbose:
        traceback.print_exc()
    print(f"fedlora: error: {one_line(message)}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit(128 + n), so that temporary folders are removed on the way out."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup ignores SIGHUP on purpose; threads other than the first cannot set handlers
        with contextlib.suppress(ValueError):
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _tolerant_streams() -> Iterator[None]:
    """Let a name that the terminal's encoding lacks appear escaped, not end the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    yield


@contextlib.contextmanager
def _log_to_stderr(verbose: bool) -> Iterator[None]:
    """Send the package's log to stderr: everything with --verbose, else what FEDLORA_LOG asks for (debug, info, ...)."""
    wanted = "DEBUG" if verbose else os.environ.get("FEDLORA_LOG", "").strip().upper()
    if not wanted:
        yield
        return
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    if wanted not in levels:
        raise InputError(f"FEDLORA_LOG is {wanted.lower()!r}; one of {', '.join(levels).lower()} is needed")
    logger, handler = logging.getLogger("fedlora_kernels"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("fedlora: %(levelname)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(wanted)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def _warnings_after(verbose: bool) -> Iterator[None]:
    """Hold warnings back until the command is done, each text once: a failure is one line, not the last of many."""
    if verbose:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=ResourceWarning)
        yield
    from fedlora_kernels.reporting.terminal import one_line

    for message in dict.fromkeys(one_line(str(warning.message)) for warning in caught):
        print(f"fedlora: warning: {message}", file=sys.stderr)
