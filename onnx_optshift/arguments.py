"""What a user may type: the commands, their options, and the way from words to `Settings`. Loads nothing heavy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Never

from onnx_optshift.errors import InputError, closest
from onnx_optshift.report import files
from onnx_optshift.settings import OBJECTIVES, RANGE_SCOPES, Settings

PROGRAM = "onnx-optshift"
SHIFT, INSPECT, VERIFY, DIAGNOSE = "shift", "inspect", "verify", "diagnose"
LOG_LEVELS = ("debug", "info", "warning", "error")
# Random directions for each layer where flatness is asked for without a number.
PROBES = 32
# Powers of 1024, as memory is counted.
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:([KMGT])(?:iB)?)?", re.IGNORECASE)
_NUMBER = re.compile(r"-(\d|\.\d)")
_SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend"}


@dataclass(frozen=True)
class Command:
    """One command: its usage, what it is for, and the names of the files it takes."""

    usage: str
    description: str
    files: tuple[str, ...]
    epilog: str = ""


COMMANDS = {
    SHIFT: Command(
        f"{PROGRAM} IN OUT [options]",
        "Replaces each weight of IN by a better solution of the same equation on calibration\ndata, proves that the "
        "outputs stayed, and writes OUT.",
        ("IN", "OUT"),
        f"""other commands:
  {PROGRAM} {INSPECT} IN   layers, their freedom, skips with reasons
  {PROGRAM} {VERIFY} A B   compares two models on data; drift per layer
  {PROGRAM} {DIAGNOSE} IN  flatness, neural collapse, and whether a shift is worth trying

exit status:
  0    done; a model with nothing to gain is written unchanged, with the reason
  2    bad usage or bad input, a crash in a native library, or killed; nothing was written
  3    outputs left the tolerance, backing off did not help; nothing was written
  130  interrupted, 143 terminated; nothing was written""",
    ),
    INSPECT: Command(
        f"{PROGRAM} {INSPECT} IN [options]",
        "Lists the layers of IN, the freedom that calibration data leaves them, and what is skipped\nand why. Writes "
        "no model.",
        ("IN",),
    ),
    VERIFY: Command(
        f"{PROGRAM} {VERIFY} A B [options]",
        "Compares the outputs of two models on data, and the drift of each layer. Exit status 3 when they differ.",
        ("A", "B"),
    ),
    DIAGNOSE: Command(
        f"{PROGRAM} {DIAGNOSE} IN [options]",
        "Says whether the method's conditions hold for IN and its data: freedom, neural collapse,\nflatness, and a "
        "checklist that ends in go, try small or no-go. Writes no model.",
        ("IN",),
    ),
}


class _Parser(argparse.ArgumentParser):
    """argparse that raises our errors instead of printing its own."""

    def error(self, message: str) -> Never:
        """Raises what argparse would print.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{message}. {_see(self)}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments of one command.

    Args:
        argv: Arguments without the program's name. Long options may have underscores for dashes.

    Returns:
        `command` (a key of `COMMANDS`), `files` (as many as it takes; OUT is None in a dry run without one),
        `settings`, `calibration`, `heldout`, `report`, `quiet`, `verbose` and `log_level`.

    Raises:
        InputError: Bad usage.
        SystemExit: After `-h` or `--version`.
    """
    words = _dashed(argv)
    command = words[0] if words and words[0] in COMMANDS and words[0] != SHIFT else SHIFT
    parser = parser_for(command)
    words = words[command != SHIFT :]
    _refuse_unknown(parser, words)
    args = parser.parse_intermixed_args(words)
    args.command = command
    args.settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)})
    args.files = _files(args, parser)
    for path in args.report:
        files.check_path(path)
    return args


def _dashed(argv: Sequence[str]) -> list[str]:
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return words


def _files(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Path | None]:
    wanted = COMMANDS[args.command].files
    given: list[Path | None] = list(args.files)
    if args.command == SHIFT and args.settings.dry_run and len(given) == 1:
        return [*given, None]
    if len(given) == len(wanted):
        return given
    found = " ".join(map(str, given)) or "none"
    # The usual cause, and not one that the words themselves show.
    hint = " Files come before options that take several values, such as --calib." if len(given) < len(wanted) else ""
    raise InputError(f"expected the files {' '.join(wanted)}, found {found}.{hint} {_see(parser)}")


def _refuse_unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    # Before argparse does: it would blame what follows a misspelt option, and knows no close matches.
    known = [option for action in parser._actions for option in action.option_strings]
    long = [option for option in known if option.startswith("--")]
    for word in words:
        if word == "--":
            return
        name = word.partition("=")[0]
        if word.startswith("-") and len(word) > 1 and name not in known and not _NUMBER.match(word):
            raise InputError(f"unknown option {name!r}.{closest(name, long)} {_see(parser)}")


def _see(parser: argparse.ArgumentParser) -> str:
    return f"{parser.prog} -h lists all options."


def parser_for(command: str) -> argparse.ArgumentParser:
    """The parser of one of `COMMANDS`, with all its options."""
    about = COMMANDS[command]
    parser = _Parser(
        prog=PROGRAM if command == SHIFT else f"{PROGRAM} {command}",
        usage=about.usage,
        description=about.description,
        epilog=about.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # What is not given is absent, so that Settings alone knows the defaults.
        argument_default=argparse.SUPPRESS,
    )
    listed = "the model; OUT: the file to write, may be IN" if command == SHIFT else "ONNX files"
    parser.add_argument("files", nargs="*", type=Path, default=[], metavar=" ".join(about.files), help=listed)
    _data_options(parser.add_argument_group("data").add_argument, command)
    _choice_options(parser.add_argument_group("what to do").add_argument, command)
    _resource_options(parser.add_argument_group("resources").add_argument)
    _output_options(parser.add_argument_group("output").add_argument)
    return parser


Add = Callable[..., argparse.Action]


def _data_options(add: Add, command: str) -> None:
    add(
        *("--calib", "--calibration-data", "-d"),
        dest="calibration",
        metavar="SRC",
        default=None,
        help=".npz or .npy files, a directory of them, test_data_set_* folders, Polygraphy JSON, or "
        "script.py[:function]; looked for beside the model when not given",
        **_SEVERAL,
    )
    if command in {SHIFT, DIAGNOSE}:
        add(
            "--heldout",
            metavar="SRC",
            default=None,
            help="data that only judges; a seeded fifth of the calibration data when not given; 'none' for no judging",
            **_SEVERAL,
        )
    if command == VERIFY:
        add(
            "--baseline",
            metavar="SRC",
            default=None,
            help="the calibration data, whose drift is reported beside that of the data",
            **_SEVERAL,
        )
    if command in {SHIFT, DIAGNOSE}:
        add("--heldout-fraction", type=_number, metavar="F", help="how much to split off to judge (default 0.2)")
    add("--labels", metavar="NAME", help="name of the labels' array in the data (default labels)")
    add("--max-samples", type=_whole, metavar="N", help="calibration samples to use at most (default: all)")


def _choice_options(add: Add, command: str) -> None:
    if command == SHIFT:
        add(
            "--tolerance",
            type=lambda text: text if text == "auto" else _number(text),
            metavar="EPS|auto",
            help="relative deviation that the outputs may show on calibration data; 0 (default) is exact; auto takes "
            "what serves held-out data best",
        )
        add(
            "--stochastic",
            type=_stochastic,
            nargs="?",
            const=0,
            metavar="B",
            help="exact only on a class-balanced batch of B samples (without B: held-out data chooses it)",
        )
    if command in {VERIFY, DIAGNOSE}:
        about = {
            VERIFY: "relative deviation that the outputs may show; 0 (default): equality within the noise floor",
            DIAGNOSE: "of the shift whose flatness stands beside the original's; 0 (default) is the exact one",
        }
        add("--tolerance", type=_number, metavar="EPS", help=about[command])
    if command == VERIFY:
        add(
            "--max-drift",
            type=_number,
            metavar="SHARE",
            help="fail when, for more than one sample in ten, the shift changes more than this share of a layer's "
            "output; the outputs' deviation is then reported only",
        )
    if command in {SHIFT, DIAGNOSE}:
        add(
            "--flatness",
            type=_whole,
            nargs="?",
            const=PROBES,
            metavar="PROBES",
            help=f"measure the loss's curvature and sharpness along random directions (default {PROBES} per layer)",
        )
    if command in {SHIFT, INSPECT}:
        add(
            "--objective",
            metavar="|".join(OBJECTIVES),
            help="what to make small: the weights' norm (default), the range that a quantizer scales by, or the norm "
            "as earlier weights feel it",
        )
        add(
            "--range-scope",
            metavar="|".join(RANGE_SCOPES),
            help="what shares a scale of the quantizer, for --objective range (default: channel)",
        )
        add("--range-block", type=_whole, metavar="N", help="inputs of a channel that share a scale: 32, 64 or 128")
        add(
            "--quantization-bits",
            type=_bits,
            metavar="B[,B...]",
            help="bit widths to be quantized to: the report gives their errors before and after",
        )
    names = "exact names, globs or re:... of nodes or initializers"
    add("--nodes-to-include", "-ni", metavar="NAME", help=f"only these layers: {names}", **_SEVERAL)
    add(
        "--nodes-to-exclude",
        "-ne",
        metavar="NAME",
        help="leave these layers alone; wins over --nodes-to-include",
        **_SEVERAL,
    )
    add("--op-types", metavar="OP", help="only layers of these operators", **_SEVERAL)
    if command == SHIFT:
        add("--dry-run", action="store_true", help="do everything except writing OUT, which may then be left out")
        add("--force", action="store_true", help="go on where a refusal can be overridden, such as OUT being no model")
        add("--save-as-external-data", action="store_true", help="write the weights to a data file beside OUT")


def _resource_options(add: Add) -> None:
    add("--device", metavar="DEVICE", help="auto (default), cpu, cuda or cuda:N; never falls back silently")
    add("--allow-cpu-fallback", action="store_true", help="with --device cuda: let single nodes run on the CPU")
    add("--providers", metavar="EP", help="ONNX Runtime execution providers, in order", **_SEVERAL)
    add("--batch-size", type=_whole, metavar="N", help="samples per run of the model (default: chosen by memory)")
    add(
        "--max-memory",
        type=_size,
        metavar="SIZE",
        help="what the process may take at its peak, in bytes or as 512M, 2G (powers of 1024)",
    )
    add("--seed", type=_whole, metavar="N", help="seed of all random choices (default 0)")
    add("--custom-op-library", metavar="FILE", help="shared library with the model's custom operators")


def _output_options(add: Add) -> None:
    from onnx_optshift import __version__

    add(
        "--report",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write the whole report to this file, as .json or as .html for people, or as JSON to standard output (-); "
        "may be given several times",
    )
    add("--quiet", action="store_true", default=False, help="print errors only")
    add("--verbose", action="store_true", default=False, help="print more: trials, all skips, tracebacks of errors")
    add("--log-level", choices=LOG_LEVELS, default="error", help="least level of log lines (default error)")
    add("--version", action="version", version=f"{PROGRAM} {__version__}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None


def _bits(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _stochastic(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of samples or nothing, found {text!r}; a file must come before this option"
        ) from None


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected bytes, or a size such as 512M or 2G, found {text!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])
