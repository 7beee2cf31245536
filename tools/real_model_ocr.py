"""Text recognition models of RapidOCR's wheels (PP-OCR), and rendered lines of text for them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from real_model_texts import paragraphs

HEIGHT, WIDTH = 48, 320  # of the package's own preprocessing: lines are padded, or squeezed, to this
CALIBRATION, HELDOUT = 200, 300
LONGEST = 24  # characters
FONTS = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf", "cmr10.ttf", "cmss10.ttf", "cmtt10.ttf")
NO_TEXT = ("Display", "NonUni")
CHARACTERS, TEXTS = "characters.json", "heldout_texts.json"


def make(folder: Path, source: Path) -> None:
    """Copies the model and renders its data.

    Args:
        folder: Gets all files.
        source: The model inside the installed wheel.
    """
    import onnx

    shutil.copyfile(source, folder / "model.onnx")
    model = onnx.load(source)
    listed = next(entry.value for entry in model.metadata_props if entry.key == "character")
    characters = [*listed.splitlines(), " "]
    (folder / CHARACTERS).write_text(json.dumps(characters), encoding="utf-8")
    rng, name = random.Random(0), model.graph.input[0].name
    texts = _lines(rng, CALIBRATION + HELDOUT, set(characters))
    images = np.stack([_prepared(_rendered(text, rng)) for text in texts])
    np.savez(folder / "calibration.npz", **{name: images[:CALIBRATION]})
    np.savez(folder / "heldout.npz", **{name: images[CALIBRATION:]})
    (folder / TEXTS).write_text(json.dumps(texts[CALIBRATION:]), encoding="utf-8")


def _lines(rng: random.Random, count: int, characters: set[str]) -> list[str]:
    """A few words that follow each other, from different paragraphs."""
    found: list[str] = []
    for paragraph in paragraphs(80, 400):
        words = paragraph.split()
        start = rng.randrange(len(words))
        text = " ".join(words[start : start + rng.randint(1, 4)])
        if 4 <= len(text) <= LONGEST and set(text) <= characters:
            found.append(text)
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} lines of text were found of {count}: Python came without its docstrings")


def _rendered(text: str, rng: random.Random) -> NDArray[np.uint8]:
    """A picture `[height, width, 3]` of one line: a font, dark on light or light on dark, less sharp, with noise."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted(
        path for pattern in FONTS for path in fonts.glob(pattern) if not any(n in path.name for n in NO_TEXT)
    )
    font = ImageFont.truetype(str(rng.choice(files)), 32)
    left, top, right, bottom = font.getbbox(text)
    pad = rng.randint(3, 8)
    ink, paper = rng.randint(0, 90), rng.randint(160, 255)
    if rng.random() < 0.3:
        ink, paper = paper, ink
    image = Image.new("L", (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad), paper)
    ImageDraw.Draw(image).text((pad - left, pad - top), text, fill=ink, font=font)
    blurred = image.rotate(rng.uniform(-1, 1), fillcolor=paper).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.6)))
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, rng.uniform(0, 20), (image.height, image.width))
    pixels = np.clip(np.asarray(blurred, np.float64) + noise, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=2)


def _prepared(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As RapidOCR prepares a line: height 48, values in [-1, 1], 0 to the right of it, `[3, 48, 320]`."""
    from PIL import Image

    width = min(WIDTH, -(-HEIGHT * pixels.shape[1] // pixels.shape[0]))
    resized = Image.fromarray(pixels).resize((width, HEIGHT), Image.Resampling.BILINEAR)
    found = np.zeros((3, HEIGHT, WIDTH), np.float32)
    found[:, :, :width] = (np.asarray(resized, np.float32) / 255 - 0.5).transpose(2, 0, 1) / 0.5
    return found


class ExactMatch:
    """Share of the lines that are read without a mistake: the best symbol of each step, repeats and blanks left out."""

    def __init__(self, folder: Path) -> None:
        self._characters = ["", *json.loads((folder / CHARACTERS).read_text(encoding="utf-8"))]
        self._texts = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
        self._right: list[bool] = []

    def update(
        self, feeds: dict[str, NDArray[np.generic]], _: NDArray[np.float32], output: NDArray[np.float32]
    ) -> None:
        """Counts a batch of outputs `[n, steps, symbols]`."""
        for steps in output.argmax(-1):
            kept = [step for k, step in enumerate(steps) if k == 0 or step != steps[k - 1]]
            self._right.append("".join(self._characters[step] for step in kept) == self._texts[len(self._right)])

    def result(self) -> dict[str, float]:
        """The share in per cent."""
        return {"exact match, %": 100 * float(np.mean(self._right))}
