import pytest

from compress.reports import units


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (11_534_336, "B", "11.53 MB"),
        (999, "B", "999 B"),
        (2_000_000_000, "B", "2 GB"),
        (0.9455, "fraction", "94.5 %"),
        (0.0123, "s", "12.30 ms"),
        (75.4, "s", "75.4 s"),
        (245, "s", "4 min 05 s"),
        (7800, "s", "2 h 10 min"),
        (5120.4, "tokens/s", "5,120 tok/s"),
        (3.6, "perplexity", "3.600"),
        (163840.2, "perplexity", "163,840"),
        (5_767_168, "weights", "5.767 M"),
        (None, "B", "–"),
        (0, "nats/token", "0"),
    ],
)
def test_values_are_shown_as_people_read_them(value, unit, shown):
    assert units.human(value, unit) == shown


@pytest.mark.parametrize(
    ("delta", "ratio", "unit", "shown"),
    [
        (-0.01, 0.99, "fraction", "-1.0 pt"),
        (0.2, 1.0588, "perplexity", "+5.9 %"),
        (-7e6, 0.32, "B", "-68 %"),
        (0.04, None, "nats/token", "+0.0400"),
        (-0.0001, 0.9999, "fraction", "+0.0 pt"),
        (-0.0001, 0.9999, "perplexity", "+0.0 %"),
        (0.0, 1.0, "B", "the same"),
        (None, None, "B", "–"),
    ],
)
def test_changes_are_points_for_fractions_and_percent_otherwise(delta, ratio, unit, shown):
    assert units.change(delta, ratio, unit) == shown


def test_areas_stand_right_after_their_metric():
    names = ["weights_bytes", "accuracy/b", "own_metric", "perplexity", "accuracy", "accuracy/a"]
    assert units.order(names) == ["perplexity", "accuracy", "accuracy/a", "accuracy/b", "weights_bytes", "own_metric"]


def test_settings_stand_in_the_order_of_their_numbers():
    names = ["decode_tokens_per_second/batch 16", "decode_tokens_per_second/batch 4", "decode_tokens_per_second"]
    assert units.order(names) == names[::-1]
