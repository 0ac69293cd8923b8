"""The task "chat": conversations, whose answers are learnt, by the chat template of the base or of the config."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from ml_collections import ConfigDict

from lora_jax import training
from lora_jax.data import batches, chat, packing, templates
from lora_jax.data.encoded import Conversations
from lora_jax.data.files import read_text
from lora_jax.data.tasks import TextTask
from lora_jax.interop import hf
from lora_jax.models.family import dimensions_of
from lora_jax.runs import methods
from lora_jax.runs.tasks import Task, register_task

TEXT = TextTask(chat.load, "chat", chat.SOURCE, conversations=True)


def template_of(config: ConfigDict, source: str) -> str:
    """The chat template of a run: `data.template`, a file, "plain" or the template itself; else that of its base.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: neither the config nor the base has a template.
    """
    given = config.data.get("template") or ""
    if given == "plain":
        return templates.PLAIN
    if "{{" in given or "{%" in given:
        return given
    if given:
        return read_text(given)
    template = hf.chat_template(source)
    if template is None:
        raise ValueError(
            f"{source} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): give "
            "one, --config.data.template=FILE.jinja, or --config.data.template=plain for a line and its answer"
        )
    return template


def format_of(config: ConfigDict, base: Any) -> chat.Format:
    """How the conversations of a run become tokens.

    Args:
      base: a `bases.Base` or a `reload.Loaded`: its model, its tokenizer, and its `source`.
    """
    tokens = hf.special_tokens(base.source)
    end = base.tokenizer.id_to_token(base.model.config.eos_token_id)
    return chat.Format(template_of(config, base.source), {"eos_token": end} | tokens, base.tokenizer)


def _length(config: ConfigDict, base: Any) -> int:
    return min(config.data.length, dimensions_of(base.model).max_length)


def _before(spec: Mapping[str, Any], model: Any) -> Sequence[int]:
    """The ids of a method's prefix, which stand before a conversation."""
    inserted = methods.placeholders(spec, model)
    if inserted["after"]:
        problem = f"infix={len(inserted['after'])}: a conversation has a prefix alone"
        raise ValueError(f"{problem}, set the method's infix to 0")
    return inserted["before"]


def encode(examples: Dataset, config: ConfigDict, base: Any, spec: Mapping[str, Any]) -> Conversations:
    """Conversations as tokens, as a config says, with the placeholders of a method of that spec."""
    options = {"length": _length(config, base), "long": config.data.long, "before": _before(spec, base.model)}
    return chat.encode(examples, format_of(config, base), **options)


def _schedule(examples: Dataset, config: ConfigDict, base: Any, spec: Mapping[str, Any]) -> batches.Schedule:
    encoded, size = encode(examples, config, base, spec), config.data.batch_size
    if config.data.packing:
        return packing.packed_conversations(encoded, size, _length(config, base), config.seed)
    return batches.bucketed(encoded, size, config.seed, buckets=config.data.buckets)


def prompts(
    contexts: Sequence[str], config: ConfigDict, base: Any, spec: Mapping[str, Any]
) -> tuple[list[list[int]], list[int]]:
    """What a model continues to answer each context, the text of a user or messages as `chat.dumped` writes them; and
    the tokens that end an answer."""
    format, eos = format_of(config, base), base.model.config.eos_token_id
    tokens = chat.prompts(contexts, format, before=_before(spec, base.model))
    return tokens, list(dict.fromkeys([*format.ends(), eos]))


def save_format(config: ConfigDict, base: Any, folder: str | Path) -> None:
    """Writes the template of a run, and the special tokens of its base, into a folder of its merged model."""
    format = format_of(config, base)
    hf.save_chat(folder, format.template, format.special_tokens)


def _objective(config: ConfigDict, model: Any) -> training.Objective:
    return training.language_model(model, config.label_smoothing)


_written: dict[str, Any] = {"text": TEXT, "encode": encode, "prompts": prompts, "save_format": save_format}
register_task("chat", Task(chat.load, _schedule, _objective, **_written))
