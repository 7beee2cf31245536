"""The web page: well-formed, complete, self-contained, and true to the report whatever names and figures it holds."""

import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from reports import HOSTILE_SHOWN, RANGE, REPORTS, report

from onnx_optshift.report import htmlpage
from onnx_optshift.report.figures import text, typeset
from onnx_optshift.report.section import Facts, Note, Table
from onnx_optshift.report.sections import KINDS, sections

VOID = {"br", "meta", "hr", "img", "link", "input", "wbr"}
# A page that has every section.
EVERYTHING = dataclasses.replace(RANGE, layers=report().layers, flatness=REPORTS["flatness"].flatness)


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


@pytest.fixture(scope="module")
def pages():
    """Each report rendered once; a function of its name."""
    rendered = {}

    def get(name):
        if name not in rendered:
            rendered[name] = htmlpage.render(EVERYTHING if name == "everything" else REPORTS[name])
        return rendered[name]

    return get


@pytest.mark.parametrize("name", [*REPORTS, "everything"])
def test_well_formed_and_self_contained(name, pages):
    source = pages(name)
    found = Page(source)
    source.encode("utf-8")
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
    styles = source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in styles
    assert "@import" not in styles
    assert "://" not in source


@pytest.mark.parametrize("broken", ["<p><b>x</p></b>", "<div>", "</div>", '<a id="1" id="2"></a>'])
def test_the_parser_notices_what_is_broken(broken):
    with pytest.raises(AssertionError):
        Page(broken)


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_says_all_that_the_sections_say(name, pages):
    found = Page(pages(name)).text
    for section in sections(REPORTS[name]):
        for block in section.blocks:
            said = []
            match block:
                case Note():
                    said = [text(block.text)]
                case Facts():
                    said = [part for row in block.rows for part in (text(row.label), text(row.remark))]
                    said += [(text(row.value), typeset(text(row.value))) for row in block.rows]
                case Table():
                    said = [(text(cell), typeset(text(cell))) for row in block.rows for cell in row]
            for part in said:
                forms = part if isinstance(part, tuple) else (part,)
                assert any(" ".join(form.split()) in found for form in forms), part


@pytest.mark.parametrize("name", REPORTS)
def test_the_heading_names_the_command(name, pages):
    result = REPORTS[name]
    source = pages(name)
    assert f'<p class="kind">{KINDS[result.command]}, onnx-optshift 0.1.0</p>' in source
    assert ("shift report" in Page(source).text.lower()) == (result.command == "shift")


def test_the_first_screen_is_the_summary_the_next_step_and_the_warnings(pages):
    top = pages("range").partition("<body>")[2].partition("<nav")[0]
    order = [
        '<p class="summary">1 of 2 layers shifted.</p>',
        '<p class="next">Next: --tolerance 0.1 may give more.</p>',
        "few samples.",
        "Asked for:",
        "output error, 4 bits",
        "<dt>range</dt>",
        "held-out loss in float",
    ]
    places = [top.index(part) for part in order]
    assert places == sorted(places)
    assert "norm" not in top


def test_the_chosen_trial_is_marked(pages):
    row = next(row for row in pages("auto").split("<tr>") if "</span> chosen</span>" in row)
    assert "all layers at residual 0.1<" in row
    assert pages("auto").count("</span> chosen</span>") == 1
    assert "</span> chosen</span>" not in pages("shift")


def curves(source):
    """Each layer's spectrum: what is read out, the place of the rank, and the line's points."""
    pattern = r'<svg class="curve".*?aria-label="(.*?)"><line x1="([\d.]+)".*?<polyline points="(.*?)"/></svg>'
    return [
        (label, float(x), [tuple(map(float, point.split(","))) for point in points.split()])
        for label, x, points in re.findall(pattern, source)
    ]


def test_a_spectrum_is_drawn_where_it_has_an_end(pages):
    (label, mark, points), *more = curves(pages("shift"))
    assert label == "spectrum, rank 61/64"
    assert mark == pytest.approx(100 * 61 / 64)
    # 1, 0.5, 1e-3, 1e-9 and 0: logarithmic, on the floor below 1e-6, and no point for what has no logarithm.
    assert points == [(0, 0), (25, pytest.approx(1.2, abs=0.05)), (50, 12), (75, 24)]
    assert not more, "the other layer's rank is full"
    assert not curves(pages("no layers"))
    assert len(curves(pages("200 layers"))) == 200
    # The control: a spectrum that is not finite is not drawn.
    assert len(curves(pages("not finite"))) == 1


def test_colours_come_from_the_page(pages):
    source = pages("everything")
    style = source.partition("<style>")[2].partition("</style>")[0]
    used = set(re.findall(r"var\(--([\w-]+)\)", source))
    assert used <= set(re.findall(r"--([\w-]+):", style))
    assert {"before", "after", "good", "warn", "bad"} <= used
    assert not re.findall(r"#[0-9a-f]{6}\b", source.replace(style, ""))


def test_numbers_keep_their_full_value(pages):
    assert '<data class="" value="2.125e-08">2.1×10⁻⁸</data>' in pages("shift")


def bars(source, section):
    """Lengths of the bars of each row, in per cent, in the tables of a section."""
    found = source.partition(f'<h2 id="{section}">')[2].partition("</section>")[0]
    rows = [re.findall(r'<i style="width: ([\d.]+)%">', row) for row in found.split("<tr>")]
    return [[float(length) for length in row] for row in rows if row]


def test_bars_are_as_long_as_the_figures_say(pages):
    # Norms 4 -> 3, and another layer that stays at 4; then 0.5 -> 0.4 and 0.5.
    assert bars(pages("shift"), "layers") == [[100.0, 75.0], [100.0, 100.0]]
    assert bars(pages("range"), "layers") == [[100.0, 80.0], [100.0, 100.0]]
    assert bars(pages("range"), "quantization") == [[100.0, 75.0]] * 4
    # The original's loss and those of the trials, on one scale: 0.13, 0.12, 0.12 and 0.2.
    assert bars(pages("auto"), "heldout") == [[65.0], [60.0], [60.0], [100.0]]
    assert bars(pages("range"), "heldout") == [[100.0]] + [[pytest.approx(100 * 0.102 / 0.115, abs=0.01)]] * 2
    assert bars(pages("shift"), "frontier") == [[100.0], [pytest.approx(100 * 0.6 / 0.875, abs=0.01)]]
    # Figures that are not finite have none, and do not shrink those of others.
    assert bars(pages("not finite"), "layers") == [[100.0, 75.0]]


def test_statuses_are_told_in_words_and_signs(pages):
    found = Page(pages("200 layers")).text
    for status, sign in (("shifted", "✓ "), ("unchanged", ""), ("rejected", "! ")):
        assert found.count(f"{sign}{status}") >= sum(one.status == status for one in REPORTS["200 layers"].layers)


def test_failure_is_not_hidden(pages):
    found = Page(pages("not finite"))
    assert "FAILED: not within bounds" in found.text
    assert "Verified" not in found.text
    assert found.text.count("not a number") > 3
    assert "infinite" in found.text
    assert '<p class="bad">' in pages("not finite")
    assert '<p class="bad">' not in pages("shift")


def test_hostile_names_are_text(pages):
    found = Page(pages("hostile"))
    # Layer, reasons, skip, setting and its value, summary, warning, output, trial, ... each as plain text.
    assert found.text.count(HOSTILE_SHOWN) >= 13
    assert "\x1b" not in pages("hostile")
    assert "\u202e" not in pages("hostile")


def test_names_are_whole(pages):
    found = Page(pages("200 layers")).text
    assert all(one.name in found for one in REPORTS["200 layers"].layers)


def test_rows_have_as_many_cells_as_the_head(pages):
    for name in (*REPORTS, "everything"):
        for table in re.findall(r"<table.*?</table>", pages(name), re.DOTALL):
            rows = [len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
            assert len(set(rows)) == 1, (name, rows)


def test_same_report_same_page(pages):
    assert htmlpage.render(EVERYTHING) == pages("everything")
    assert pages("shift") != pages("everything")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--enable-logging=stderr"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# Runs after layout; the page itself has no script, and its policy would stop this one.
MEASURE = """<script>
const drawn = [...document.querySelectorAll(".curve, .bars")];
const wide = drawn.map(element => Math.round(element.getBoundingClientRect().width));
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
        assert shown.count("<svg") == 1

    def test_a_script_is_stopped_and_noticed(self, pages, tmp_path):
        broken = pages("shift").replace("</body>", "<script>document.title = 'ran'</script></body>")
        shown, messages = chromium(tmp_path, broken, "--dump-dom")
        assert messages
        assert "<title>ran</title>" not in shown

    @pytest.mark.parametrize("name", [*REPORTS, "everything"])
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
        assert all(90 < int(drawn) <= room for drawn in filter(None, found[3].split(",")))

    def test_prints(self, pages, tmp_path):
        chromium(tmp_path, pages("everything"), f"--print-to-pdf={tmp_path / 'page.pdf'}")
        data = (tmp_path / "page.pdf").read_bytes()
        assert data.startswith(b"%PDF")
        assert 3 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 10
