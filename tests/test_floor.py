"""What may be called exact: each output by its own noise, never beyond a limit, and refused where noise hides it."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models as tiny
from onnx import numpy_helper

from onnx_optshift.cli import main
from onnx_optshift.commands import shift
from onnx_optshift.commands.verify import verify
from onnx_optshift.errors import ToleranceError
from onnx_optshift.prove.floor import FEW_SAMPLES, MOST_EXACT, MOST_ROUNDINGS, Promise, noise_floor
from onnx_optshift.prove.written import Prover
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings

QUIET = 1e-30  # less than any rounding
DATA = {"x": tiny.weight(40, 6, seed=3) @ tiny.weight(6, 12, seed=4)}  # 6 of 12 directions are free


def model(scale, dtype=1):
    """Output `quiet` is x W; output `noisy` has random numbers added that no seed fixes."""
    kind = {1: "float", 10: "float16"}[dtype]
    text = f"""g ({kind}[N,12] x) => ({kind}[N,5] quiet, {kind}[N,5] noisy) {{
        quiet = MatMul(x, W)  random = RandomNormalLike<scale = {scale}, dtype = 1>(quiet)
        r = Cast<to = {dtype}>(random)  noisy = Add(quiet, r) }}"""
    return tiny.model(text, {"W": tiny.weight(12, 5, dtype=np.float32 if dtype == 1 else np.float16)})


def data(dtype=1):
    return {"x": DATA["x"].astype(np.float32 if dtype == 1 else np.float16)}


def run(proto, out=None, dtype=1, **settings):
    return shift.run(proto, out, [data(dtype)], ["none"], Settings(device="cpu", **settings)).report


@pytest.mark.parametrize("scale", [0.003, 0.05, 1.0])
def test_noise_that_hides_exactness_is_refused_by_the_name_of_the_output(scale, tmp_path):
    with pytest.raises(ToleranceError, match=r"cannot be shown to be exact .* at the outputs 'noisy' \(by") as caught:
        run(model(scale), tmp_path / "out.onnx")
    assert "quiet" not in str(caught.value)
    assert "--tolerance" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_ends_with_status_3_unless_a_tolerance_is_given(tmp_path, capsys):
    onnx.save(model(0.01), tmp_path / "in.onnx")
    np.savez(tmp_path / "calibration.npz", **DATA)
    command = [str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--heldout", "none", "--device", "cpu"]
    assert main(command) == 3
    assert "'noisy'" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
    assert main([*command, "--tolerance", "0.1"]) == 0
    assert (tmp_path / "out.onnx").exists()


def test_a_copy_of_a_noisy_model_is_proved_by_its_bytes(tmp_path):
    report = shift.run(
        model(1.0), tmp_path / "out.onnx", [{"x": np.eye(12, dtype=np.float32)}], ["none"], Settings(device="cpu")
    ).report
    assert report.verification.identical_bytes
    assert report.verification.passed


def test_without_noise_the_promise_is_exact(tmp_path):
    report = run(model(QUIET), tmp_path / "out.onnx")
    assert report.verification.passed
    assert all(output.bound <= MOST_EXACT for output in report.verification.outputs)


def test_every_output_is_judged_by_its_own_noise(tmp_path):
    """A weight that moves the quiet output by 1e-4 is seen, whatever the other output does."""
    proto = model(5e-5)
    changed = onnx.ModelProto.FromString(proto.SerializeToString())
    moved = (numpy_helper.to_array(proto.graph.initializer[0]) * np.float32(1 + 1e-4)).astype(np.float32)
    changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(moved, "W"))
    for name, one in (("a", proto), ("b", changed)):
        onnx.save(one, tmp_path / f"{name}.onnx")
    report = verify(tmp_path / "a.onnx", tmp_path / "b.onnx", [DATA], Settings(device="cpu"))
    by_name = {output.name: output for output in report.verification.outputs}
    assert not by_name["quiet"].passed
    assert by_name["quiet"].bound < 1e-5
    # Negative control: the noise of the other one would have hidden it.
    prepared = prepare(proto, Settings(device="cpu"), [DATA])
    floor = noise_floor(prepared.bench, prepared.data.calibration, ["W"], 0)
    assert floor.max_rel["noisy"] > 1e-4
    assert not floor.noisy


def test_no_bound_is_beyond_what_may_be_called_exact():
    """A difference of large numbers: one unit in the last place of the weights moves it by more than 1e-3."""
    text = "g (float[N,12] x) => (float[N,5] y) { h = MatMul(x, W)  k = MatMul(x, V)  y = Sub(h, k) }"
    weight = tiny.weight(12, 5)
    proto = tiny.model(text, {"W": weight, "V": (weight * (1 + 2e-5)).astype(np.float32)})
    prepared = prepare(proto, Settings(device="cpu"), [DATA])
    floor = noise_floor(prepared.bench, prepared.data.calibration, ["W", "V"], 0)
    assert floor.noise.rounding > MOST_EXACT  # negative control
    assert max(floor.max_rel["y"], floor.rel["y"]) <= MOST_EXACT


def test_half_precision_is_held_to_its_own_rounding():
    unit = 2.0**-11
    report = run(model(QUIET, dtype=10), dtype=10)
    assert report.verification.passed
    assert all(output.bound <= MOST_ROUNDINGS * unit for output in report.verification.outputs)
    with pytest.raises(ToleranceError, match="'noisy'"):
        run(model(0.2, dtype=10), dtype=10)


def test_values_in_half_precision_count_where_the_weights_are_not():
    text = """g (float[N,12] x) => (float[N,5] y) {
        w = Cast<to = 10>(W)  a = Cast<to = 10>(x)  h = MatMul(a, w)  y = Cast<to = 1>(h) }"""
    prepared = prepare(tiny.model(text, {"W": tiny.weight(12, 5)}), Settings(device="cpu"), [DATA])
    samples = prepared.data.calibration
    assert noise_floor(prepared.bench, samples, ["W"], 0).limit == MOST_ROUNDINGS * 2.0**-11
    plain = prepare(model(QUIET), Settings(device="cpu"), [DATA])
    assert noise_floor(plain.bench, samples, ["W"], 0).limit == MOST_EXACT  # negative control


def test_only_a_file_that_leaves_the_bound_of_few_samples_is_held_against_that_of_more(monkeypatch):
    """Both bounds are of one floor: the second look costs runs only where the first did not suffice."""
    asked = []

    def counted(bench, samples, *rest):
        asked.append(len(samples))
        return noise_floor(bench, samples, *rest)

    monkeypatch.setattr("onnx_optshift.prove.written.noise_floor", counted)
    few, many = FEW_SAMPLES, 2 * FEW_SAMPLES
    data = {"x": np.random.default_rng(0).standard_normal((many, 12)).astype(np.float32)}
    proto = model(QUIET)
    prepared = prepare(proto, Settings(device="cpu"), [data])
    promise = Promise(0.0, "noise", prepared.data.calibration)
    for moved, looks in ((1e-7, [few]), (1e-3, [few, many])):
        other = onnx.ModelProto.FromString(proto.SerializeToString())
        content = numpy_helper.to_array(proto.graph.initializer[0])
        other.graph.initializer[0].CopyFrom(numpy_helper.from_array((content * np.float32(1 + moved)), "W"))
        asked.clear()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "b.onnx")
            onnx.save(other, path)
            proof = Prover(prepared.bench, 0).compare(path, "another", ["W"], promise)
        assert asked == looks
        assert proof.passed == (looks == [few])
