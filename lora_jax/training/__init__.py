"""Training a delta: the paper's optimizer and loss, a resumable loop, what it writes."""

from lora_jax.core.extras import extra

with extra("train"):
    from lora_jax.training.config import OptimizerConfig, TrainConfig
    from lora_jax.training.logging import TIMES, JsonLines, Log, Logger, Prefixed, TensorBoard, plot_loss, read_metrics
    from lora_jax.training.loop import Job, Result, prepare, train
    from lora_jax.training.lora_optimizers import (
        lora_fa,
        lora_muon,
        lora_rite,
        riemannian,
        scale_by_lora_muon,
        scale_by_lora_rite,
        scale_by_riemannian,
        still_a,
    )
    from lora_jax.training.loss import cross_entropy, squared_error
    from lora_jax.training.objectives import (
        Metric,
        Objective,
        classifier,
        language_model,
        register_metric,
        with_metrics,
    )
    from lora_jax.training.optimizers import optimizer, schedule
    from lora_jax.training.step import METRICS, State, make_step, new_state, state_shardings
    from lora_jax.training.validation import validate
    from lora_jax.training.workdir import check_resumed, claim, difference

__all__ = ["METRICS", "TIMES", "Job", "JsonLines", "Log", "Logger", "Metric", "Objective", "OptimizerConfig"]
__all__ += ["Prefixed", "Result", "State", "TensorBoard", "TrainConfig", "check_resumed", "claim", "classifier"]
__all__ += ["cross_entropy", "difference", "language_model", "make_step", "new_state", "optimizer", "plot_loss"]
__all__ += ["prepare", "read_metrics", "register_metric", "schedule", "squared_error", "state_shardings", "train"]
__all__ += ["lora_fa", "lora_muon", "lora_rite", "riemannian", "scale_by_lora_muon", "validate", "with_metrics"]
__all__ += ["scale_by_lora_rite", "scale_by_riemannian", "still_a"]
