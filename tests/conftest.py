"""Set before numpy, torch or ONNX Runtime load: tests are small, and thread pools only get in each other's way."""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# Reports have no edge in a pipe; a width from whoever starts the tests would give them one.
os.environ.pop("COLUMNS", None)
