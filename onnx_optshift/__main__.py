"""`python -m onnx_optshift`."""

from onnx_optshift.cli import run

run()
