"""`OptimumShift` in training: hooks only where a shift is due, the right rows, momentum, autocast and compilation."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch_cases import classifier, relative, same, weights

from onnx_optshift.errors import InputError, OptShiftWarning
from onnx_optshift.stats import rows
from onnx_optshift.torch import OptimumShift, ShiftConfig, capture, shift_


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 5))


def batches(count, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 24, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(count)
    ]


def step(model, optimizer, inputs, labels):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


@pytest.fixture(name="observed")
def fixture_observed(monkeypatch):
    """Taps that were observed, in order."""
    seen = []

    def noting(moments, tap, *rest, **more):
        seen.append(tap.value)
        rows.observe(moments, tap, *rest, **more)

    monkeypatch.setattr(capture, "observe", noting)
    return seen


def test_layers_are_looked_at_only_on_the_step_that_is_due(observed):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shift = OptimumShift(model, every=3)
    handle = shift.attach(optimizer)
    looked, armed = [], []
    for inputs, labels in batches(7):
        armed.append(bool(model[0]._forward_pre_hooks))
        step(model, optimizer, inputs, labels)
        looked.append(len(observed))
        observed.clear()
    assert armed == [False, False, True, False, False, True, False]
    assert looked == [0, 0, 2, 0, 0, 2, 0]
    assert shift.steps == 7
    handle.remove()
    for inputs, labels in batches(3):
        step(model, optimizer, inputs, labels)
    assert not observed
    assert shift.steps == 7


def test_every_step_and_a_handle_that_is_removed_while_hooks_are_in_place():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with OptimumShift(model, every=1).attach(optimizer) as handle:
        step(model, optimizer, *batches(1)[0])
        assert model[0]._forward_pre_hooks
    assert not model[0]._forward_pre_hooks
    handle.remove()  # again is no harm
    again = OptimumShift(model, every=1)
    with again.attach(optimizer), pytest.raises(InputError, match="attached already"):
        again.attach(optimizer)


def test_rows_are_those_of_the_training_batch():
    """The weight after the step, projected on the inputs that the first layer had: by the pseudoinverse."""
    model, (inputs, labels) = network(), batches(1)[0]
    plain = copy.deepcopy(model)
    step(plain, torch.optim.SGD(plain.parameters(), 0.1), inputs, labels)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with OptimumShift(model, every=1).attach(optimizer):
        step(model, optimizer, inputs, labels)
    projector = torch.linalg.pinv(inputs.double()) @ inputs.double()
    assert relative(model[0].weight, plain[0].weight.detach().double() @ projector) < 1e-6
    assert relative(model[0].weight, plain[0].weight) > 0.1
    assert torch.equal(model[0].bias, plain[0].bias)


def test_a_batch_of_its_own_is_met_after_the_step_as_shift_meets_it():
    model, (inputs, labels) = network(), batches(1)[0]
    other = batches(1, size=10, seed=5)[0]
    plain = copy.deepcopy(model)
    step(plain, torch.optim.SGD(plain.parameters(), 0.1), inputs, labels)
    shift_(plain, [other])
    for batch in (other, lambda: other):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        with OptimumShift(trained, every=1, batch=batch).attach(optimizer):
            step(trained, optimizer, inputs, labels)
        assert same(weights(trained), weights(plain))
        assert trained.training


def test_a_number_takes_so_many_samples():
    model, (inputs, labels) = network(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shift = OptimumShift(model, every=1, batch=5)
    with shift.attach(optimizer):
        step(model, optimizer, inputs, labels)
    assert [layer.rows for layer in shift.result.layers] == [5, 5]


def test_accumulated_gradients_bring_the_rows_of_all_their_batches():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shift = OptimumShift(model, every=2)
    with shift.attach(optimizer):
        for _ in range(2):
            for inputs, labels in batches(3, size=4):
                nn.functional.cross_entropy(model(inputs), labels).backward()
            with torch.no_grad():
                model(torch.randn(9, 24))  # validation brings none
            optimizer.step()
    assert [layer.rows for layer in shift.result.layers] == [12, 12]


def test_steps_counted_by_hand_are_the_same():
    one, (inputs, labels) = network(), batches(1)[0]
    two = copy.deepcopy(one)
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    with OptimumShift(one, every=1, batch=inputs).attach(optimizer):
        step(one, optimizer, inputs, labels)
    shift = OptimumShift(two, every=1, batch=inputs)
    step(two, torch.optim.SGD(two.parameters(), 0.1), inputs, labels)
    shift.step()
    assert same(weights(one), weights(two))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1), "momentum_buffer"),
        (lambda parameters: torch.optim.AdamW(parameters, 0.01), "exp_avg"),
    ],
)
def test_momentum_is_kept_or_projected(make, key):
    """A momentum of earlier batches has parts that the rows of this one do not reach."""
    found = {}
    for momentum in ("keep", "project"):
        model = network()
        optimizer = make(model.parameters())
        shift = OptimumShift(model, every=4, momentum=momentum)
        with shift.attach(optimizer):
            for inputs, labels in batches(4):
                step(model, optimizer, inputs, labels)
        found[momentum] = optimizer.state[model[0].weight][key]
    inputs = batches(4)[3][0].double()
    projector = torch.linalg.pinv(inputs) @ inputs
    assert relative(found["keep"].double() @ projector, found["keep"]) > 0.1
    # Projected is projected; rounding to float32, and what the rank decision may leave out.
    assert relative(found["project"], found["keep"].double() @ projector) < 1e-6


def test_what_the_optimizer_does_not_have_stays():
    model, (inputs, labels) = network(), batches(1)[0]
    before = weights(model)
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    with OptimumShift(model, every=1).attach(optimizer):
        step(model, optimizer, inputs, labels)
    assert torch.equal(model[0].weight, before["0.weight"])
    with pytest.raises(InputError, match="no weight that can be shifted"):
        OptimumShift(model, every=1).attach(torch.optim.SGD(network(1).parameters(), 0.1))


def test_layers_without_freedom_rest(observed):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    shift = OptimumShift(model, every=1, recheck=3)
    looked = []
    with shift.attach(optimizer):
        for inputs, labels in batches(7, size=32):  # 32 rows of 24 directions
            step(model, optimizer, inputs, labels)
            looked.append(tuple(observed))
            observed.clear()
    assert looked == [("0", "2"), ("2",), ("2",), ("0", "2"), ("2",), ("2",), ("0", "2")]


def test_a_tolerance_is_each_layers_residual():
    model, (inputs, labels) = network(), batches(1, size=64)[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shift = OptimumShift(model, every=1, tolerance=0.1)
    with shift.attach(optimizer):
        step(model, optimizer, inputs, labels)
    for layer in shift.result.layers:
        assert layer.measured_residual == pytest.approx(0.1, rel=1e-3)
        assert layer.norm_after < layer.norm_before


def test_without_any_forward_it_says_so():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        OptimumShift(model, every=1).attach(optimizer),
        pytest.warns(OptShiftWarning, match="no layer has met any row"),
    ):
        optimizer.step()


@pytest.mark.parametrize(
    "choices",
    [
        {"every": 0},
        {"every": 2.0},
        {"every": 1, "batch": 0},
        {"every": 1, "momentum": "drop"},
        {"every": 1, "recheck": 0},
    ],
)
def test_choices_that_mean_nothing_are_refused(choices):
    with pytest.raises(InputError):
        OptimumShift(network(), **choices)


def test_under_autocast_rows_are_what_the_layer_was_given():
    """In bfloat16 the second layer's input has 8 bits; its sums do not: the projection is exact for these rows."""
    model, (inputs, labels) = network(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    seen = []
    model[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    before = weights(model)
    with OptimumShift(model, every=1).attach(optimizer):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    (hidden,) = seen
    assert hidden.dtype == torch.bfloat16
    hidden = hidden.double()
    assert relative(model[2].weight, before["2.weight"].double() @ torch.linalg.pinv(hidden) @ hidden) < 1e-6


def test_shift_works_under_autocast():
    model, data, _ = classifier()
    expected = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        result = shift_(model, [data], ShiftConfig(verify=False))
    assert result.shifted
    shift_(expected, [data])
    # The first layer's inputs are the data itself.
    assert relative(model.stem.weight, expected.stem.weight) < 1e-6


@pytest.fixture(name="fresh_compiler")
def fixture_fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("way", ["wrapped", "in place", "part"])
def test_compiled_models_train_and_shift_as_they_do_uncompiled(way):
    plain = network()
    model = copy.deepcopy(plain)
    if way == "wrapped":
        called = torch.compile(model, backend="aot_eager")
    elif way == "in place":
        model.compile(backend="aot_eager")
        called = model
    else:
        model[0] = torch.compile(model[0], backend="aot_eager")
        called = model
    results = []
    for trained, run in ((plain, plain), (model, called)):
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        shift = OptimumShift(run, every=2)
        with shift.attach(optimizer), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            for inputs, labels in batches(5):
                step(run, optimizer, inputs, labels)
        results.append(shift.result)
    assert [layer.rows for layer in results[1].layers] == [8, 8]
    for first, second in zip(plain.parameters(), model.parameters(), strict=True):
        assert relative(second, first) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(shift_(called, [batches(1, seed=9)[0][0]]).shifted) == 2
