"""`python -m onnx_optshift`, in which one process of several meets what a test wants: a script, run by its own name.

    FAULT="RANK STAGE WHAT" torchrun ... tests/faulty_run.py IN.onnx OUT.onnx ...

STAGE is "capture", "solve" or "proof"; WHAT a signal's name, or "error" for one that is told. "waves" instead of it all
has every layer captured in a pass of its own.
"""

import importlib
import os
import signal
import sys

from onnx_optshift.cli import main
from onnx_optshift.errors import InputError
from onnx_optshift.isolation import run_isolated

# Where each stage is met, and at which call.
STAGES = {
    "capture": ("onnx_optshift.run.bench", "observe", 9),
    "solve": ("onnx_optshift.run.layers", "finished", 1),
    "proof": ("onnx_optshift.prove.written", "verification", 1),
}


def faulty() -> int:
    what = os.environ["FAULT"].split()
    if what == ["waves"]:
        budget = importlib.import_module("onnx_optshift.run.budget")
        one_by_one = budget._waves
        budget._waves = lambda weights, _: one_by_one(weights, lambda taps: len(taps) == 1)
    elif what[0] == os.environ["RANK"]:
        place, name, at = STAGES[what[1]]
        module = importlib.import_module(place)
        original, calls = getattr(module, name), []

        def ends(*args, **options):
            calls.append(1)
            if len(calls) == at:
                if what[2] == "error":
                    raise InputError("this is the one message.")
                os.kill(os.getpid(), signal.Signals[what[2]])
            return original(*args, **options)

        setattr(module, name, ends)
    if "SILENCE" in os.environ or "PATIENCE" in os.environ:
        world = importlib.import_module("onnx_optshift.run.world")
        world.BEAT, world.SILENCE = 0.2, float(os.environ.get("SILENCE", world.SILENCE))
        world.PATIENCE = float(os.environ.get("PATIENCE", world.PATIENCE))
    return main()


sys.exit(run_isolated(faulty))
