"""What the tests of the language and of inference share."""

import sys
import zlib
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `import programs`: models, programs and oracles
CORE = {"ppl", "inference", "test_docs.py"}
MAPS = 30_000
"""memory maps of a process, half of what Linux allows: a compiled program takes several, and one too many ends the process"""


def pytest_addoption(parser):
    parser.addoption("--share", metavar="K/N", help="run only the tests whose names fall into part K of N, K = 0 ... N - 1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks as slow what slow.txt names: mostly cases of a test of which others, quicker, run by default."""
    slow = set((HERE / "slow.txt").read_text().splitlines())
    name = lambda item: item.nodeid.removeprefix(f"{HERE.name}/")
    for item in items:
        if name(item) in slow:
            item.add_marker(pytest.mark.slow)
    if share := config.getoption("share"):
        k, n = map(int, share.split("/"))
        mine = [zlib.crc32(name(item).encode()) % n == k for item in items]
        config.hook.pytest_deselected(items=[item for item, is_mine in zip(items, mine) if not is_mine])
        items[:] = [item for item, is_mine in zip(items, mine) if is_mine]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """The core's tests compile many small programs and run each a few times: halve the compile time."""
    jax.config.update("jax_disable_most_optimizations", request.path.relative_to(HERE).parts[0] in CORE)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
