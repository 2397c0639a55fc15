"""Chat templates, against hand-written texts and against what transformers renders; masks of what is trained."""

import json

import pytest
import tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from flexjax.tokenizer import ChatTemplate, Tokenizer

TALK = [
    {"role": "user", "content": "Hi <there> & 'you'"},
    {"role": "assistant", "content": "Hello 😀!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " See\nyou "},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FEATURES = """{%- for message in messages %}
    {%- if loop.index0 == 1 %}{% continue %}{% endif %}
    {%- generation %}
    {{ message | tojson }}
    {%- endgeneration %}
{%- endfor %}
{{ bos_token }}{{ missing_token }}{{ strftime_now("%%") }}
"""


def tokenizer_with(shared, template: str | None) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(shared / "models/smollm2-135m-instruct/tokenizer.json"))
    return Tokenizer(backend, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, template)


@pytest.mark.parametrize("template", [CHATML, FEATURES])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(template, prompt):
    tokens = {"bos_token": "<s>"}
    theirs, _ = render_jinja_template([TALK], chat_template=template, add_generation_prompt=prompt, **tokens)
    assert ChatTemplate(template, tokens).render(TALK, prompt) == theirs[0]


def test_published_template_renders_as_transformers_does(shared):
    config = json.loads((shared / "tokenizers/qwen2.5/tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_directory(shared / "tokenizers/qwen2.5")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    options = {"tools": tools, "chat_template": config["chat_template"], "add_generation_prompt": True}
    theirs, _ = render_jinja_template([TALK], **options)
    assert tokenizer.render_chat(TALK, tools=tools) == theirs[0]
    assert tokenizer.decode(tokenizer.apply_chat_template(TALK, tools=tools), skip_special_tokens=False) == theirs[0]


def test_templates_are_found_where_models_keep_them(shared, tmp_path):
    source = shared / "models/smollm2-135m-instruct"
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    assert not Tokenizer.from_directory(tmp_path).has_chat_template
    named = [{"name": "other", "template": "x"}, {"name": "default", "template": "named {{ eos_token }}"}]
    config = {"chat_template": named, "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_directory(tmp_path).render_chat(TALK) == "named <|im_end|>"
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    assert Tokenizer.from_directory(tmp_path).render_chat(TALK) == "a file of its own"


def test_the_assistants_words_and_the_end_of_its_turns_are_trained(shared):
    tokenizer = tokenizer_with(shared, CHATML)
    ids, mask = tokenizer.assistant_mask(TALK)
    assert ids == tokenizer.apply_chat_template(TALK, add_generation_prompt=False)
    runs, previous = [], 0
    for token_id, trained in zip(ids, mask, strict=True):
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(token_id)
        previous = trained
    texts = [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
    assert texts == ["Hello 😀!<|im_end|>", " See\nyou <|im_end|>"]


def test_what_is_trained_continues_what_is_served(shared):
    """The tokens before each trained run are the prompt that serving would encode, where none straddles the edge."""
    tokenizer = tokenizer_with(shared, CHATML)
    ids, mask = tokenizer.assistant_mask(TALK)
    prompt = tokenizer.apply_chat_template(TALK[:3])
    assert ids[: len(prompt)] == prompt and mask[len(prompt)] == 1


def test_a_token_that_begins_in_the_header_is_not_trained(shared):
    """A line break ends the header and one begins the text: Qwen2 has one token for both."""
    tokenizer = Tokenizer.from_directory(shared / "tokenizers/qwen2.5")
    ids, mask = tokenizer.assistant_mask([{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"}])
    straddling = next(n for n, token_id in enumerate(ids) if tokenizer.token_text(token_id) == "\n\n")
    assert mask[straddling] == 0 and mask[straddling + 1] == 1


def test_a_template_that_rewrites_earlier_turns_has_no_mask(shared):
    rewriting = CHATML.replace("message['content'] +", "(message['content'] if loop.last else '...') +")
    with pytest.raises(ValueError, match="assistant's text in message 1 cannot be told apart"):
        tokenizer_with(shared, rewriting).assistant_mask(TALK)


def test_messages_that_are_not_learned_are_no_targets(shared):
    tokenizer = tokenizer_with(shared, CHATML)
    last = max(place for place, each in enumerate(TALK) if each["role"] == "assistant")
    ids, mask = tokenizer.assistant_mask(TALK, [place == last for place in range(len(TALK))])
    assert ids == tokenizer.assistant_mask(TALK)[0]
    kept = [token_id for token_id, trained in zip(ids, mask, strict=True) if trained]
    assert tokenizer.decode(kept, skip_special_tokens=False) == " See\nyou <|im_end|>"
    assert sum(tokenizer.assistant_mask(TALK, [False] * len(TALK))[1]) == 0


def test_without_a_template(shared):
    with pytest.raises(ValueError, match="the model has no chat template; give prompts as text"):
        tokenizer_with(shared, None).apply_chat_template(TALK)


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (CHATML, ["hello"], "message 0 is 'hello'; each message must be an object such as"),
        (CHATML, [{"content": "x"}], "message 0 is {'content': 'x'}"),
        (CHATML, [{"role": "user"}], "refuses these messages"),
        (CHATML, [{"role": "user", "content": None}], "refuses these messages"),
        ("{{ raise_exception('roles must alternate') }}", TALK, "refuses these messages: roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", TALK, "unsafe"),
    ],
)
def test_refused_messages_are_explained(template, messages, words):
    with pytest.raises(ValueError, match=".*") as caught:
        ChatTemplate(template).render(messages)
    assert words in str(caught.value)


def test_a_template_that_is_none():
    with pytest.raises(ValueError, match="the chat template is not valid"):
        ChatTemplate("{% for %}")
