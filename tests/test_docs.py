"""The examples of docstrings and of the README run as they are written."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import pytest

import latentrace.inference
import latentrace.models
import latentrace.ppl

ROOT = pathlib.Path(__file__).parents[1]


def modules():
    for package in (latentrace.ppl, latentrace.inference, latentrace.models):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            yield found.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_docstring_examples(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


@pytest.mark.parametrize("path", ["README.md", "models/README.md"])
def test_programs_of_pages(path):
    programs = re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.M | re.S)
    cache = jax.config.jax_compilation_cache_dir
    for program in programs:
        exec(compile(program, path, "exec"), {"__name__": "page"})
    jax.config.update("jax_compilation_cache_dir", cache)
    assert programs
