"""ablations/reading.py prints a rate for training and testing, in the main process and with workers."""

import re

import pytest
from running import call, write_images

from ablations import reading


@pytest.mark.parametrize("folder", [False, True])
def test_rates_of_generated_and_given_images(tmp_path, capsys, folder):
    given = ["--data-dir", write_images(tmp_path, {"train": 3, "val": 2})] if folder else []
    printed = call(capsys, "--smoke", "--workers", 1, *given, module=reading)
    assert printed.startswith("| images/s | main process | 1 workers |\n")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|$", printed, re.M)
    assert [name for name, *_ in rows] == ["training", "testing"]
    assert all(int(rate) > 0 for _, *rates in rows for rate in rates)
