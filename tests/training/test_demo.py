"""The demo, shortened: it trains, packs, compares, reports, and fails when a packed network disagrees."""

import dataclasses

import pytest

from training import demo

SHORT = ["--seeds", "1", "--set", "run.epochs=1", "--set", "model.width=4"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "LATENCY_REPEATS", 1)
    monkeypatch.setattr(demo, "SURFACE_POINTS", 3)


def test_demo(tmp_path, quick, capsys):
    assert demo.main(["--out", str(tmp_path), *SHORT]) == 0
    printed = capsys.readouterr().out
    for method in demo.METHODS:
        assert method in printed
    page = (tmp_path / "report.html").read_text()
    assert "Packed networks" in page
    assert page.count("<img ") == 5
    assert (tmp_path / "runs" / "digits" / "dqa" / "packed.safetensors").stat().st_size > 0


def test_demo_fails_when_a_packed_network_gives_another_class(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(demo, "METHODS", {"W2 min-max": "digits/minmax"})
    pack = demo.pack
    monkeypatch.setattr(demo, "pack", lambda *args: dataclasses.replace(pack(*args), agreement=0.99))
    assert demo.main(["--out", str(tmp_path), *SHORT]) == 1
    assert "error: W2 min-max" in capsys.readouterr().out
