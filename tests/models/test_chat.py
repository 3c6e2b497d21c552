"""Chat templates of a checkpoint, which are programs of another's. No model."""

import json

import pytest

from hisa_jax.models.chat import load_chat_template

pytest.importorskip("jinja2")
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "gr\u00fc\u00dfe"}]
CHATML = """{%- for m in messages %}
<|{{ m.role }}|>{{ m['content'] }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def template(tmp_path, source, **keys):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **keys}))
    return load_chat_template(tmp_path)


def test_messages_become_a_prompt_as_the_template_says(tmp_path):
    for eos in ("<e>", {"content": "<e>", "lstrip": False}):
        made = template(tmp_path, CHATML, eos_token=eos).render(MESSAGES)
        assert made == "<|system|>be brief<e>\n<|user|>gr\u00fc\u00dfe<e>\n<|assistant|>"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages|length }}"}]
    assert template(tmp_path, named).render(MESSAGES) == "2"
    assert template(tmp_path, "{{ tools|tojson }}").render(MESSAGES, tools=[{"a": "<\u00e9>"}]) == '[{"a": "<\u00e9>"}]'
    assert template(tmp_path, "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}").render(MESSAGES) == "system"
    assert template(tmp_path, "{{ strftime_now('%Y') }}").render([]).startswith("20")
    (tmp_path / "chat_template.jinja").write_text("from the file of its own")
    assert load_chat_template(tmp_path).render(MESSAGES) == "from the file of its own"


def test_a_checkpoint_may_have_none(tmp_path):
    assert load_chat_template(tmp_path) is None
    assert template(tmp_path, None) is None and template(tmp_path, []) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__.os.name }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content.x }}",
        "{{ raise_exception('no system message is taken') }}",
    ],
)
def test_a_template_reaches_nothing_and_says_what_it_refuses(tmp_path, source):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template: ") as error:
        template(tmp_path, source).render(MESSAGES)
    assert len(str(error.value)) < 700
    if "no system" in source:
        assert "no system message is taken" in str(error.value)


@pytest.mark.parametrize(("source", "message"), [("{% if %}", "not a template"), (3, "is 3, wanted a text")])
def test_what_is_no_template_is_refused(tmp_path, source, message):
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: chat_template.*{message}"):
        template(tmp_path, source)
