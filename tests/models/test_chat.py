"""Chat templates: what they render to, where they are found, and that they cannot do harm."""

import json

import pytest
import tokenizers

from latentrace import models
from latentrace.models.chat import render

from .test_loading import directory as plain_directory  # noqa: F401  (a fixture)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{% for message in messages %}\n    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
    "        {{ raise_exception('roles must alternate') }}\n    {% endif %}\n"
    "{{ bos_token }}[{{ message['content'] | trim }}]\n{% if loop.last %}{% break %}{% endif %}{% endfor %}"
)
CHAT = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]


def test_render():
    assert render(CHATML, CHAT[:1], True) == "<|im_start|>user\n a <|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, CHAT, False) == "<|im_start|>user\n a <|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert render(STRICT, CHAT, False, bos_token="<s>") == "<s>[a]\n<s>[b]\n"
    assert render("{{ tools | tojson }}", [], False, tools=[{"name": "é<"}]) == '[{"name": "é<"}]'
    assert len(render("{{ strftime_now('%Y') }}", [], False)) == 4


@pytest.fixture
def directory(plain_directory):  # noqa: F811
    return plain_directory


def chat_model(directory, template):
    """The directory's model, its tokenizer knowing the letters that the templates below write."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return models.load(directory)


SHORT = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}h{% endif %}"
)


def test_tokens_of_a_chat(directory):
    tokenizer = chat_model(directory, SHORT).tokenizer
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.chat(messages) == [0, 2, 3, 9]
    assert tokenizer.chat(messages, add_generation_prompt=False) == [0, 2, 3]


def test_a_template_of_its_own_file_and_a_named_one(directory):
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert chat_model(directory, named).tokenizer.chat([]) == [3]
    (directory / "chat_template.jinja").write_text("c")
    lm = models.load(directory)
    assert lm.tokenizer.chat([]) == [4]
    models.save(lm, directory / "saved")
    assert models.load(directory / "saved").tokenizer == lm.tokenizer


def test_no_template(directory):
    with pytest.raises(models.CheckpointError, match="has no chat template"):
        models.load(directory).tokenizer.chat([])


FAILURES = {
    "syntax": ("{% for %}", "syntax error in line 1"),
    "refusal": (STRICT, "failed on these messages: TemplateError: roles must alternate"),
    "undefined": ("{{ messages[0].content.missing.more }}", "failed on these messages: UndefinedError"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does what no template needs to"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "does what no template needs to"),
    "mutation": ("{{ messages.append(1) }}", "does what no template needs to"),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "does what no template needs to"),
    "endless": ("{% for i in range(10 ** 9) %}{% endfor %}", "failed on these messages: OverflowError"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures(name):
    template, message = FAILURES[name]
    with pytest.raises(models.CheckpointError, match=message):
        render(template, CHAT[1:], False)


def test_added_tokens_have_their_bytes():
    """A token added to a byte-level vocabulary is its text, a special one adds nothing."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "Ġ": 1}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens(["<think>", "日"])
    backend.add_special_tokens(["<|end|>"])
    tokenizer = models.Tokenizer(backend.to_str())
    assert tokenizer.token_bytes() == [b"a", b" ", b"<think>", "日".encode(), b""]
    assert tokenizer.decode(tokenizer.encode("a <think>日a")) == "a <think>日a"
