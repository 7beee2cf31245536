"""A layer solved towards a teacher: least squares, the ball around it by a slow way, refusals that change nothing."""

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn
from torch_cases import relative, same, weights

from onnx_optshift.errors import InputError
from onnx_optshift.torch import distill_


@pytest.fixture(name="pair")
def fixture_pair():
    """(student, teacher, inputs): the student's last layer sees fewer features than the teacher has."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    teacher = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 3))
    return student, teacher, torch.randn(50, 6)


def centred(values):
    values = values.detach().double().numpy()
    return values - values.mean(0)


def test_without_a_tolerance_it_is_least_squares_with_the_bias(pair):
    student, teacher, inputs = pair
    features = student[:2](inputs).detach().double().numpy()
    targets = teacher(inputs).detach().double().numpy()
    solved = np.linalg.lstsq(np.hstack([features, np.ones((50, 1))]), targets, rcond=None)[0]
    found = distill_(student, teacher, inputs.split(20), "2")
    assert relative(student[2].weight, solved[:-1].T) < 1e-5
    assert relative(student[2].bias, solved[-1]) < 1e-5
    assert found.distance_after < found.distance_before
    assert found.rows == 50
    assert found.distance_after == pytest.approx(
        np.linalg.norm(student(inputs).detach().numpy() - targets) / np.linalg.norm(centred(teacher(inputs))), rel=1e-4
    )


@pytest.mark.parametrize("least", ["change", "norm"])
@pytest.mark.parametrize("tolerance", [0.1, 0.5])
def test_within_a_tolerance_it_is_the_ridge_solution_on_the_balls_edge(pair, least, tolerance):
    """Ridge regression whose penalty is found by bisection: the textbook's way to the same constrained problem."""
    student, teacher, inputs = pair
    rows, targets = centred(student[:2](inputs)), centred(teacher(inputs))
    start = student[2].weight.detach().double().numpy().T if least == "change" else np.zeros((9, 3))
    lacking = targets - rows @ start
    floor = np.linalg.norm(rows @ np.linalg.lstsq(rows, lacking, rcond=None)[0] - lacking)
    allowed = np.hypot(floor, tolerance * np.linalg.norm(lacking))
    ridge = lambda mu: np.linalg.solve(rows.T @ rows + np.exp(mu) * np.eye(9), rows.T @ lacking)  # noqa: E731
    mu = optimize.brentq(lambda m: np.linalg.norm(rows @ ridge(m) - lacking) - allowed, -20, 20, xtol=1e-12)
    distill_(student, teacher, [inputs], "2", tolerance=tolerance, least=least)
    assert relative(student[2].weight, (start + ridge(mu)).T) < 1e-5


def test_the_whole_tolerance_leaves_the_weight_as_it_is(pair):
    student, teacher, inputs = pair
    before = student[2].weight.detach().clone()
    distill_(student, teacher, [inputs], "2", tolerance=1.0)
    assert relative(student[2].weight, before) < 1e-6


def test_a_student_that_is_its_own_teacher_learns_nothing(pair):
    student, _, inputs = pair
    outputs = student(inputs)
    assert distill_(student, student, [(inputs, torch.zeros(50))], "2").distance_before < 1e-6
    assert relative(student(inputs), outputs) < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer": "1"}, "not a Linear"),
        ({"layer": "0"}, r"Expected one call, and one output of \[..., 9\]"),
        ({"tolerance": -1}, "tolerance from 0 to 1"),
        ({"least": "both"}, "least as one of"),
        ({"data": []}, "no batch"),
        ({"teacher": lambda x: x[:10, :3]}, "10"),
        ({"teacher": lambda x: x[:, :3] * torch.nan}, "NaN"),
    ],
)
def test_what_cannot_be_used_changes_nothing(pair, change, words):
    student, teacher, inputs = pair
    before = weights(student)
    given = {"teacher": teacher, "data": [inputs], "layer": "2"} | change
    with pytest.raises(InputError, match=words):
        distill_(student, **given)
    assert same(before, weights(student))
    assert student.training
