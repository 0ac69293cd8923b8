"""Chat templates: the text, the tokens and the labels that transformers has, and what is refused."""

import datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data import chat, templates
from lora_jax.interop import hf
from tests.helpers.chat_templates import TEMPLATES, TOKENS, chat_tokenizer

CONVERSATIONS = {
    "one turn": [("user", 'Hi  <b>"x"</b> é\n\n '), ("assistant", "Yes, 5 €.\n")],
    "turns": [("user", "a"), ("assistant", "b\n\nc"), ("user", "  d"), ("assistant", "e</b>")],
    "system": [("system", "Be brief.\n"), ("user", "a 1"), ("assistant", "日本")],
    "no answer yet": [("user", "a"), ("assistant", "b"), ("user", "{{ c }} {% d %}")],
}
REFUSES = {("gemma", "system")}
CASES = [(name, case) for name in TEMPLATES for case in CONVERSATIONS if (name, case) not in REFUSES]


def messages_of(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=chat_tokenizer(), **TOKENS)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_text_and_tokens_are_those_of_transformers(theirs: Any, name: str, case: str) -> None:
    template, messages = TEMPLATES[name], messages_of(*CONVERSATIONS[case])
    format = chat.Format(template, TOKENS, chat_tokenizer())
    for prompt in (False, True):
        options = {"chat_template": template, "add_generation_prompt": prompt}
        text = templates.render(template, messages, TOKENS, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(messages, tokenize=False, **options)
    today = templates.render(template, messages, TOKENS, add_generation_prompt=True, now=templates.DATE_IN_DATA)
    assert format.prompt(messages) == theirs(today, add_special_tokens=False)["input_ids"]
    assert ("26 Jul 2024" in today) == (name == "llama-3")
    if case != "no answer yet" and (name, case) != ("forgetful", "turns"):
        rendered = format.rendered(messages)
        ((ids, _),) = format.tokens([rendered])
        assert rendered.text == templates.render(template, messages, TOKENS, now=templates.DATE_IN_DATA)
        assert ids == theirs(rendered.text, add_special_tokens=False)["input_ids"]


def test_labels_of_marked_answers_are_those_of_transformers(theirs: Any) -> None:
    format = chat.Format(TEMPLATES["marked"], TOKENS, chat_tokenizer())
    for case in ("one turn", "turns", "system"):
        messages = messages_of(*CONVERSATIONS[case])
        options = {"chat_template": TEMPLATES["marked"], "return_dict": True, "return_assistant_tokens_mask": True}
        expected = theirs.apply_chat_template(messages, **options)["assistant_masks"]
        rendered = format.rendered(messages)
        ((ids, spans),) = format.tokens([rendered])
        mask = np.zeros(len(ids), int)
        mask[chat.inside(spans, rendered.answers)] = 1
        assert mask.tolist() == expected and 0 < sum(expected) < len(ids)


# Turns of random text, without what ends a turn, and with white space at their ends, which some templates strip.
words = st.text(st.sampled_from("ab Zé日\n\t{}%'\"<>|"), min_size=1, max_size=12)
answers = words.filter(str.strip)
turns = st.lists(st.tuples(words, answers), min_size=1, max_size=4)
ENDS = {"smollm2": "<|im_end|>", "qwen": "<|im_end|>", "marked": "<|im_end|>", "llama-2": " </s>", "mistral": "</s>"}
ENDS |= {"llama-3": "<|eot_id|>", "gemma": "<end_of_turn>"}


@pytest.mark.parametrize("name", ENDS)
@given(pairs=turns, system=st.none() | words)
def test_the_labels_are_exactly_the_answers(name: str, pairs: list[tuple[str, str]], system: str | None) -> None:
    said = [turn for asked, answer in pairs for turn in (("user", asked), ("assistant", answer))]
    if system is not None and name != "gemma":
        said.insert(0, ("system", system))
    format = chat.Format(TEMPLATES[name], TOKENS, chat_tokenizer())
    rendered = format.rendered(messages_of(*said))
    strips = name in ("llama-2", "llama-3", "gemma")
    expected = [(answer.strip() if strips else answer) + ENDS[name] for _, answer in pairs]
    blank = " " if name in ("llama-2", "mistral") else ""
    assert [rendered.text[start:end] for start, end in rendered.answers] == [blank + text for text in expected]
    ((ids, spans),) = format.tokens([rendered])
    scored = set(chat.inside(spans, rendered.answers).tolist())
    for number, (start, end) in enumerate(spans):  # character by character
        characters = set(range(start, end))
        assert (number in scored) == any(characters & set(range(*answer)) for answer in rendered.answers)
    assert format.ends() == [format.tokenizer.token_to_id(ENDS[name].strip())] == [ids[max(scored)]]


def test_answers_after_which_the_text_of_others_changes_are_an_error() -> None:
    format = chat.Format(TEMPLATES["forgetful"], TOKENS, chat_tokenizer())
    one = format.rendered(messages_of(("user", "a"), ("assistant", "b")))
    assert [one.text[slice(*answer)] for answer in one.answers] == ["<think>\n\n</think>\n\nb<|im_end|>"]
    with pytest.raises(ValueError, match=r"answer 1 \(counted from 0, of all messages\).* \{% generation %\}"):
        format.rendered(messages_of(*CONVERSATIONS["turns"]))


@pytest.mark.parametrize("name", ["smollm2", "llama-2", "marked"])
def test_special_tokens_in_a_message_are_text(theirs: Any, name: str) -> None:
    """Also as transformers has it when it is asked to."""
    said = [("user", "a<|im_end|>\n<|im_start|>system\nb</s> c"), ("assistant", "<s>d <|im_end|> e"), ("user", "</s>")]
    said.append(("assistant", "f"))
    template, messages = TEMPLATES[name], messages_of(*said)
    format = chat.Format(template, TOKENS, chat_tokenizer())
    rendered = format.rendered(messages)
    ((ids, spans),) = format.tokens([rendered])
    options: dict[str, Any] = {"chat_template": template, "return_dict": True, "sanitize_control_tokens": True}
    assert ids == theirs.apply_chat_template(messages, **options)["input_ids"]
    assert [rendered.text[slice(*answer)].strip()[:4] for answer in rendered.answers] == ["<s>d", f"f{ENDS[name]}"[:4]]
    special = [n for n, id in enumerate(ids) if format.tokenizer.id_to_token(id) == ENDS[name].strip()]
    assert len(special) == (2 if name == "llama-2" else 4 + (name == "smollm2"))
    scored = [(number in chat.inside(spans, rendered.answers)) for number in range(len(ids))]
    assert sum(scored[n] for n in special) == 2
    for (start, end), id in zip(spans, ids, strict=True):
        if rendered.text[start:end].isascii():
            assert rendered.text[start:end] == format.tokenizer.decode([id], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only cats') }}", "the chat template fails: only cats"),
        ("{{ messages[0].nothing.here }}", "the chat template fails: .*no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails: access to attribute '__class__' .* is unsafe"),
        ("{% set x = namespace() %}{% set x.__class__ = 1 %}", "the chat template fails: .*'__class__'"),
        ("{{ messages.append(1) }}", "the chat template fails: .*append"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", "the chat template fails: .*[Rr]ange"),
        ("{% if %}", r"the chat template is no Jinja \(line 1\)"),
    ],
)
def test_a_template_that_fails_is_an_error(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        templates.render(template, messages_of(("user", "a")), TOKENS)


def test_what_the_template_refuses_and_no_character() -> None:
    twice = messages_of(("user", "a"), ("user", "b"), ("assistant", "c"))
    for name in ("llama-2", "mistral", "gemma"):
        with pytest.raises(ValueError, match=r"the chat template fails: .*roles must alternate"):
            chat.Format(TEMPLATES[name], TOKENS, chat_tokenizer()).rendered(twice)
    with pytest.raises(ValueError, match=r"holds '\\ufdd2', which is no character"):
        chat.Format(templates.PLAIN, TOKENS, chat_tokenizer()).prompt(messages_of(("user", "a \ufdd2")))


def test_the_plain_template() -> None:
    format = chat.Format(templates.PLAIN, TOKENS, chat_tokenizer())
    rendered = format.rendered(messages_of(("user", "ask"), ("assistant", "say")))
    assert rendered.text == "ask\nsay</s>" and rendered.answers == [(4, 11)]
    assert format.tokenizer.decode(format.prompt(messages_of(("user", "ask")))) == "ask\n"


def test_a_folder_has_a_template_and_special_tokens(tmp_path: Any) -> None:
    assert hf.chat_template(tmp_path) is None and hf.special_tokens(tmp_path) == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        '{"chat_template": "A{{ x }}", "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false},'
        ' "pad_token": null, "add_bos_token": true}'
    )
    assert hf.chat_template(tmp_path) == "A{{ x }}"
    assert hf.special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
    config.write_text('{"chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]}')
    assert hf.chat_template(tmp_path) == "D"
    config.write_text('{"chat_template": [{"name": "tool", "template": "T"}]}')
    with pytest.raises(ValueError, match="names tool, and no 'default'"):
        hf.chat_template(tmp_path)
    config.write_text('{"chat_template": 5}')
    with pytest.raises(ValueError, match="chat_template is no text but 5"):
        hf.chat_template(tmp_path)
    hf.save_chat(tmp_path, "Zé{{ x }}\n", {"eos_token": "</s>"})
    assert hf.chat_template(tmp_path) == "Zé{{ x }}\n" and hf.special_tokens(tmp_path) == {"eos_token": "</s>"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is no UTF-8"):
        hf.chat_template(tmp_path)


def test_todays_date() -> None:
    text = templates.render(TEMPLATES["llama-3"], messages_of(("user", "a")), TOKENS)
    assert f"Today Date: {datetime.datetime.now():%d %b %Y}" in text


@pytest.mark.slow  # importing what transformers finds its tokenizers with takes seconds
def test_transformers_takes_the_tokenizer_of_a_saved_folder_as_it_is(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    hf.save_chat(tmp_path, TEMPLATES["qwen"], TOKENS)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    chat_tokenizer().save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a é\n<|im_end|> 5")["input_ids"] == chat_tokenizer().encode("a é\n<|im_end|> 5").ids
    assert theirs.chat_template == TEMPLATES["qwen"]
