"""One process's share of the tests, so that several run them at once: a pytest plugin.

    python3 -m pytest -p wanrt.bench.share --share 0/8 --noconftest tests/test_ops.py

`pytest -n 8` of pytest-xdist does as much, where that is installed.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="Every n-th test from the i-th on, as 0/8.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, step = map(int, config.getoption("--share").split("/"))
    mine = items[first::step]
    config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i % step != first])
    items[:] = mine
