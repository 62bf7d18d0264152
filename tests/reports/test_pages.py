import re
from html.parser import HTMLParser

import pytest

from compress.errors import StartError
from compress.reports import render
from compress.reports.html import page
from compress.reports.report import Other, Report
from compress.reports.table import comparison_table, headline, markdown


class Loads(HTMLParser):
    """Every address that a page would fetch, and whether tags are closed."""

    def __init__(self):
        super().__init__()
        self.addresses, self.scripts, self.svgs, self.text, self.open = [], 0, 0, [], []

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.svgs += tag == "svg"
        self.addresses += [v for k, v in attributes if k in ("src", "href", "data", "action", "poster") and v]
        if tag not in ("meta", "br", "link", "img", "path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def parsed(text: str) -> Loads:
    found = Loads()
    found.feed(text)
    return found


def test_the_page_loads_nothing_from_anywhere(make_report):
    text = page(make_report())
    found = parsed(text)
    assert [address for address in found.addresses if not address.startswith("#")] == []
    assert not re.search(r"@import|https?://|url\((?!#)", text)
    assert found.scripts == 0
    assert found.open == []


def test_names_and_generated_text_are_escaped(make_report):
    report = make_report(name="<img src=x onerror=alert(1)>")
    text = page(report)
    assert "<script>" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
    assert "<script>" not in markdown(report)
    assert "<img" not in markdown(report)


def test_the_page_shows_plots_areas_goals_passes_and_provenance(make_report):
    found = parsed(page(make_report()))
    words = " ".join(" ".join(found.text).split())
    assert found.svgs == 2
    expected = [
        "four-bits", "facts", "two hop", "missed", "gptq", "83 MB", "79.10 MB", "97.0 %", "builtin:tiny", "3f2a",
        "model.layers.3.mlp.down_proj", "equal to the last bit", "3.14 times smaller", "A note.",
    ]  # fmt: skip
    assert [said for said in expected if said not in words] == []


def test_drawings_take_their_colours_from_the_page(make_report):
    text = page(make_report())
    assert "#010203" not in text
    assert "var(--series-0)" in text
    assert "prefers-color-scheme: dark" in text


def test_two_drawings_share_no_ids(make_report):
    ids = re.findall(r'\bid="([^"]+)"', page(make_report()))
    assert len(ids) == len(set(ids))


def test_the_same_report_gives_the_same_page(make_report):
    assert page(make_report()) == page(make_report())


@pytest.mark.parametrize(
    ("decode", "verdict", "said"),
    [
        (131.0, "better", "decoding is faster on this machine (1.31 ×)"),
        (100.5, "no_difference", "no speed was gained on this machine"),
        (71.0, "worse", "no speed was gained on this machine: decoding is slower (0.71 ×)"),
    ],
)
def test_the_headline_says_plainly_whether_there_is_speed(make_report, decode, verdict, said):
    sentence = headline(make_report(decode=decode, verdict=verdict))
    assert said in sentence
    assert sentence.startswith("3.1 × smaller; perplexity +5.9 % (3.400 → 3.600)")


def test_an_empty_report_and_one_model_alone_still_make_a_page(make_report):
    assert "</html>" in page(Report())
    alone = make_report().model_copy(update={"compressed": {}, "comparison": {}, "stages": [], "goals": []})
    assert "Perplexity" in page(alone)
    assert "| Perplexity | 3.400 |" in markdown(alone)


def test_markdown_has_the_rows_of_the_table(make_report):
    text = markdown(make_report())
    assert "| Perplexity | 3.400 | 3.600 | +5.9 % | worse |" in text
    assert "| Weights on disk | 11.53 MB | 3.670 MB | -68 % | better |" in text
    assert "**missed**" in text


def test_the_terminal_table_has_original_compressed_change_and_verdict(make_report):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(make_report()))
    console.file.close()
    lines = console.export_text().splitlines()
    (line,) = [line for line in lines if "Perplexity" in line]
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == ["Perplexity", "3.400", "3.600", "+5.9 %", "worse"]


def test_pages_are_made_again_from_the_json(make_report, tmp_path):
    make_report().write(tmp_path / "a")
    first = (tmp_path / "a" / "report.html").read_text()
    (tmp_path / "a" / "report.html").unlink()
    assert render([tmp_path / "a"]) == tmp_path / "a" / "report.html"
    assert (tmp_path / "a" / "report.html").read_text() == first


def test_several_runs_make_one_page_that_compares_them(make_report, tmp_path):
    for name, decode in (("four-bits", 100.0), ("three-bits", 120.0), ("half", 90.0)):
        make_report(name=name, decode=decode).write(tmp_path / name)
    path = render([tmp_path / "four-bits", tmp_path / "three-bits", tmp_path / "half"])
    assert path == tmp_path / "four-bits" / "comparison.html"
    words = " ".join(parsed(path.read_text()).text)
    for name in ("four-bits", "three-bits", "half"):
        assert name in words
    assert "3 runs compared" in words


def test_the_further_models_of_a_benchmark_are_set_side_by_side(make_report):
    report = make_report()
    report.recipe["models"] = ["a", "runs/two", "runs/three/model"]
    report.others = [Other(model="runs/three/model", measurements=report.compressed, comparison=report.comparison)]
    words = " ".join(parsed(page(report)).text)
    assert "two" in words
    assert "three" in words
    assert "## runs/three/model" in markdown(report)


def test_no_folder_is_refused():
    with pytest.raises(StartError, match="needs the folder"):
        render([])


def test_a_pass_that_saw_no_text_shows_the_error_of_its_weights(make_report):
    report = make_report()
    blocks = [{**block, "error": None} for block in report.stages[0].blocks]
    report.stages = [report.stages[0].model_copy(update={"pass_": "rtn", "blocks": blocks})]
    found = parsed(page(report))
    assert found.svgs == 2
    assert "rtn (weights)" in " ".join(found.text)
