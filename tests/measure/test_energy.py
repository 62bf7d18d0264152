"""Energy: what the counters say, what happens at their wrap, and that an estimate says it is one."""

import pytest

from compress.measure import energy
from compress.measure.energy import CpuEstimate, EnergyCounter, GraphicsCounter, find_meter, why_no_energy


def test_the_energy_counter_adds_packages_and_survives_its_wrap(tmp_path):
    for i, value in enumerate((9_000_000, 2_000_000)):
        folder = tmp_path / f"intel-rapl:{i}"
        folder.mkdir()
        (folder / "energy_uj").write_text(str(value))
        (folder / "max_energy_range_uj").write_text("10000000")
    counter = EnergyCounter.find(tmp_path)
    before = counter.read()
    assert before == pytest.approx([9.0, 2.0])
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("2500000")
    assert counter.since(before) == pytest.approx(2.5)
    assert EnergyCounter.find(tmp_path / "nowhere") is None


def test_the_estimate_is_cpu_seconds_times_watts(monkeypatch):
    monkeypatch.setattr(energy.time, "process_time", iter([2.0, 5.0]).__next__)
    meter = CpuEstimate(15)
    assert meter.since(meter.read()) == 45
    assert meter.detail["estimated"]


def test_an_engines_own_processes_are_estimated_too(monkeypatch):
    class Times:
        user, system = 1.0, 0.5

    class Process:
        def __init__(self, pid):
            assert pid == 7

        def cpu_times(self):
            Times.user += 1
            return Times

    monkeypatch.setattr(energy.psutil, "Process", Process)
    monkeypatch.setattr(energy.time, "process_time", lambda: 1.0)
    meter = CpuEstimate(10)
    assert meter.since(meter.read([7]), [7]) == 10


def test_nothing_is_estimated_unless_watts_are_given(monkeypatch):
    monkeypatch.setattr(EnergyCounter, "find", classmethod(lambda cls: None))
    assert find_meter("cpu") is None
    assert isinstance(find_meter("cpu", 15), CpuEstimate)
    assert "watts" in why_no_energy("cpu")
    assert "watts" not in why_no_energy("cuda")


def test_a_graphics_counter_gives_joules_and_an_absent_library_none(monkeypatch):
    class Library:
        status = 0

        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, device):
            return 0 if uuid == b"GPU-1" else 2

        def nvmlDeviceGetTotalEnergyConsumption(self, device, found):
            found._obj.value = 2500
            return self.status

    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: Library())
    assert GraphicsCounter.find("GPU-1").read() == [2.5]
    assert GraphicsCounter.find("GPU-2") is None
    monkeypatch.setattr(Library, "status", 3)
    assert GraphicsCounter.find("GPU-1") is None

    def missing(name):
        raise OSError

    monkeypatch.setattr(energy.ctypes, "CDLL", missing)
    assert GraphicsCounter.find("GPU-1") is None
