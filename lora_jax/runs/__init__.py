"""From a config to a run, and from a workdir back to a model.

What most scripts need::

    result = runs.train(config, "runs/e2e")    # trains, or resumes where it was stopped
    loaded = runs.load("runs/e2e")             # model, params, tokenizer, method, delta, ...
    runs.evaluate(loaded).result["scores"]
"""

from lora_jax.core.extras import extra

with extra("train,hf,data"):
    from lora_jax.runs import chat  # registers its task
    from lora_jax.runs.config import default_config, is_sweep
    from lora_jax.runs.evaluation import Evaluation, complete, evaluate, predict
    from lora_jax.runs.methods import run_file
    from lora_jax.runs.pretraining import Pretrained, pretrain
    from lora_jax.runs.reload import Imported, Loaded, export_run, import_run, load
    from lora_jax.runs.run import Prepared, RunResult, prepare, train
    from lora_jax.runs.sweeps import SweepResult, sweep
    from lora_jax.runs.tasks import Task, TextTask, classification, generation, register_task, task_named
    from lora_jax.training import Logger, register_metric

__all__ = ["Evaluation", "Imported", "Loaded", "Logger", "Prepared", "Pretrained", "RunResult", "SweepResult", "Task"]
__all__ += ["TextTask", "chat", "classification", "complete", "default_config", "evaluate", "export_run"]
__all__ += ["generation", "import_run", "is_sweep", "load", "predict", "prepare", "pretrain", "register_metric"]
__all__ += ["register_task", "run_file", "sweep", "task_named", "train"]
