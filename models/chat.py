"""Chat templates: messages to the text that a chat model was trained on, rendered in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from latentrace.models.errors import CheckpointError

Message = Mapping[str, Any]
"""Commonly {"role": "system" | "user" | "assistant", "content": text}; templates may read more keys."""


def render(template: str, messages: Sequence[Message], add_generation_prompt: bool, **variables: Any) -> str:
    """The text of a chat. Raises `CheckpointError` where the template fails, refuses the messages, or is unsafe."""
    try:
        return _compile(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            **{"tools": None, "documents": None} | variables,
        )
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from error
    except jinja2.exceptions.SecurityError as error:
        raise CheckpointError(f"the chat template does what no template needs to: {error}; do not use it") from error
    except Exception as error:  # templates run into any of Python's errors
        raise CheckpointError(
            f"the chat template failed on these messages: {type(error).__name__}: {error}. Check their roles and order"
        ) from error


@cache
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without the escapes for HTML that jinja2 puts in."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
