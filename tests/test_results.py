"""The README's results: what the record gives, made anew, and nothing else."""

import re
import shutil
from pathlib import Path

import matplotlib as mpl
import pytest

from dfptkd.engine.study_report import BEGIN, END, NOTHING, study_report
from dfptkd.recipes.studies import STUDIES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("bench/results")


@pytest.fixture(scope="module")
def made_anew(tmp_path_factory) -> Path:
    """A copy of README and record, its figures and results made from its tables."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "README.md", copy)
    if (ROOT / RESULTS).is_dir():
        shutil.copytree(ROOT / RESULTS, copy / RESULTS, ignore=shutil.ignore_patterns("*.svg"))
    tables = sorted((copy / RESULTS).glob("*.csv"))
    study_report(tables, STUDIES, readme=copy / "README.md")
    return copy


def test_readme_says_what_the_record_gives(made_anew):
    text = (ROOT / "README.md").read_text()
    assert text == (made_anew / "README.md").read_text()
    on_record = any((ROOT / RESULTS).glob("*.csv"))
    assert on_record is (f"{BEGIN}\n{NOTHING}\n{END}" not in text)


def test_figures_are_those_of_the_record(made_anew):
    figures, expected = (
        {path.name: path.read_text() for path in (root / RESULTS).glob("*.svg")}
        for root in (ROOT, made_anew)
    )
    assert figures.keys() == expected.keys()
    drawn_by = {re.match(r"<!-- matplotlib (\S+) -->", text)[1] for text in figures.values()}
    if drawn_by - {mpl.__version__}:
        pytest.skip(f"drawn by matplotlib {', '.join(drawn_by)}, this is {mpl.__version__}")
    assert figures == expected
