"""Two processes that train one model: they shift by the rows of both, as one process with all rows does."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import distributed

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")

COMMON = """
import os, sys
import torch
from torch import distributed, nn
from onnx_optshift.torch import OptimumShift, ShiftConfig, shift_

rank, out = int(os.environ["RANK"]), sys.argv[1]
if int(os.environ["WORLD_SIZE"]) > 1:
    distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 5))
inputs, labels = torch.randn(12, 24), torch.arange(12) % 5
many = torch.randn(64, 24)
many[:, 12:] = many[:, :12]
half = slice(None) if not distributed.is_initialized() else slice(rank, None, 2)
wrapped = nn.parallel.DistributedDataParallel(model) if distributed.is_initialized() else model
"""

TRAIN = """
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
shift = OptimumShift(wrapped, every=2, momentum="project")
with shift.attach(optimizer):
    for number in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(inputs[half] + number), labels[half]).backward()
        optimizer.step()
counts = [layer.rows for layer in shift.result.layers]
"""

AFTER = """
for data, config in (
    ([many[half].flip(0)], ShiftConfig()),  # sums of products are exchanged
    ([inputs[half]], ShiftConfig()),  # rows are
    ([inputs[half]], ShiftConfig(tolerance=0.02)),
    ([inputs[half]], ShiftConfig(tolerance=0.02, tolerance_of="layers", row_weighting="none")),
):
    result = shift_(wrapped, data, config)
    counts += [layer.rows for layer in result.layers] + [len(result.shifted)]
"""

SAVE = """
torch.save((counts, model.state_dict()), f"{out}/{os.environ['WORLD_SIZE']}-{rank}.pt")
"""

FAILS = """
before = [parameter.clone() for parameter in model.parameters()]
try:
    shift_(wrapped, [inputs[half]] if rank == 0 else [])
except Exception as error:
    print(rank, type(error).__name__, error)
assert all(map(torch.equal, before, model.parameters()))
distributed.destroy_process_group()
"""


@pytest.fixture(name="said", scope="module")
def fixture_said(tmp_path_factory):
    """(folder of what was saved, what each of two processes has printed)."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    (folder / "program.py").write_text(COMMON + TRAIN + AFTER + SAVE + FAILS, encoding="utf-8")
    command = [sys.executable, str(folder / "program.py"), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(command, env={**os.environ, **place, "RANK": str(rank)}, **pipes) for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder, said


@pytest.mark.slow
def test_two_processes_shift_as_one_does(said, monkeypatch):
    folder, _ = said
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["program.py", str(folder)])
    exec(COMMON + TRAIN + AFTER + SAVE, {})
    found = [torch.load(folder / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt")]
    (counts, expected), (first_counts, first), (second_counts, second) = found
    assert first_counts == second_counts == counts
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        # Gradients, and sums of products, are added in another order: some float32 units, over the steps and solves.
        assert (first[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.slow
def test_one_process_without_data_ends_both(said):
    first, second = said[1]
    assert "0 InputError rank 1 failed: InputError: data holds no batch" in first
    assert "1 InputError data holds no batch" in second
