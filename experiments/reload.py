"""A run from its workdir, ready to use: what evaluate and generate share."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict
from tokenizers import Tokenizer
from tqdm import tqdm

import lora_jax as lj
from lora_jax import checkpoints, training
from lora_jax.data import glue
from lora_jax.data.pairs import prompts
from lora_jax.generation import completions, end_tokens
from lora_jax.runs import bases, methods

flags.DEFINE_enum(
    "params",
    "adapted",
    ["base", "adapted", "merged"],
    "The base alone, the base adapted by the run, or the same merged into plain weights.",
)
flags.DEFINE_string("base", None, "The base, where it is no longer where the run's config says.")
flags.DEFINE_integer("batch_size", 32, "Contexts that are completed together.", lower_bound=1)
flags.DEFINE_integer("max_new_tokens", None, "The most tokens of a text (the authors' 64).")
flags.DEFINE_integer("num_beams", None, "Beams; 1 is greedy.")
flags.DEFINE_float("length_penalty", None, "Finished beams score log p / length^length_penalty.")
flags.DEFINE_integer("no_repeat_ngram_size", None, "No n-gram of this size comes twice.")
flags.DEFINE_enum("beam_rule", None, ["hf", "lora_paper"], "The search of transformers, or of the LoRA authors.")
flags.DEFINE_float("temperature", None, "Samples: divides the logits.")
flags.DEFINE_integer("top_k", None, "Samples among the k likeliest tokens.")
flags.DEFINE_float("top_p", None, "Samples among the likeliest tokens that together reach this probability.")
flags.DEFINE_integer("seed", 0, "Of sampling.")

_BEAMS = ("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size", "beam_rule")
_SAMPLING = ("temperature", "top_k", "top_p")


class Loaded(NamedTuple):
    """A run's model, with the parameters that the flags ask for."""

    config: ConfigDict
    model: Any  # of lora_jax.models
    params: Any
    tokenizer: Tokenizer
    step: int  # of the checkpoint; 0 for the base
    base: dict[str, str]  # the base's identity
    spec: dict[str, Any]  # of the run's method; {} for the base alone


def load(*, classifies: bool = False) -> Loaded:
    """The run of the flags' workdir, which generates texts or `classifies` them (GLUE).

    Raises:
      FileNotFoundError: no run there, or no base where its config or --base says.
      ValueError: the base is another than the run's, or it is a run of the other kind.
    """
    workdir, which = Path(flags.FLAGS.workdir), flags.FLAGS.params
    config = config_of(workdir, classifies=classifies)
    if which != "base" and config.method == "none":
        raise ValueError(f"{workdir} trained nothing (method none): there is --params=base only")
    base = bases.load(config, flags.FLAGS.base)
    if which == "base":
        return Loaded(config, base.model, base.params, base.tokenizer, 0, base.identity, {})
    method, delta, step, trained_on = trained(workdir, config)
    checkpoints.check_base(trained_on, base.identity, workdir)
    adapted = method.apply(lj.without_tuned(base.params, delta), delta)
    params = lj.merge(adapted) if which == "merged" else adapted
    return Loaded(config, base.model, params, base.tokenizer, step, base.identity, method.spec)


def trained(workdir: Path, config: ConfigDict) -> tuple[lj.ParamTransform, lj.Delta, int, dict[str, str]]:
    """Method, delta, step and base's identity of a run: of its best epoch, where its config says what is best, or else
    of its newest checkpoint."""
    if config.get("seeds") or any((config.get("sweep") or {}).values()):
        runs = sorted(str(path.parent) for path in workdir.glob("*/config.json"))
        raise ValueError(f"{workdir} holds several runs: name one, --workdir={' or '.join(runs)}")
    if not config.get("best"):
        run = checkpoints.load(workdir)
        return run.method, run.delta, run.step, checkpoints.meta_of(workdir)["base"]
    if not (workdir / "adapter").is_dir():
        raise FileNotFoundError(f"{workdir} has no best epoch yet: it was stopped before its first validation")
    method, delta, info = checkpoints.load_adapter(workdir / "adapter")
    validated = [e for e in training.read_metrics(workdir) if config.best in e]
    best = max(validated, key=lambda e: e[config.best], default={"step": 0})  # an imported one was never validated
    return method, delta, best["step"], info["base"]


def config_of(workdir: Path, *, classifies: bool | None = None) -> ConfigDict:
    """The config of the run there, which generates texts or classifies them, if that is asked."""
    file = workdir / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: is {workdir} the workdir of a run?")
    config = ConfigDict(json.loads(file.read_text()))
    methods.know(config)
    if classifies is not None and classifies != (config.data.name in glue.TASKS):
        others = "experiments.evaluate and experiments.generate" if classifies else "experiments.predict"
        raise ValueError(f"{workdir} is a run of {config.data.name}: give it to {others}")
    return config


def decoding(config: ConfigDict) -> dict[str, Any]:
    """How texts are decoded: as the config's `decode` says (greedily where it says nothing), but for the flags."""
    values = flags.FLAGS
    options = {"max_new_tokens": 64, **dict(config.get("decode", {}))}
    sampling = {name: values[name].value for name in _SAMPLING if values[name].value is not None}
    if sampling:  # instead of the config's beam search
        options = {"max_new_tokens": options["max_new_tokens"]}
    given = {name: values[name].value for name in _BEAMS if values[name].value is not None}
    return options | given | sampling


def sampling_key(options: dict[str, Any]) -> dict[str, Any]:
    """{"key": that of the flags' seed} where the options of decoding ask for sampling, else nothing."""
    return {"key": jax.random.key(flags.FLAGS.seed)} if set(options) & set(_SAMPLING) else {}


def complete_contexts(loaded: Loaded, contexts: list[str], kept: Path | None = None) -> list[str]:
    """What the model says of each context. Texts are kept in the file as they come: a killed run goes on there.

    Raises:
      ValueError: the file holds texts of other contexts or settings.
    """
    options = decoding(loaded.config)
    settings = {name: flags.FLAGS[name].value for name in ("params", "seed", "batch_size")}
    settings |= {"workdir": str(Path(flags.FLAGS.workdir).resolve()), "step": loaded.step, "base": loaded.base}
    texts = begun(kept, settings | options | {"contexts": contexts}) if kept else {}
    eos = loaded.model.config.eos_token_id
    options |= sampling_key(options)
    found = completions(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        prompts(contexts, loaded.tokenizer, eos=eos, **methods.placeholders(loaded.spec, loaded.model)),
        eos=end_tokens(loaded.tokenizer, eos),
        batch_size=flags.FLAGS.batch_size,
        done=texts.copy(),
        **options,
    )
    with tqdm(total=len(contexts), initial=len(texts), unit="text", desc="generate") as bar:
        for batch in found:
            if kept:
                with kept.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps([row, text], ensure_ascii=False) + "\n" for row, text in batch.items())
            bar.update(len(batch.keys() - texts.keys()))
            texts |= batch
    return [texts[row] for row in range(len(contexts))]


def begun(kept: Path, settings: dict[str, Any]) -> dict[int, str]:
    """The texts of a killed run, by the number of their context; makes the file where there is none."""
    first = json.dumps(settings, ensure_ascii=False, sort_keys=True) + "\n"
    if not kept.is_file():
        checkpoints.write_atomically(kept, first.encode())
        return {}
    raw = kept.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1].decode()  # the last line may have been cut off
    if not whole.startswith(first):
        raise ValueError(f"{kept} was begun with other contexts or settings: delete it, or finish it as it was begun")
    checkpoints.write_atomically(kept, whole.encode())
    return dict(map(json.loads, whole.split("\n")[1:-1]))  # not splitlines: texts may hold its rarer line ends


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
