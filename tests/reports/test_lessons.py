"""What a student has learnt stands in the report: each area, and what the differences are."""

import numpy as np

from compress.measure.areas import summarised
from compress.reports import html
from compress.reports.lessons import lesson_tables
from compress.reports.markdown import markdown


def _taught(report, control=True):
    draw = np.random.default_rng(0)

    def items(share):
        return {area: (draw.random(100) < share).astype(int).tolist() for area in ("facts", "sums")}

    scores = {"teacher": items(0.95), "before": items(0.3), "control": items(0.6), "after": items(0.9)}
    if not control:
        del scores["control"]
    report.stages[0].measurements["areas"] = summarised(scores)
    return report


def test_every_area_has_a_row_for_teacher_student_and_control(make_report):
    (found,) = lesson_tables(_taught(make_report()))
    assert found.columns == ["area", "teacher", "student before", "student after", "text alone"]
    assert [row[0] for row in found.rows] == ["facts", "sums", "mean"]
    assert [sentence.partition(":")[0] for sentence in found.sentences] == [
        "Student after training, less teacher", "Student after training, less student before",
        "Student after training, less text alone",
    ]  # fmt: skip
    assert "(95 % interval +" in found.sentences[1]
    (alone,) = lesson_tables(_taught(make_report(), control=False))
    assert alone.columns[-1] == "student after"


def test_what_the_teacher_wrote_is_said_and_that_the_control_was_without_it(make_report):
    for control, words in ((True, " The text alone is that without them."), (False, "")):
        report = _taught(make_report(), control)
        report.stages[0].measurements["generated"] = {"tokens": 999_936}
        (found,) = lesson_tables(report)
        assert found.sentences[-1] == f"The teacher wrote 999,936 tokens of the text itself.{words}"


def test_both_pages_show_it_and_a_report_without_does_not(make_report):
    report = _taught(make_report())
    for page in (markdown(report), html.page(report)):
        assert "Accuracy by area: gptq" in page
        assert "student before" in page
    assert "student before" not in markdown(make_report()) + html.page(make_report())
