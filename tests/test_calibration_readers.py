import sys

import numpy as np
import pytest
from calibration_cases import INPUTS, X, arrays, feeds

from onnx_optshift.calibration.load import load
from onnx_optshift.errors import InputError


def script(folder, text, name="feeds.py"):
    (folder / name).write_text("import numpy as np\n" + text)
    return str(folder / name)


def test_default_function_and_siblings_and_dataclasses(tmp_path):
    script(tmp_path, "WIDTH = 3\n", "sibling_of_feeds.py")
    path = script(
        tmp_path,
        "from dataclasses import dataclass\nimport sibling_of_feeds\n@dataclass\nclass Row:\n    value: float\n"
        "def load_data():\n    import sibling_of_feeds as late\n    for i in range(4):\n"
        "        yield {'x': np.full((1, late.WIDTH), Row(i).value, np.float32)}\n",
    )
    before = list(sys.path), set(sys.modules)
    samples = load([path], [X])
    assert len(samples) == 4
    assert samples.source == f"{path}:load_data"
    assert sys.path == before[0]
    assert set(sys.modules) - before[1] <= {"sibling_of_feeds"}
    sys.modules.pop("sibling_of_feeds")


def test_a_script_may_give_arrays_or_a_reader_class(tmp_path):
    text = "def dense():\n    return {'x': np.ones((5, 3), np.float32)}\n"
    text += "class Reader:\n    left = 2\n    def get_next(self):\n        self.left -= 1\n"
    text += "        return {'x': np.ones((1, 3), np.float32)} if self.left >= 0 else None\n"
    path = script(tmp_path, text)
    assert len(load([f"{path}:dense"], [X])) == 5
    assert len(load([f"{path}:Reader"], [X])) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def load_data(:\n", r"feeds\.py, line 2: SyntaxError"),
        ("x = 1 / 0\n", r"feeds\.py, line 2: ZeroDivisionError"),
        ("def load_data():\n    return open('/nowhere')\n", r"feeds\.py, line 3: FileNotFoundError"),
        ("def load_data():\n    yield {}['a']\n", r"feeds\.py, line 3: KeyError"),
        ("def load_data(path):\n    pass\n", r"load_data\(\) missing 1 required positional argument"),
        ("import sys\nsys.exit('no data today')\n", r"feeds\.py, line 3: SystemExit: no data today"),
        ("def load_date():\n    pass\n", r"no function 'load_data'; found load_date\. Close matches: 'load_date'"),
        ("load_data = 3\n", "no function 'load_data'; found none"),
        ("def load_data():\n    return None\n", "not calibration data"),
        ("def load_data():\n    return []\n", "gave no samples"),
        ("def load_data():\n    return lambda: []\n", "not calibration data"),
        ("def load_data():\n    yield 3\n", "feed 0: expected a dict with an array for each of x: float32"),
    ],
)
def test_what_goes_wrong_in_a_script_names_script_and_line(text, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        load([script(tmp_path, text)], [X])
    assert "feeds.py" in str(caught.value)


def test_missing_script(tmp_path):
    with pytest.raises(InputError, match=r"no such script\. Expected a Python file with a function mine\(\)"):
        load([f"{tmp_path}/none.py:mine"], [X])


def test_running_a_script_leaves_nothing_beside_it(tmp_path):
    path = script(tmp_path, "def load_data():\n    return {'x': np.ones((5, 3), np.float32)}\n")
    load([path], [X])
    assert [entry.name for entry in tmp_path.iterdir()] == ["feeds.py"]


@pytest.mark.parametrize("wrong", [None, 3, object(), 1.5])
def test_other_objects_are_refused(wrong):
    with pytest.raises(InputError, match=r"not calibration data\. Expected a path"):
        load([wrong], INPUTS)


def test_an_item_that_is_no_dict_is_named_by_its_position():
    with pytest.raises(InputError, match="feed 2: expected a dict"):
        load([[*feeds(arrays())[:2], "x"]], INPUTS)


def test_failing_generators_and_readers_are_input_errors():
    def failing():
        yield feeds(arrays())[0]
        raise RuntimeError("disk gone")

    class Failing:
        def get_next(self):
            raise RuntimeError("disk gone")

    for source in (failing, failing(), Failing()):
        with pytest.raises(
            InputError, match=r"test_calibration_readers.py, line \d+: RuntimeError: disk gone, in Python"
        ):
            load([source], INPUTS)


def test_what_is_not_an_array_is_named():
    class Stubborn:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("call detach first")

    with pytest.raises(InputError, match=r"feed 0: 'x' \(Stubborn\) is not an array: call detach first"):
        load([[{"x": Stubborn()}]], [X])


def test_the_users_arrays_are_not_changed():
    data = arrays(labels=True)
    before = {name: array.copy() for name, array in data.items()}
    list(load([data, feeds(data)], INPUTS).batches(4))
    for name, array in before.items():
        np.testing.assert_array_equal(array, data[name])
