"""The README's example is run as it stands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_example_runs(tmp_path, monkeypatch):
    section = README.read_text().split("<!-- example:begin")[1].split("<!-- example:end")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    assert (tmp_path / "net.safetensors").stat().st_size > 0


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if "://" not in link:
            assert (README.parent / link).exists(), link
