"""The experiment of "Improving Generalization of Deep Neural Networks by Optimum Shifting" (arXiv 2405.14111), small.

    python tools/paper.py --data cifar10_jpeg.npz --out DIR --run [--size small] [--device cpu] [--only REGEX]
    python tools/paper.py --out DIR --list | --table

`--run` does what is missing, row after row: a row is a training, or what a shift after one makes of it, and becomes a
line of `DIR/SIZE.csv` when it is finished. It may be paused or killed at any time, and started again. Trained networks
are kept in `DIR/states`. `--table` writes `docs/paper.csv`, the picture, and the tables of `docs/paper.md`.

The data file is that of `train_cifar.py`. A `small` training takes about 25 seconds of one CPU core; `long` is the
same for three times as many epochs; `text` is a task of 128 classes (`paper_snippets.py`) and needs no file; `full` is
ResNet-18 and DenseNet-121 on 49,000 images, for a GPU.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from paper_figures import Seen, figures, last_layer, seen
from paper_networks import Network, network
from paper_page import differences, picture, tables
from paper_snippets import Snippets
from paper_training import RECIPES, Clock, Data, Images, Setting, train
from torch import Tensor

from onnx_optshift.torch import ShiftConfig, shift_

SEEDS = (0, 1, 2)
EARLY = 0.7  # of the steps: shifts stop there, and training goes on
DECAYS, NOISES = (0.0, 0.01), (0.0, 0.2, 0.4)
# What held-out images choose from, by their loss.
CHOOSES_FROM = {"ball": (0.0, 0.03, 0.1, 0.3), "scale": (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2)}


@dataclass(frozen=True)
class Job:
    """A row: a training, and what is done after it.

    Attributes:
        after: `""`; `"os"`, the exact shift on all training images; `"sos2"` and the like, the exact shift on so many
            times the number of classes; `"ball"`, the smallest norm within a tolerance that held-out images choose;
            `"scale"`, no shift at all but logits times a factor that they choose, to hold the others against.
    """

    setting: Setting
    after: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What tells rows apart, as in the CSV."""
        return (*(str(value) for value in asdict(self.setting).values()), self.after)


KEYS = (*(field.name for field in fields(Setting)), "after")


def plan(size: str) -> list[Job]:
    """All rows of a size, what matters most first."""
    return {"text": text_plan, "long": long_plan}.get(size, image_plan)()


def long_plan() -> list[Job]:
    """Rows of CIFAR-10 without wrong labels, for long enough that features collapse."""
    cells = [Setting("resnet", d, 0.0, seed=s) for d, s in itertools.product(reversed(DECAYS), SEEDS)]
    after = ("", "ball", "scale", "sos0.5", "sos1", "sos2", "sos4", "os")
    return [
        job
        for some in (cells[: len(SEEDS)], cells[len(SEEDS) :])
        for job in (
            *(Job(cell, name) for cell in some for name in after),
            *(Job(replace(cell, during=2)) for cell in some),
        )
    ]


def text_plan() -> list[Job]:
    """Rows of the task of many classes."""
    cells = [Setting("mlp", d, n, seed=s) for s, n, d in itertools.product(SEEDS, (0.0, 0.2), (0.0, 0.002))]
    jobs = [Job(cell) for cell in cells]
    jobs += [Job(cell, after) for cell in cells for after in ("ball", "scale", "sos0.5", "sos1", "sos2", "sos4", "os")]
    jobs += [Job(replace(cell, during=factor)) for factor in (1, 2) for cell in cells]
    return jobs + [Job(replace(cell, during=2, until=EARLY)) for cell in cells]


def image_plan() -> list[Job]:
    """Rows of CIFAR-10."""
    cells = [Setting("resnet", d, n, seed=s) for s, n, d in itertools.product(SEEDS, NOISES, DECAYS)]
    clean = [cell for cell in cells if not cell.noise]
    few = [cell for cell in cells if cell.noise < 0.4]
    jobs = [Job(replace(cell, during=factor)) for cell in cells for factor in (0, 2)]
    jobs += [Job(cell, after) for cell in cells for after in ("ball", "scale", "sos1", "sos2", "sos4", "os")]
    jobs += [Job(replace(cell, during=2), "ball") for cell in cells]
    jobs += [Job(cell, "sos0.5") for cell in clean]
    jobs += [Job(replace(cell, optimizer="sam")) for cell in clean]
    jobs += [Job(replace(cell, during=2, until=EARLY)) for cell in few]
    jobs += [Job(replace(cell, kind="densenet", during=factor)) for cell in clean for factor in (0, 2)]
    jobs += [Job(replace(cell, optimizer="sam")) for cell in few if cell.noise]
    jobs += [Job(replace(cell, during=factor)) for factor in (1, 4) for cell in few]
    jobs += [Job(replace(cell, during=2, layers="all")) for cell in few]
    jobs += [Job(replace(cell, optimizer="sam", during=2)) for cell in few]
    # The usual weight decay: in a training this short it does nearly nothing.
    jobs += [Job(replace(cell, decay=5e-4)) for cell in clean if not cell.decay]
    return jobs


class Results:
    """The rows that are finished, in a CSV file that is whole at every moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                # A line cut short, by another program's hand, has None for what it lacks: its row is run again.
                self.rows = [row for row in csv.DictReader(file) if None not in row.values() and None not in row]

    def has(self, job: Job) -> bool:
        """Whether a row is finished."""
        return any(tuple(row[key] for key in KEYS) == job.key for row in self.rows)

    def add(self, job: Job, found: dict[str, float | str]) -> None:
        """Adds a finished row and replaces the file."""
        values = {key: value if isinstance(value, str) else f"{value:.6g}" for key, value in found.items()}
        self.rows.append(dict(zip(KEYS, job.key, strict=True)) | values)
        write_csv(self.path, self.rows)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    """Puts a whole file in place at once."""
    started = path.with_suffix(".part")
    with started.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(started, path)


@dataclass(frozen=True)
class Held:
    """A trained network with its data, and what reaches its classifier: the same for all that is done after it."""

    data: Data
    net: Network
    clock: Clock
    parts: dict[str, Seen]


class Runner:
    """Runs rows of one size."""

    def __init__(self, data: Path | None, out: Path, size: str, device: str) -> None:
        self.states, self.size, self.device, self.recipe = out / "states", size, device, RECIPES[size]
        self.states.mkdir(parents=True, exist_ok=True)
        self.source = Snippets(self.recipe) if size == "text" else Images(data, out / "decoded.npz", self.recipe)
        self.results = Results(out / f"{size}.csv")
        self.held: tuple[Setting, Held] | None = None  # the last one

    def run(self, job: Job) -> dict[str, float | str]:
        """The figures of a row."""
        if self.held is None or self.held[0] != job.setting:
            data = self.source.data(job.setting.noise, job.setting.seed)
            net, clock = self.trained(job.setting, data)
            parts = {name: seen(net, getattr(data, name)) for name in ("train", "heldout", "test")}
            self.held = job.setting, Held(data, net, clock, parts)
        held = self.held[1]
        net = copy.deepcopy(held.net)
        chosen = shifted_after(net, job, held.parts) if job.after else ""
        return {
            **figures(net, held.data, held.parts["train"], held.parts["test"]),
            "epoch_cpu": held.clock.cpu,
            "epoch_wall": held.clock.wall,
            "epoch_shifting": held.clock.shifting,
            "tolerance": chosen,
        }

    def trained(self, setting: Setting, data: Data) -> tuple[Network, Clock]:
        """The network of a setting, trained now or before."""
        path = self.states / (self.size + "_" + "_".join(map(str, asdict(setting).values())) + ".pt")
        torch.manual_seed(setting.seed)
        net = network(self.size, setting.kind, self.source.classes).to(self.device)
        if not path.exists():
            clock = train(net, setting, data, self.recipe)
            started = path.with_suffix(".part")
            torch.save({"state": net.state_dict(), "clock": asdict(clock)}, started)
            os.replace(started, path)
        stored = torch.load(path, map_location=self.device, weights_only=True)
        net.load_state_dict(stored["state"])
        return net.eval(), Clock(**stored["clock"])


def shifted_after(net: Network, job: Job, parts: dict[str, Seen]) -> str:
    """Shifts the classifier in place; the tolerance or factor that was chosen, where one was."""
    layer = net.classifier
    features, labels = parts["train"].features.to(layer.weight.device), parts["train"].labels
    if job.after in CHOOSES_FROM:
        start = copy.deepcopy(layer.state_dict())
        trials: list[tuple[float, float, dict[str, Tensor]]] = []
        for value in CHOOSES_FROM[job.after]:
            layer.load_state_dict(start)
            if job.after == "scale":
                layer.load_state_dict({name: value * tensor for name, tensor in start.items()})
            elif value:
                plain = ShiftConfig(tolerance=value, tolerance_of="layers", row_weighting="none", verify=False)
                shift_(layer, [features], plain)
            trials.append((last_layer(net, parts["heldout"])[1], value, copy.deepcopy(layer.state_dict())))
        _, value, state = min(trials, key=lambda trial: trial[0])
        layer.load_state_dict(state)
        return str(value)
    if job.after == "os":
        shift_(layer, [features], ShiftConfig(verify=False))
        return ""
    size = round(float(job.after.removeprefix("sos")) * layer.out_features)
    met = labels < size  # of fewer samples than classes, one for each of as many classes
    config = ShiftConfig(stochastic=size, seed=job.setting.seed, verify=False)
    shift_(layer, [(features[met.to(features.device)], labels[met])], config)
    return ""


def missing(results: Results, size: str, only: str) -> list[Job]:
    """Rows that are not finished; with `only`, those whose key it is found in."""
    return [job for job in plan(size) if not results.has(job) and re.search(only, ",".join(job.key))]


def run(runner: Runner, only: str = "") -> int:
    """Runs what is missing; returns how many rows that were."""
    jobs = missing(runner.results, runner.size, only)
    for job in jobs:
        found = runner.run(job)
        runner.results.add(job, found)
        print(",".join(job.key), f"test {found['test_accuracy']:.4f} trace {found['trace']:.4g}", flush=True)
    return len(jobs)


def write_page(out: Path, docs: Path) -> None:
    """The rows of all sizes in `out` but the tests', as CSV, tables and picture."""
    found = {size: Results(out / f"{size}.csv").rows for size in RECIPES if size != "tiny"}
    rows = [{"size": size, **row} for size, some in found.items() for row in some]
    write_csv(docs / "paper.csv", rows)
    batches = [row for row in rows if row["noise"] == "0.0" and (row["after"] or "0")[:3] in {"0", "sos"}]
    pictures = {
        "paper": [row for row in rows if row["size"] == "small" and row["after"] != "sos0.5"],
        "paper_batches": [row for row in batches if row["optimizer"] == "sgd" and row["during"] == "0"],
    }
    for name, some in pictures.items():
        (docs / f"{name}.svg").write_text(picture(some), encoding="utf-8")
    page, text = docs / "paper.md", {"figures": tables(rows), "differences": differences(rows)}
    content = page.read_text(encoding="utf-8")
    for name, table in text.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = content.partition(begin)
        content = f"{head}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(content, encoding="utf-8")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an .npz of JPEG bytes")
    parser.add_argument("--out", type=Path, required=True, help="folder of results and trained networks")
    parser.add_argument("--size", choices=sorted(RECIPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="regular expression: rows whose key, as --list shows it, matches")
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("run", "list", "table"):
        what.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args()
    size, out = arguments.size, arguments.out
    if arguments.list:
        print(*(",".join(job.key) for job in missing(Results(out / f"{size}.csv"), size, arguments.only)), sep="\n")
    elif arguments.table:
        write_page(out, Path(__file__).parents[1] / "docs")
    elif arguments.data is None and size != "text":
        parser.error("--run needs --data")
    else:
        if arguments.device == "cpu":
            torch.set_num_threads(1)
        run(Runner(arguments.data, out, size, arguments.device), arguments.only)


if __name__ == "__main__":
    main()
