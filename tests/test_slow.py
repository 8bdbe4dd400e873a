"""The list of slow cases, where a test that was renamed would go unnoticed."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_all_are_cases_of_tests():
    for case in (HERE / "slow.txt").read_text().splitlines():
        path, *names = case.partition("[")[0].split("::")
        text = (HERE / path).read_text()
        assert all(re.search(rf"(def|class) {name}\b", text) for name in names), case
