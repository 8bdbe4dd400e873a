"""What the tests of the language and of inference share."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import programs`: models, programs and oracles
CORE = {"ppl", "inference"}
MAPS = 30_000
"""memory maps of a process, half of what Linux allows: a compiled program takes several, and one too many ends the process"""


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """The core's tests compile many small programs and run each a few times: halve the compile time."""
    jax.config.update("jax_disable_most_optimizations", request.path.relative_to(Path(__file__).parent).parts[0] in CORE)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
