import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compress.errors import StartError
from compress.reports import render
from compress.reports.again import recipe_yaml
from compress.reports.exports import export_rows, export_words
from compress.reports.headline import headline
from compress.reports.heat import heat_maps
from compress.reports.html import page, without_interval
from compress.reports.markdown import markdown
from compress.reports.points import quality_plots
from compress.reports.report import Comparison, Export, Figure, GoalResult, Other, Report
from compress.reports.speeds import speed_table
from compress.reports.table import comparison_table


class Loads(HTMLParser):
    """Every address that a page would fetch, and whether tags are closed."""

    def __init__(self):
        super().__init__()
        self.addresses, self.scripts, self.svgs, self.text, self.open = [], 0, 0, [], []

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.svgs += tag == "svg"
        self.addresses += [v for k, v in attributes if k in ("src", "href", "data", "action", "poster") and v]
        if tag not in ("meta", "br", "link", "img", "path", "use", "rect"):
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
    assert found.scripts == 1  # the page's own, for hovering
    assert found.open == []
    assert len(text) < 200_000


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
        (191.0, "better", "1.9 × faster"),
        (105.0, "better", "1.05 × faster"),
        (100.5, "no_difference", "no faster on this machine"),
        (71.0, "worse", "1.4 × slower on this machine"),
        (120.0, "not_tested", "1.2 × the speed, in too few rounds to be sure"),
    ],
)
def test_the_headline_says_plainly_whether_there_is_speed(make_report, decode, verdict, said):
    sentence = headline(make_report(decode=decode, verdict=verdict))
    areas = "no measurable loss on 1 of 2 areas; facts lost 14.0 points; perplexity rose by 5.9 %."
    assert sentence == f"3.1 × smaller, {said}, {areas}"


def test_the_headline_without_areas_is_of_perplexity_and_with_nothing_lost_says_so(make_report):
    report = make_report()
    fine = report.comparison["accuracy/two_hop"]
    report.comparison |= {"accuracy/facts": fine, "perplexity": fine}
    assert headline(report).endswith("no measurable loss on any of 2 areas.")
    report = make_report()
    for name in ("accuracy/facts", "accuracy/two_hop"):
        del report.comparison[name]
    assert headline(report).endswith("perplexity +5.9 % (3.400 → 3.600).")


def test_an_area_with_parts_is_counted_by_its_parts(make_report):
    report = make_report()
    report.comparison["accuracy/facts/old"] = report.comparison["accuracy/two_hop"]
    assert "no measurable loss on any of 2 areas" in headline(report)


def test_every_missed_goal_has_a_red_line_with_what_was_reached(make_report):
    report = make_report()
    report.goals.append(GoalResult(metric="weights_bytes", goal="-60%", met=True, value=3_670_016))
    report.goals.append(GoalResult(metric="accuracy", goal="-1pt", met=False, value=0.87))
    text = page(report)
    lines = re.findall(r'<ul class="missed-lines">(.*?)</ul>', text, re.DOTALL)[0]
    assert lines.count("<li>") == 2
    assert "Goal missed: perplexity +2%, reached 3.600 (+5.9 %)." in lines
    assert "Goal missed: accuracy -1pt, reached 87.0 % (-7.0 pt)." in lines
    assert text.count('<tr class="missed">') == 2
    assert "Goal missed: perplexity +2%, reached 3.600 (+5.9 %)." in markdown(report)
    del report.goals[2], report.goals[0]
    assert 'missed-lines">' not in page(report)


def test_intervals_stand_in_their_column_as_the_change_does(make_report):
    text = page(make_report())
    assert "+5.3 to +6.5 %" in text
    assert "-6.3 to -7.7 pt" in text
    assert "worse by 0.200</span>" in re.sub(r"\s+</span>", "</span>", text)
    assert without_interval("worse by 2 points (95 % interval 1 to 3 points; p 0.01)") == "worse by 2 points (p 0.01)"


def test_an_empty_report_and_one_model_alone_still_make_a_page(make_report):
    assert "</html>" in page(Report())
    alone = make_report().model_copy(update={"compressed": {}, "comparison": {}, "stages": [], "goals": []})
    assert "Perplexity" in page(alone)
    assert "| Perplexity | 3.400 |" in markdown(alone)


def test_markdown_has_the_rows_of_the_table(make_report):
    text = markdown(make_report())
    assert "| Perplexity | 3.400 | 3.600 | +5.9 % | +5.3 to +6.5 % | worse |" in text
    assert "| Weights on disk | 11.53 MB | 3.670 MB | -68 % | – | better |" in text
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


def test_a_pass_that_measured_nothing_shows_what_it_states_of_its_layers(make_report):
    report = make_report()
    blocks = [{**block, "error": None} for block in report.stages[0].blocks]
    report.stages = [report.stages[0].model_copy(update={"pass_": "rtn", "blocks": blocks})]
    (found,) = heat_maps(report)
    assert found.columns == ["mlp.down_proj"]
    assert [row.cells[0].text for row in found.rows] == ["0", "2.0", "4.0", "6.0"]
    assert found.worst[0] == ("model.layers.3.mlp.down_proj", "6.0 %")
    assert "as the pass states it" in page(report)


def damaged(report):
    """The report with a measured damage: one block with experts, one that was removed."""
    layers = {"mlp.experts.0.up_proj": 0.001, "mlp.experts.1.up_proj": 0.1, "self_attn.q_proj": 0.01}
    blocks = [
        {"name": "model.layers.0", "error": 0.02, "kl": 0.001, "rise": 0.002, "layers": layers},
        {"name": "model.layers.1", "error": 0.5, "kl": 0.1, "rise": -0.01, "layers": {}, "removed": True},
    ]
    worst = [{"layer": "model.layers.0.mlp.experts.1.up_proj", "error": 0.1}]
    loss = {"before": 1.0, "after": 1.05, "rise": 0.05, "stderr": 0.01}
    text = {"source": "a.txt", "role": "evaluation", "windows": 4, "length": 256}
    measured = {"text": text, "loss": loss, "kl": 0.06, "blocks": blocks, "worst": worst}
    figures = {
        "perplexity": {"value": 3.5, "unit": "perplexity"}, "weights_bytes": {"value": 9e6, "unit": "B"},
        "tokens": {"seen": 5},
    }  # fmt: skip
    first = report.stages[0].model_copy(update={"pass_": "depth", "damage": measured, "measurements": figures})
    nothing = {"value": None, "reason": "why"}
    last = first.model_copy(
        update={
            "pass_": "rotate",
            "damage": {"loss": nothing, "kl": nothing, "blocks": [], "worst": [], "reason": "why"},
        }
    )
    report.stages = [first, last]
    return report


def test_measured_damage_is_drawn_as_blocks_by_kinds_of_layer(make_report):
    first, last = heat_maps(damaged(make_report()))
    assert first.columns == ["KL", "output", "mlp.experts.*.up_proj", "self_attn.q_proj"]
    assert first.loss == "loss +0.050 nats (± 0.020) a token; KL of the whole pass 0.060 nats"
    kept, gone = first.rows
    assert [cell.text for cell in kept.cells] == ["0.0010", "2.0", "10", "1.0"]
    assert kept.cells[2].tip == "model.layers.0.mlp.experts.1.up_proj: 10 %"
    assert gone.removed
    assert [cell.text for cell in gone.cells] == ["0.10", "50", "–", "–"]
    assert gone.cells[1].shade > kept.cells[2].shade > kept.cells[1].shade > kept.cells[3].shade > 0
    assert (last.rows, last.reason) == ([], "why")
    text, words = page(damaged(make_report())), markdown(damaged(make_report()))
    assert text.count('<table class="map">') == 1
    assert "Why." in text
    assert "| 0 | 0.0010 | 2.0 | 10 | 1.0 |" in words
    assert "| 1 (removed) | 0.10 | 50 | – | – |" in words


def test_a_stage_that_was_measured_is_a_point_on_the_way(make_report):
    (size, latency) = quality_plots(damaged(make_report()))
    assert size.svg.count('class="mark"') == 3
    assert 'data-tip="1 depth: perplexity 3.500, 9 MB"' in size.svg
    assert latency.svg.count('class="mark"') == 2
    assert "<title>compressed: perplexity 3.600 (3.580 to 3.620), 100 tok/s</title>" in latency.svg


def test_a_stage_that_was_timed_is_placed_by_its_ratio_to_the_original_it_was_timed_beside(make_report):
    report = damaged(make_report(decode=200.0))
    speed = {"value": 10.0, "unit": "tokens/s", "detail": {"original": 5.0, "ratio": 2.0}}
    report.stages[0].measurements["decode_tokens_per_second"] = speed
    (_, latency) = quality_plots(report)
    assert 'data-tip="1 depth: perplexity 3.500, 10 tok/s, 2 times the original\'s"' in latency.svg
    found = re.findall(r'id="latency-tip(\d)".*?<use [^>]*x="([\d.]+)"', latency.svg, re.DOTALL)
    (_, original), (_, stage), (_, compressed) = sorted(found)
    assert stage == compressed != original  # 2 times the original's 100 tokens a second are the compressed model's 200
    assert "| depth | bits 4 |" in markdown(report)
    assert "| 2.00 × (10 tok/s) |" in markdown(report)


def test_a_name_with_signs_of_formulas_is_drawn_as_it_is(make_report):
    report = make_report(name="a $\\frac b$ <c>")
    assert "a $\\frac b$ &lt;c&gt;" in quality_plots(report, [make_report(name="other")])[0].svg


def test_a_model_without_perplexity_is_plotted_by_accuracy(make_report):
    report = make_report()
    for figures in (report.original, report.compressed):
        del figures["perplexity"]
    plot = quality_plots(report)[0]
    assert "Higher is better" in plot.caption
    assert "accuracy 87.0 %" in plot.svg


def test_changed_items_and_worst_texts_are_shown_where_there_are_any(make_report):
    class WithChanges(Report):
        flips: dict
        worst: list

    flips = {
        "right_to_wrong": 3, "wrong_to_right": 1, "items": 400,
        "areas": {"two_hop": {"right_to_wrong": 3, "wrong_to_right": 1, "items": 200}},
        "examples": [{"area": "two_hop", "change": "right_to_wrong", "text": "Who <i>?", "answer": "Ada"}],
    }  # fmt: skip
    worst = [{"window": 2, "kl": 0.31, "text": "At the bridge", "token": " lost", "token_kl": 2.5, "before": "Jana"}]
    report = WithChanges(**make_report().model_dump(by_alias=True) | {"flips": flips, "worst": worst})
    for text in (page(report), markdown(report)):
        assert "Of 400 items, 3 that were right are wrong now, and 1 that were wrong are right." in text
        assert "Who &lt;i&gt;?" in text
        assert "At the bridge" in text
        assert "Most at “ lost” (2.5 nats), after “…Jana”." in text or "Most at “ lost” (2.5 nats)" in text
    assert "changed sides" not in page(make_report())


def test_the_recipe_shown_is_a_recipe_that_gives_the_same_digest(tmp_path, make_report):
    from compress.recipe import Recipe

    recipe = Recipe.load(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    report = make_report()
    report.recipe, report.digest = recipe.canonical(), recipe.digest()
    (tmp_path / "again.yaml").write_text(recipe_yaml(report))
    assert Recipe.load(tmp_path / "again.yaml").digest() == recipe.digest()
    assert recipe.digest() in page(report)
    assert "compress run four-bits.yaml" in page(report)
    assert "compress run four-bits.yaml" in markdown(report)


def test_the_page_that_compares_runs_is_written_where_it_is_asked_for(make_report, tmp_path):
    for name, decode in (("one", 100.0), ("two", 120.0)):
        make_report(name=name, decode=decode).write(tmp_path / name)
    target = tmp_path / "pages" / "both.html"
    assert render([tmp_path / "one", tmp_path / "two"], target) == target
    text = target.read_text()
    assert text.count('class="mark"') == 6  # the original and both runs, against size and against speed
    words = (tmp_path / "pages" / "both.md").read_text()
    assert "| two | 3.670 MB -68 % |" in words
    make_report(name="one").write(tmp_path / "three")
    words = render([tmp_path / "one", tmp_path / "three"], target).with_suffix(".md").read_text()
    assert "**one (one)**" in words
    assert "**one (three)**" in words
    with pytest.raises(StartError, match="is a folder"):
        render([tmp_path / "one"], tmp_path)


def timed(report):
    """The report with speeds in further settings and in another runtime, and one that did not fit."""
    details = {"batch": 1, "prompt_tokens": 32, "new_tokens": 64, "bandwidth_bytes_per_second": 13e9}
    rates = {"": (100.0, 120.0), "batch 4": (300.0, 280.0), "llama.cpp": (100.0, 150.0), "prompt 1024": (None, None)}
    for name, values in rates.items():
        for base, unit in (("decode_tokens_per_second", "tokens/s"), ("first_token_seconds", "s")):
            metric = f"{base}/{name}" if name else base
            batch = 4 if name == "batch 4" else 1
            for figures, value, share in zip((report.original, report.compressed), values, (0.48, 0.058), strict=True):
                detail = details | {"batch": batch} | ({"bandwidth_share": share} if base[0] == "d" else {})
                figures[metric] = (
                    Figure(value=None, reason="it does not fit in the context of 512") if value is None
                    else Figure(value=value, unit=unit, higher_is_better=True, detail=detail)
                )  # fmt: skip
            if values[0]:
                ratio = values[1] / values[0]
                verdict = "better" if ratio > 1 else "worse"
                report.comparison[metric] = Comparison(delta=1.0, ratio=ratio, verdict=verdict, sentence="said")
    return report


def test_settings_of_speed_have_a_table_of_their_own_with_their_share_of_the_bandwidth(make_report):
    report = timed(make_report())
    table = speed_table(report)
    assert table.columns == ["reading", "first token", "writing", "of the bandwidth"]
    assert [name for name, *_ in table.rows] == ["batch 1", "batch 4", "llama.cpp, batch 1"]
    cells = {name: cells for name, _, cells in table.rows}
    assert (cells["batch 4"][2].text, cells["batch 4"][2].verdict) == ("300 → 280 tok/s", "worse")
    assert cells["batch 1"][3].text == "48 → 5.8 %"
    assert table.rows[1][1] == "4 × 32 tokens read, 4 × 64 written"
    assert table.left_out == ["batch 1, prompt 1024: it does not fit in the context of 512"]
    text, words = page(report), markdown(report)
    for shown in (text, words):
        assert "Speed by batch and prompt" in shown
        assert "48 → 5.8 %" in shown
        assert "Left out: batch 1, prompt 1024: it does not fit in the context of 512." in shown
        assert "13 GB a second" in shown
    assert "| batch 4 |" in words
    assert "| Decode speed: batch 4 |" not in words
    assert "| Decode speed | 100 tok/s | 120 tok/s | +20 % |" in words
    assert "Decode speed: batch 4" not in text


def test_without_further_settings_the_share_stands_with_the_speed(make_report):
    report = make_report()
    for figures, share in ((report.original, 0.48), (report.compressed, 0.31)):
        figure = figures["decode_tokens_per_second"]
        figures["decode_tokens_per_second"] = figure.model_copy(update={"detail": {"bandwidth_share": share}})
    said = "at 31 % of what the memory's bandwidth allows (original 48 %)"
    assert speed_table(report) is None
    assert said.replace("'", "&#39;") in page(report)
    assert said in markdown(report)
    assert "Speed by batch" not in page(report)


EXPORT = Export(
    format="gguf", path="exports/gguf", bytes=2_900_000, by="llama.cpp", reloaded=True, allowed=0.05,
    kl_divergence=0.00012, mean_logprob_difference=0.0081, exact_difference=2e-6, same_tokens=True,
)  # fmt: skip


def test_checks_of_exports_are_shown_in_a_table_on_every_page(make_report):
    report = make_report()
    report.exports = [EXPORT, EXPORT.model_copy(update={"format": "onnx", "exact_difference": None})]
    row = ["exports/gguf", "2.900 MB", "llama.cpp", "1.2e-4 (0.0025)", "0.0081 (0.050)", "2.0e-6 (0.0010)", "yes"]
    assert export_rows(report)[0] == row
    assert export_rows(report)[1][5] == "–"
    assert f"| {' | '.join(row)} |" in markdown(report)
    words = " ".join(" ".join(parsed(page(report)).text).split())
    assert " ".join(row) in words
    assert "## Exports" not in markdown(make_report())
    assert export_words(EXPORT).startswith("exports/gguf (2.900 MB) was reloaded by llama.cpp in a fresh process")


def test_colour_is_spoken_of_only_where_there_is_colour(make_report):
    for report in (make_report(), damaged(make_report())):
        assert "Colour: more is worse" in page(report)
        assert "olour" not in markdown(report)
        assert "rror" in markdown(report)
