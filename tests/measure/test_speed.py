"""The timing loop over engines, with engines and a clock that are made up: every figure is known beforehand."""

import dataclasses

import pytest

from compress.measure.bandwidth import last_cache_bytes, read_bandwidth
from compress.measure.energy import Meter
from compress.measure.engine import Engine
from compress.measure.measurements import Cell, SpeedSettings
from compress.measure.running import speed_detail
from compress.measure.speed import Stopwatch, rows, time_engines

SETTINGS = SpeedSettings(prompt=8, decode_prompt=4, new_tokens=5, rounds=3, warmup=1)
PROMPT = list(range(100, 140))


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """Nothing here leaves anything behind, and a collection in a large process takes long."""
    monkeypatch.setattr("compress.measure.speed.gc.collect", lambda: 0)


class Time:
    """A clock that engines move on; a log of who worked."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now


class Fake(Engine):
    """`read` seconds a prompt token and row, `write` seconds a step; the first step after a prompt costs nothing."""

    largest_batch = 8

    def __init__(self, time, name="a", read=0.5, write=2.0, **traits):
        self.time, self.name, self.read, self.write = time, name, read, write
        self.fresh = False
        for key, value in traits.items():
            setattr(self, key, value)

    def logits(self, ids):
        return None

    def prefill(self, ids):
        self.held = len(ids) * len(ids[0])
        self.time.now += self.read * self.held
        self.time.log.append((self.name, len(ids), len(ids[0])))
        self.fresh, self.rows, self.written = True, len(ids), 0

    def step(self):
        self.time.now += 0 if self.fresh else self.write
        self.fresh, self.written = False, self.written + 1
        return [0] * self.rows


def timed(*engines, settings=SETTINGS, meter=None, free=10**12, tell=None):
    watch = Stopwatch(clock=engines[0].time, meter=meter, free=lambda: free)
    return time_engines(engines, PROMPT, settings, watch, tell)


def test_figures_are_tokens_by_the_time_that_they_took():
    (found,) = timed(Fake(Time()))
    assert found.rounds == {
        "prefill_tokens_per_second": [2.0] * 3,
        "first_token_seconds": [4.0] * 3,
        "decode_tokens_per_second": [0.5] * 3,
    }
    assert found.reasons == {}


def test_as_many_tokens_are_written_as_the_settings_say():
    engine = Fake(Time())
    timed(engine)
    assert engine.written == 5


def test_engines_take_turns():
    time = Time()
    timed(Fake(time, "a"), Fake(time, "b"))
    reading = [name for name, _, length in time.log if length == 8]
    assert reading == ["a", "b"] * 4  # one round of warm-up and three that count


def test_the_warm_up_is_not_counted():
    time = Time()
    slow = Fake(time)
    prefill = slow.prefill
    slow.prefill = lambda ids: (prefill(ids), setattr(time, "now", time.now + (1000 if len(time.log) < 2 else 0)))
    (found,) = timed(slow)
    assert found.rounds["prefill_tokens_per_second"] == [2.0] * 3


def test_batches_and_prompts_are_settings_of_their_own():
    settings = SpeedSettings(8, 4, 5, rounds=2, warmup=0, batches=(1, 4), prompts=(16,))
    (found,) = timed(Fake(Time()), settings=settings)
    cells = ("", "/batch 4", "/prompt 16", "/batch 4, prompt 16")
    assert {name for name in found.rounds if name.startswith("decode")} == {
        f"decode_tokens_per_second{c}" for c in cells
    }
    assert found.rounds["decode_tokens_per_second/batch 4"] == [2.0] * 2
    assert found.rounds["first_token_seconds/prompt 16"] == [8.0] * 2
    assert found.rounds["first_token_seconds/batch 4, prompt 16"] == [32.0] * 2


def test_a_large_batch_reads_and_writes_about_as_much_as_one_row_but_where_a_prompt_is_asked_for():
    settings = SpeedSettings(512, 32, 64, batches=(1, 4, 64), prompts=(128,))
    found = {c.name: (settings.length(c), settings.before_writing(c), settings.written(c)) for c in settings.cells()}
    assert found == {
        "": (512, 32, 64), "batch 4": (128, 32, 16), "batch 64": (32, 32, 16),
        "prompt 128": (128, 128, 64), "batch 4, prompt 128": (128, 128, 16), "batch 64, prompt 128": (128, 128, 16),
    }  # fmt: skip
    assert all(Cell.named(cell.name) == cell for cell in settings.cells())
    time = Time()
    timed(Fake(time), settings=SpeedSettings(16, 4, 5, rounds=1, warmup=0, batches=(2,)))
    assert {(rows, length) for _, rows, length in time.log} == {(1, 16), (1, 4), (2, 8), (2, 4)}


LONG = SpeedSettings(8, 4, 5, rounds=6, warmup=1, batches=(4,), prompts=(16,))


def test_a_setting_that_would_take_too_long_gets_fewer_rounds_and_the_plain_one_all():
    # Batch 4 reads 4 x 4 tokens twice, 16 s, and takes 4 steps, 8 s; warming up 22 s. A fourth would end at 118 s.
    (found,) = timed(Fake(Time()), settings=dataclasses.replace(LONG, prompts=(), most_seconds=110))
    assert len(found.rounds["decode_tokens_per_second"]) == 6
    assert len(found.rounds["decode_tokens_per_second/batch 4"]) == 3
    assert found.reasons == {}


def test_a_setting_of_which_no_round_fits_is_left_out_for_all_with_the_reason():
    time = Time()
    settings = dataclasses.replace(LONG, most_seconds=50)
    for found in timed(Fake(time), Fake(time), settings=settings):
        assert "decode_tokens_per_second" in found.rounds
        reason = found.reasons["prefill_tokens_per_second/batch 4, prompt 16"]
        assert "a round would take about" in reason
        assert "benchmark.setting_seconds allows the setting 50 s" in reason
        assert not any("batch 4, prompt 16" in name for name in found.rounds)


def test_without_a_limit_every_setting_gets_all_rounds():
    (found,) = timed(Fake(Time()), settings=LONG)
    assert {len(rounds) for rounds in found.rounds.values()} == {6}


def test_rows_of_a_batch_differ_and_have_one_length():
    found = rows(PROMPT, 3, 5)
    assert found[0] == PROMPT[:5]
    assert len({tuple(row) for row in found}) == 3
    assert {len(row) for row in found} == {5}


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        ({"largest_batch": 2}, "takes a batch of 2 at most"),
        ({"cache_bytes": lambda: 400}, "the cache would take"),
        ({"context": 30}, "do not fit in the context of 30"),
    ],
)
def test_a_setting_that_cannot_be_is_null_with_the_reason(traits, reason):
    settings = SpeedSettings(8, 4, 5, rounds=2, warmup=0, batches=(4,), prompts=(28,))
    (found,) = timed(Fake(Time(), **traits), settings=settings, free=7000)
    left = {name: said for name, said in found.reasons.items() if reason in said}
    assert left
    assert not set(left) & set(found.rounds)
    assert "decode_tokens_per_second" in found.rounds


def test_memory_that_runs_out_in_a_batch_leaves_only_that_batch_out():
    class Short(Fake):
        def prefill(self, ids):
            if len(ids) > 1:
                raise MemoryError
            super().prefill(ids)

    time = Time()
    settings = SpeedSettings(8, 4, 5, rounds=2, warmup=0, batches=(4,))
    short, other = timed(Short(time), Fake(time), settings=settings)
    assert short.reasons["decode_tokens_per_second/batch 4"] == "the memory does not suffice"
    assert len(short.rounds["decode_tokens_per_second"]) == 2
    assert len(other.rounds["decode_tokens_per_second/batch 4"]) == 2


def test_memory_that_does_not_hold_one_row_is_an_error():
    class Short(Fake):
        def prefill(self, ids):
            raise MemoryError

    with pytest.raises(MemoryError):
        timed(Short(Time()))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    class Broken(Fake):
        def step(self):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timed(Broken(Time()))


def test_what_does_not_write_is_timed_reading():
    (found,) = timed(Fake(Time(), generates=False))
    assert set(found.rounds) == {"prefill_tokens_per_second"}


def test_settings_are_cut_to_the_smallest_context():
    time = Time()
    timed(Fake(time, context=6), Fake(time))
    assert max(length for _, _, length in time.log) == 5


def test_energy_is_joules_by_generated_token():
    class Joules(Meter):
        def __init__(self, time):
            self.time = time

        def read(self, processes=()):
            return [3 * self.time.now]

    time = Time()
    (found,) = timed(Fake(time), meter=Joules(time))
    assert found.rounds["energy_joules_per_token"] == [6.0] * 3  # 2 seconds a token at 3 watts


def test_progress_is_told_round_by_round():
    told = []
    timed(Fake(Time()), tell=lambda *said: told.append(said))
    assert [done for done, *_ in told] == [1, 2, 3, 4]
    assert {total for _, total, *_ in told} == {4}


def test_bandwidth_is_the_buffers_bytes_by_the_seconds_of_a_round(monkeypatch):
    monkeypatch.setattr("compress.measure.bandwidth.BUFFER_BYTES", 1 << 12)
    monkeypatch.setattr("compress.measure.bandwidth.last_cache_bytes", lambda: 1 << 10)
    ticks = iter(range(100))
    assert read_bandwidth(clock=lambda: next(ticks)) == [8 << 10] * 7


def test_the_largest_cache_is_read_from_the_kernel(tmp_path):
    for index, size in enumerate(("32K", "2M", "?")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_cache_bytes(tmp_path) == 2 << 20
    assert last_cache_bytes(tmp_path / "nowhere") == 0


def test_the_share_of_the_bandwidth_counts_each_step_once():
    costs = {"read_bytes": 1000, "bandwidth": 8000.0}
    assert speed_detail(costs, "decode_tokens_per_second", 2.0)["bandwidth_share"] == 0.25
    assert speed_detail(costs, "decode_tokens_per_second/batch 4, prompt 16", 8.0)["bandwidth_share"] == 0.25
    assert speed_detail(costs, "prefill_tokens_per_second", 8.0) == {}


def test_a_figure_says_what_was_read_and_written():
    costs = {"settings": dataclasses.asdict(SpeedSettings(512, 32, 64, batches=(4,)))}
    said = {"batch": 4, "prompt_tokens": 128}
    assert speed_detail(costs, "prefill_tokens_per_second/batch 4", 1.0) == said
    assert speed_detail(costs, "first_token_seconds/batch 4", 1.0) == said
    written = {"batch": 4, "prompt_tokens": 32, "new_tokens": 16}
    assert speed_detail(costs, "decode_tokens_per_second/batch 4", 1.0) == written
    assert speed_detail(costs, "energy_joules_per_token/batch 4", 1.0) == written
