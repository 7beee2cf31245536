"""What a user may type: the commands, their options, and the way from words to `Settings`. Loads nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Never

from onnx_optshift import completion
from onnx_optshift.errors import InputError, closest
from onnx_optshift.options import DIAGNOSE, GROUPS, INSPECT, PROGRAM, SHIFT, VERIFY, path_of
from onnx_optshift.report import files
from onnx_optshift.settings import Settings


@dataclass(frozen=True)
class Command:
    """One command: what it is for, the names of the files it takes, an example, and what else its help says."""

    description: str
    files: tuple[str, ...]
    example: str
    more: str = ""


COMMANDS = {
    SHIFT: Command(
        "Replaces each weight of IN by a better solution of the same equation on calibration\ndata, proves that the "
        "outputs stayed, and writes OUT.",
        ("IN", "OUT"),
        "model.onnx shifted.onnx --calib calibration.npz --report report.html",
        f"""other commands:
  {PROGRAM} {INSPECT} IN   layers, their freedom, skips with reasons
  {PROGRAM} {VERIFY} A B   compares two models on data; drift per layer
  {PROGRAM} {DIAGNOSE} IN  flatness, neural collapse, and whether a shift is worth trying

exit status:
  0    done; a model with nothing to gain is written unchanged, with the reason
  2    bad usage or bad input, a crash in a native library, or killed; nothing was written
  3    outputs left the tolerance, backing off did not help; nothing was written
  130  interrupted, 143 terminated; nothing was written

""",
    ),
    INSPECT: Command(
        "Lists the layers of IN, the freedom that calibration data leaves them, and what is skipped\nand why. Writes "
        "no model.",
        ("IN",),
        "model.onnx --calib calibration.npz",
    ),
    VERIFY: Command(
        "Compares the outputs of two models on data, and the drift of each layer. Exit status 3 when they differ.",
        ("A", "B"),
        "model.onnx shifted.onnx --calib new_data.npz --tolerance 0.01",
    ),
    DIAGNOSE: Command(
        "Says whether the method's conditions hold for IN and its data: freedom, neural collapse,\nflatness, and a "
        "checklist that ends in go, try small or no-go. Writes no model.",
        ("IN",),
        "model.onnx --calib calibration.npz --heldout heldout.npz",
    ),
}


class _Parser(argparse.ArgumentParser):
    """argparse that raises our errors instead of printing its own."""

    def error(self, message: str) -> Never:
        raise InputError(f"{message}. {self.prog} -h lists all options.")


class _PrintCompletion(argparse.Action):
    """Prints a shell's completion script and exits, as --version does."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, __: object = None) -> Never:
        whole = parser_for(SHIFT)
        commands = whole.add_subparsers()
        for name in (INSPECT, VERIFY, DIAGNOSE):
            commands.add_parser(name, parents=[parser_for(name)], add_help=False, help=name)
        print(completion.script(whole, shell))
        parser.exit()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments of one command.

    Args:
        argv: Arguments without the program's name. Long options may have underscores for dashes.

    Returns:
        `command` (a key of `COMMANDS`), `files` (as many as it takes; OUT is None in a dry run without one),
        `settings`, `calibration`, `heldout`, `report`, `quiet`, `verbose` and `log_level`. Bad usage is an InputError;
        `-h`, `--version` and `--print-completion` end in SystemExit.
    """
    words = [_dashed(word) if word.startswith("--") else word for word in argv]
    command = words[0] if words and words[0] in COMMANDS and words[0] != SHIFT else SHIFT
    parser = parser_for(command)
    words = words[command != SHIFT :]
    args, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        parser.error(f"unknown option {name!r}.{closest(name, known)}".removesuffix("."))
    args.command = command
    if args.quiet and args.verbose:
        parser.error("--quiet and --verbose contradict each other: give one of them")
    if getattr(args, "heldout", None) and hasattr(args, "heldout_fraction"):
        parser.error("--heldout-fraction splits nothing off where --heldout is given: leave one of them out")
    args.report = list(dict.fromkeys(args.report))
    first = words[0] if words else ""
    if command == SHIFT and first.isalpha() and not Path(first).exists() and (hint := closest(first, list(COMMANDS))):
        parser.error(f"{first!r}: no such command, and no such file.{hint}".removesuffix("."))
    args.settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)})
    wanted = COMMANDS[command].files
    if command == SHIFT and args.settings.dry_run and len(args.files) == 1:
        args.files.append(None)
    if len(args.files) != len(wanted):
        found = " ".join(map(str, args.files)) or "none"
        # The usual cause, and not one that the words themselves show.
        few = len(args.files) < len(wanted)
        hint = ". Files come before options that take several values, such as --calib" if few else ""
        parser.error(f"expected the files {' '.join(wanted)}, found {found}{hint}")
    for path in args.report:
        files.check_path(path)
    return args


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def parser_for(command: str) -> argparse.ArgumentParser:
    """The parser of one of `COMMANDS`, with all its options."""
    about = COMMANDS[command]
    names = " ".join(about.files)
    program = PROGRAM if command == SHIFT else f"{PROGRAM} {command}"
    parser = _Parser(
        prog=program,
        usage=f"{program} {names} [options]",
        description=about.description,
        epilog=f"{about.more}example:\n  {program} {about.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # What is not given is absent, so that Settings alone knows the defaults.
        argument_default=argparse.SUPPRESS,
    )
    listed = "the model; OUT: the file to write, may be IN" if command == SHIFT else "ONNX files"
    parser.add_argument("files", nargs="*", type=path_of, default=[], metavar=names, help=listed)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)

        def add(commands: Iterable[str], flags: str, text: str, group: Any = group, **keywords: Any) -> None:
            if command in commands:
                group.add_argument(*flags.split(), help=text, **keywords)

        options(add)
    text = "print a completion script for bash, zsh or tcsh (needs the extra completion)"
    group.add_argument("--print-completion", action=_PrintCompletion, metavar="SHELL", help=text)
    return parser
