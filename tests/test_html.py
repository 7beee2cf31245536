"""The web page: well-formed, complete, self-contained, and true to the report whatever names and figures it holds."""

import dataclasses
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
from reports import FULL_RANK, LONG, layer, output, report, skipped, unchanged

from onnx_optshift.errors import InputError
from onnx_optshift.report import htmlpage
from onnx_optshift.report.figures import change, number_text, percent
from onnx_optshift.report.findings import findings, verdict
from onnx_optshift.report.model import FrontierPoint, HeldoutResult, NoiseFloor, Score, Trial, Verification

VOID = {"br", "meta", "hr", "img", "link", "input"}
HOSTILE = '</td><script>alert("x")</script>$\\frac{$ #0a0b01 \x1b[31m\u202e\ud800\'&amp;'
QUANTIZATION = tuple(
    {"layer": name, "bits": bits, "error_before": 0.8 / 2**bits, "error_after": 0.6 / 2**bits}
    for name in ("fc1.weight", "fc2.weight")
    for bits in (8, 4, 3, 2)
)
SHARPNESS = tuple({"sigma": s, "before": 30 * s * s, "after": 20 * s * s} for s in (0.01, 0.03, 0.1))
FLATNESS = {"loss": "cross-entropy", "trace_before": 105.5, "trace_after": 88.25, "sharpness": SHARPNESS}
# The form that a diagnosis has: each figure with its standard error, and both models in one mapping.
ESTIMATES = {
    "trace": {"before": {"value": 105.5, "error": 3.0}, "after": {"value": 88.25, "error": 2.5}, "change": None},
    "sharpness": tuple(
        {"sigma": row["sigma"], "rise": {side: {"value": row[side], "error": 0.01} for side in ("before", "after")}}
        for row in SHARPNESS
    ),
}
CHECKS = (
    {"name": "every class present", "status": "fail", "figure": "8 of 10", "advice": "Add samples of 3 and 7."},
    {"name": "freedom exists", "status": "pass", "figure": "3 of 61 directions", "advice": ""},
)
COLLAPSE = {"nc1": 1.25, "verdict": {"answer": "try small", "why": "Classes are missing.", "checks": CHECKS}}
CHARTS = {
    "freedom",
    "spectrum",
    "norm",
    "range",
    "frontier-norm",
    "frontier-range",
    "heldout",
    "quantization",
    "flatness",
}


class Page(HTMLParser):
    """A page taken apart: fails on tags that do not match, keeps text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def ids(self):
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]

    def charts(self):
        return {i.removeprefix("chart-") for i in self.ids() if i.startswith("chart-")}


def page(**changes):
    """A page without layers, whose charts take the most time."""
    return Page(htmlpage.render(report(**({"layers": ()} | changes))))


def many(count=200):
    statuses = ("shifted", "unchanged", "rejected")
    return tuple(
        layer(
            name=f"{LONG}_{k}", status=statuses[k % 3], reason=statuses[k % 3], rank=10 + k % 54, norm_after=2.0 + k % 3
        )
        for k in range(count)
    )


def trial(**changes):
    fields = {
        "what": "all layers at residual 0.1",
        "tolerance": 0.1,
        "loss": 0.12,
        "top1": 0.95,
        "mean_difference": -0.01,
        "standard_error": 0.004,
        "accepted": True,
        "reason": "held-out data is served no worse",
    }
    return Trial(**(fields | changes))


def heldout(*tried):
    return HeldoutResult(Score(0.13, 0.95, 200), Score(0.12, 0.96, 200), True, "cross-entropy on logits", tuple(tried))


REPORTS = {
    "plain": report(),
    "everything": report(quantization=QUANTIZATION, flatness=FLATNESS, collapse=COLLAPSE),
    "estimates": report(flatness=ESTIMATES, collapse={"verdict": "no-go", "checks": CHECKS}),
    "inspection": report(verification=None, heldout=None, heldout_result=None),
    "no layers": report(layers=(), heldout=None, heldout_result=None),
    "only skips": report(layers=(skipped("/a"),)),
    "nothing known": report(
        layers=(layer(status="unchanged", **dict.fromkeys(("d", "m", "rank", "groups", "norm_before", "norm_after"))),),
        calibration=None,
        heldout=None,
        heldout_result=None,
        verification=None,
        peak_memory_bytes=None,
    ),
    "not finite": report(
        layers=(
            layer(norm_after=math.nan, range_before=math.inf, measured_residual=math.nan),
            layer(frontier=(FrontierPoint(0.0, math.nan, None), FrontierPoint(0.1, math.inf, 0.5))),
        ),
        verification=Verification(
            passed=False,
            outputs=(output(rel=math.nan, max_abs=math.inf, passed=False),),
            noise_floor=NoiseFloor(math.inf, math.nan, None, ("one thread",), 8, 4, None),
        ),
        heldout_result=heldout(trial(loss=math.nan), trial(tolerance=0.2, standard_error=math.inf)),
        quantization=({"layer": "a", "bits": 4, "error_before": "NaN", "error_after": math.nan},),
        flatness={"trace_before": math.nan, "trace_after": None, "sharpness": [{"sigma": 0.1, "before": math.inf}]},
    ),
    "hostile": report(
        layers=(layer(name=HOSTILE, node=HOSTILE, op_type=HOSTILE, reason=HOSTILE), skipped(HOSTILE, HOSTILE)),
        settings={HOSTILE: HOSTILE},
        summary=HOSTILE,
        warnings=(HOSTILE,),
        verification=Verification(True, (output(name=HOSTILE),), report().verification.noise_floor, 2, (HOSTILE,)),
        heldout_result=heldout(trial(what=HOSTILE, reason=HOSTILE)),
        quantization=({"layer": HOSTILE, "bits": 4, "error_before": 0.2, "error_after": 0.1},),
        decisions=(HOSTILE,),
        flatness={HOSTILE: HOSTILE, "verdict": {"answer": HOSTILE, "why": HOSTILE, "checks": ({HOSTILE: HOSTILE},)}},
    ),
    "unicode": report(layers=(layer(name="層/注意/クエリ"), layer(name="ü" * 300), unchanged("الطبقة"))),
    "200 layers": report(layers=many()),
}


@pytest.fixture(scope="module")
def pages():
    """Each report rendered once; a generator of text by name."""
    rendered = {}

    def get(name):
        if name not in rendered:
            rendered[name] = htmlpage.render(REPORTS[name])
        return rendered[name]

    return get


@pytest.mark.parametrize("name", REPORTS)
def test_well_formed_and_self_contained(name, pages):
    text = pages(name)
    found = Page(text)
    text.encode("utf-8")
    ids = found.ids()
    assert len(ids) == len(set(ids))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in found.elements
    }
    for tag, attrs in found.elements:
        assert not any(key.startswith("on") for key in attrs), f"<{tag}> runs something"
        assert "src" not in attrs
        for target in [attrs["href"]] if "href" in attrs else []:
            assert target.startswith("#"), target
            assert target[1:] in ids, target
        for target in re.findall(r"url\((.*?)\)", " ".join(filter(None, attrs.values()))):
            assert target[1:] in ids, target
    styles = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in styles
    assert "@import" not in styles
    assert "://" not in text


@pytest.mark.parametrize(
    "broken",
    ["<p><b>x</p></b>", "<div>", "</div>", '<a id="1" id="2"></a>'],
)
def test_the_parser_notices_what_is_broken(broken):
    with pytest.raises(AssertionError):
        Page(broken)


def test_all_charts(pages):
    found = Page(pages("everything"))
    assert found.charts() == CHARTS
    drawings = found.all("svg")
    assert len(drawings) == len(CHARTS)
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 20 for attrs in drawings)
    assert len(found.all("figcaption")) == len(CHARTS)
    assert "mathdefault" not in found.text  # numbers, not their markup


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("plain", {"quantization", "flatness"}),
        ("inspection", {"heldout", "quantization", "flatness"}),
        ("no layers", CHARTS),
        ("only skips", CHARTS - {"heldout"}),
        ("estimates", {"quantization"}),
    ],
)
def test_charts_only_of_what_is_there(name, absent, pages):
    assert Page(pages(name)).charts() == CHARTS - absent


def test_colours_come_from_the_page(pages):
    text = pages("everything")
    style = text.partition("<style>")[2].partition("</style>")[0]
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used <= set(re.findall(r"--([\w-]+):", style))
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--after)" in drawings
    assert not re.findall(r"#[0-9a-f]{6}\b(?![-\w])", re.sub(r'(href|id)="[^"]*"|url\([^)]*\)', "", drawings))


def test_figures_are_those_of_the_report(pages):
    found = Page(pages("plain"))
    values = [float(attrs["value"]) for attrs in found.all("data")]
    shifted = report().layers[0]
    for expected in (shifted.norm_before, shifted.norm_after, shifted.range_after, shifted.measured_residual):
        assert expected in values
    for text in ("1 of 2", "61 / 64", "64 × 128", "−25 %", "95.61 %", "few samples.", "1 of 2 layers shifted."):
        assert text in found.text.replace("\N{NO-BREAK SPACE}", " "), text
    assert FULL_RANK in found.text
    assert "its weight is computed at run time" in found.text


def test_what_is_needed_to_repeat_is_there(pages):
    text = Page(pages("plain")).text
    whole = report()
    for expected in (whole.model.sha256_in, whole.model.sha256_out, whole.calibration.fingerprint, whole.tool.version):
        assert expected in text
    for key, value in (("objective", "norm"), ("op types", "Gemm"), ("tolerance", "0.0")):
        assert f"{key} {value}" in text


def bar_widths(text, tip):
    """Widths of the bars with this tip, in drawing units."""
    paths = re.findall(rf"<title>{re.escape(tip)}</title><path d=\"([^\"]*)\"", text)
    assert paths, tip
    edges = [[float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)] for path in paths]
    return [max(xs) - min(xs) for xs in edges]


def test_bars_are_as_long_as_the_figures_say(pages):
    text = pages("plain")
    used, free = bar_widths(text, "1 fc1.weight: 61 of 64 directions used, 3 free")
    assert used / (used + free) == pytest.approx(61 / 64, rel=1e-4)
    before, after = bar_widths(text, "1 fc1.weight: 4.00 before, 3.00 after")
    assert after / before == pytest.approx(3 / 4, rel=1e-4)
    # The control: another layer's bars differ.
    other = bar_widths(text, "2 fc2.weight: 64 of 64 directions used, 0 free")
    assert other[1] == pytest.approx(0, abs=1e-6)


def test_statuses_are_told_in_words_and_signs(pages):
    text = Page(pages("200 layers")).text
    for status, sign in (("shifted", "✓"), ("unchanged", "="), ("rejected", "!")):
        assert text.count(f"{sign} {status}") == sum(layer.status == status for layer in REPORTS["200 layers"].layers)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Verified: the written file was run on 1000 samples"),
        ({"model": dataclasses.replace(report().model, output=None)}, "dry run, not written"),
        ({"verification": None}, "Inspection: no model was written"),
    ],
)
def test_status_line(changes, said):
    assert said in page(**changes).text


def test_failure_is_not_hidden(pages):
    found = Page(pages("not finite"))
    assert "Outputs left their bounds" in found.text
    assert "Verified" not in found.text
    assert found.text.count("not a number") > 3
    assert "infinite" in found.text
    assert '<p class="status bad">' in pages("not finite")
    assert '<p class="status bad">' not in pages("plain")


@pytest.mark.parametrize(("tolerance", "source"), [(0.0, "noise"), (0.01, "asked for"), ("auto", "had chosen")])
def test_where_the_bound_comes_from(tolerance, source):
    assert source in page(settings={"tolerance": tolerance}).text.partition("its bound:")[2][:100]


def test_changed_answers_show_at_the_top():
    proof = dataclasses.replace(report().verification, outputs=(output(rel=0.46, bound=0.47, top1_agreement=0.78),))
    assert "same answer on 78.0 %" in page(verification=proof).text.replace("\N{NO-BREAK SPACE}", " ")


def test_held_out_data_that_chose_is_named():
    flatters = "flatters the winner"
    assert flatters in page(heldout_result=heldout(trial(), trial(tolerance=0.2))).text
    assert flatters not in page(heldout_result=heldout(trial())).text


def test_held_out_axis_is_tolerance_or_trial():
    by_tolerance = page(heldout_result=heldout(trial(), trial(tolerance=0.2))).text
    draws = page(heldout_result=heldout(trial(tolerance=0.0), trial(tolerance=0.0, accepted=False))).text
    assert "deviation allowed in each layer" in by_tolerance
    assert "trial, numbered as in the table" in draws
    assert "trial, numbered as in the table" not in by_tolerance


def test_hostile_names_are_text(pages):
    found = Page(pages("hostile"))
    shown = '</td><script>alert("x")</script>$\\frac{$ #0a0b01 \\x1b[31m\\u202e\\ud800\'&amp;'
    # Layer, reasons, skip, setting and its value, summary, warning, output, put back, trial, ... each as plain text.
    assert found.text.count(shown) >= 13
    assert "\x1b" not in pages("hostile")
    assert "\u202e" not in pages("hostile")


def test_long_names_are_cut_on_screen_only(pages):
    text = pages("200 layers")
    found = Page(text)
    titles = [attrs["title"] for attrs in found.all("span") if attrs.get("class") == "name" and "title" in attrs]
    names = [layer.name for layer in REPORTS["200 layers"].layers]
    assert titles == names
    assert all(name in found.text for name in names)
    assert not [a for a in Page(pages("plain")).all("span") if a.get("class") == "name" and "title" in a]


def test_rows_have_as_many_cells_as_the_head(pages):
    for name in ("everything", "200 layers", "estimates"):
        tables = re.findall(r"<table.*?</table>", pages(name), re.DOTALL)
        assert tables
        for table in tables:
            rows = [len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
            assert len(set(rows)) == 1, (name, rows)


def test_same_report_same_page(pages):
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        assert htmlpage.render(REPORTS["everything"]) == pages("everything")
    assert pages("plain") != pages("everything")


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_missing_extra_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"{missing}.*pip install 'onnx-optshift\[report\]'"):
        htmlpage.render(report())


def test_neither_library_is_loaded_before_a_page_is_made():
    code = (
        "import sys; from onnx_optshift.report import htmlpage; "
        "print(*sorted({'jinja2', 'matplotlib', 'markupsafe'} & set(sys.modules)), 'end')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["end"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (18, "18.0"),
        (0.9996, "1.00"),
        (-0.25, "−0.250"),
        (12345.6, "12346"),
        (123456.0, "1.23×10⁵"),
        (3.5e-7, "3.50×10⁻⁷"),
        (-2e-12, "−2.00×10⁻¹²"),
        (math.nan, "not a number"),
        (-math.inf, "−infinite"),
    ],
)
def test_numbers_for_people(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (4.0, 3.0, "−25 %"),
        (4.0, 3.9, "−2.5 %"),
        (4.0, 4.0, "same"),
        (4.0, 3.9999, "−<0.1 %"),
        (2.0, 3.0, "+50 %"),
        (0.0, 1.0, ""),
        (math.nan, 1.0, ""),
        (1.0, None, ""),
    ],
)
def test_change(before, after, text):
    assert change(before, after).replace("\N{NO-BREAK SPACE}", " ") == text


def test_percent():
    assert percent(0.9561).replace("\N{NO-BREAK SPACE}", " ") == "95.61 %"
    assert percent(None) == "–"
    assert percent(math.nan) == "not a number"


def test_findings_of_any_shape():
    found = findings({"step": 0.1, "trace_before": 2.0, "trace_after": 1.0, "counts": {str(k): k for k in range(20)}})
    assert dict(found.facts) == {"step": 0.1, "counts": "20 values, from 0 to 19"}
    (table,) = found.tables
    assert table.columns == ("figure", "before", "after")
    assert table.rows == (("trace", 2.0, 1.0),)
    few = findings({"top": {"lower": 2.401865872, "probes": 8}, "list": [0.5, "a"]})
    assert dict(few.facts) == {"top": "lower: 2.40, probes: 8", "list": "0.500, a"}
    assert findings(None) is findings({"verdict": "go"}) is None


def test_findings_keep_estimates_and_rows():
    found = findings(ESTIMATES)
    assert [table.columns for table in found.tables] == [
        ("figure", "before", "after"),
        ("sigma", "rise before", "rise after"),
    ]
    assert found.tables[0].rows[0][1] == {"value": 105.5, "error": 3.0}
    uneven = findings({"rows": [{"a": 1}, {"b": 2}]}).tables[0]
    assert uneven.rows == ((1, None), (None, 2))


def test_verdict_in_either_form():
    assert verdict(None, {"verdict": "go"}).answer == "go"
    full = verdict(COLLAPSE, None)
    assert (full.answer, full.why) == ("try small", "Classes are missing.")
    assert [row[1] for row in full.checks.rows] == ["fail", "pass"]
    assert verdict(None, {"nc1": 1.0}) is None


def test_verdict_stands_first(pages):
    text = Page(pages("everything")).text
    assert text.index("! try small Classes are missing.") < text.index("What is promised")
    assert "× fail" not in text
    assert "✕ fail" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--enable-logging=stderr"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# Runs after layout; the page itself has no script, and its policy would stop this one.
MEASURE = """<script>
const wide = [...document.querySelectorAll("figure svg")].map(svg => Math.round(svg.getBoundingClientRect().width));
document.title = JSON.stringify({room: innerWidth, used: document.documentElement.scrollWidth, wide});
</script></body>"""


def chromium(tmp_path, text, *flags):
    """Output and console messages of headless Chromium that shows a page."""
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")
class TestInChromium:
    def test_no_console_message(self, pages, tmp_path):
        shown, messages = chromium(tmp_path, pages("everything"), "--dump-dom")
        assert messages == []
        assert shown.count("<svg") == len(CHARTS)

    def test_a_script_is_stopped_and_noticed(self, pages, tmp_path):
        broken = pages("plain").replace("</body>", "<script>document.title = 'ran'</script></body>")
        shown, messages = chromium(tmp_path, broken, "--dump-dom")
        assert messages
        assert "<title>ran</title>" not in shown

    @pytest.mark.parametrize("name", ["everything", "hostile", "200 layers"])
    @pytest.mark.parametrize("width", [390, 1200])
    def test_nothing_is_wider_than_the_screen(self, name, width, pages, tmp_path):
        text = re.sub(r"<meta http-equiv=.*?>", "", pages(name)).replace("</body>", MEASURE)
        # A frame, as a window cannot be made as narrow as a phone.
        escaped = text.replace("&", "&amp;").replace('"', "&quot;")
        inner = f'<iframe style="border:0;width:{width}px;height:9000px" srcdoc="{escaped}"></iframe>'
        report_up = "<script>onload = () => document.title = frames[0].document.title</script>"
        shown, _ = chromium(tmp_path, f"<!DOCTYPE html><title></title>{inner}{report_up}", "--dump-dom")
        found = re.search(r'<title>{"room":(\d+),"used":(\d+),"wide":\[(.*?)\]}</title>', shown)
        assert found, shown[:500]
        room, used = int(found[1]), int(found[2])
        assert room == width
        assert used <= room
        assert all(250 < int(drawn) <= room for drawn in found[3].split(","))

    def test_prints(self, pages, tmp_path):
        chromium(tmp_path, pages("everything"), f"--print-to-pdf={tmp_path / 'page.pdf'}")
        data = (tmp_path / "page.pdf").read_bytes()
        assert data.startswith(b"%PDF")
        assert 3 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 10
