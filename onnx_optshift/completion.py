"""Shell completion: a parser of all commands, read by shtab."""

from __future__ import annotations

import argparse

from onnx_optshift.errors import InputError


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What completes the commands of a parser, options and files in a shell.

    Raises:
        InputError: The library that writes it is not installed, or does not know the shell.
    """
    try:
        import shtab
    except ImportError as error:
        raise InputError(
            "--print-completion needs the package shtab, which comes with the extra 'completion' and is not installed: "
            "pip install 'onnx-optshift[completion]'."
        ) from error
    if shell not in shtab.SUPPORTED_SHELLS:
        known = ", ".join(shtab.SUPPORTED_SHELLS)
        raise InputError(f"--print-completion: expected one of {known}, found {shell!r}.")
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for action in (action for each in (parser, *commands.choices.values()) for action in each._actions):
        if action.metavar in {"SRC", "FILE"} or action.dest == "files":
            action.complete = shtab.FILE
        elif "|" in str(action.metavar) and str(action.metavar).islower():
            action.choices = str(action.metavar).split("|")
    # A command comes before files; where bash finds neither option nor command it is told to look for files.
    parser._actions.remove(commands)
    parser._actions.insert(0, commands)
    return shtab.complete(parser, shell).replace("complete -o bashdefault -F", "complete -o bashdefault -o default -F")
