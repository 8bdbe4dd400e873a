"""The examples of docstrings and of the README run as they are written."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import latentrace.inference
import latentrace.models
import latentrace.ppl

README = pathlib.Path(__file__).parents[1] / "README.md"


def modules():
    for package in (latentrace.ppl, latentrace.inference, latentrace.models):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            yield found.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_docstring_examples(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def test_readme_program():
    (program,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
