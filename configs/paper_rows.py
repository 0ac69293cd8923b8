"""Every row of the paper's Tables 2, 3, 4 and 15 (Hu et al. 2021) with the config that has it, for experiments.count.

Not a config of its own.

Where the row's count is not the printed figure, a note gives the arithmetic. "Nominal" is a figure that is no count of
what trains, "truncated" one that was not rounded; where the difference is not explained, the note says "differs".
"""

from typing import Any, NamedTuple


class PaperRow(NamedTuple):
    """A row: its table, the config that trains it (None: no such model here, `formula` counts, if anything), the
    figure that the paper prints, and what there is to say of it."""

    table: int
    label: str
    config: str | None
    printed: str
    note: str = ""
    formula: int | None = None


NOMINAL = "0.1% of the model, perhaps, and no count"
SOLVED = "the bottleneck is not printed but solved for: r = {}"

ROBERTA = [
    ("base, FT", "base,mnli,full", "125.0M", "nominal: 124,645,632 with the pooler that its classifier leaves out"),
    ("base, BitFit", "base,mnli,bitfit", "0.1M", ""),
    ("base, AdapterD", "base,mnli,adapter_d", "0.3M", "r is not printed: 16, all 12 layers"),
    ("base, AdapterD", "base,mnli,adapter_d_big", "0.9M", "r is not printed: 48, all 12 layers"),
    ("base, LoRA", "base,mnli", "0.3M", ""),
    ("large, FT", "large,mnli,full", "355.0M", "nominal: 355,359,744 with the pooler that its classifier leaves out"),
    ("large, LoRA", "large,mnli", "0.8M", ""),
    (
        "large, AdapterP†",
        "large_restricted,mnli,adapter_p_big",
        "3.0M",
        "differs: 24 (2·1024·64 + 64 + 1024) at r = 64",
    ),
    ("large, AdapterP†", "large_restricted,mnli,adapter_p", "0.8M", ""),
    (
        "large, AdapterH†",
        "large_restricted,mnli,adapter_h_big",
        "6.0M",
        "differs: 48 (2·1024·64 + 64 + 1024) at r = 64",
    ),
    ("large, AdapterH†", "large_restricted,mnli,adapter_h", "0.8M", ""),
    ("large, LoRA†", "large_restricted,mnli", "0.8M", ""),
]
DEBERTA = [
    PaperRow(2, "DeBERTa XXL, FT", None, "1500.0M", "nominal; not counted: there is no DeBERTa here"),
    PaperRow(
        2,
        "DeBERTa XXL, LoRA",
        None,
        "4.7M",
        "by formula, 2·96·1536·16: r = 16, as in the authors' scripts; Table 10's r = 8 gives 2,359,296",
        2 * 96 * 1536 * 16,
    ),
]
GPT2 = [
    ("M, FT", "medium,full", "354.92M", "differs: 50,257 d + 1,024 d + 24 (12 d² + 13 d) + 2 d with d = 1024"),
    ("M, AdapterL", "medium,adapter_l", "0.37M", SOLVED.format(6)),
    ("M, AdapterL", "medium,adapter_l_big", "11.09M", SOLVED.format(224)),
    (
        "M, AdapterH",
        "medium,adapter_h",
        "11.09M",
        "differs: 48 (2·1024·112 + 112 + 1024); no r gives the figure, which is AdapterL's",
    ),
    ("M, FT-Top2", "medium,top2", "25.19M", "24M in Tables 13 and 14"),
    ("M, PreLayer", "medium,prefix_layer", "0.35M", f"nominal: 24·1024 l is 0.34M at 14, 0.37M at 15; {NOMINAL}"),
    ("M, LoRA", "medium", "0.35M", f"nominal: 2·48·1024·4; {NOMINAL}"),
    ("L, FT", "large,full", "774.03M", ""),
    ("L, AdapterL", "large,adapter_l", "0.88M", SOLVED.format(8)),
    ("L, AdapterL", "large,adapter_l_big", "23.00M", SOLVED.format(248)),
    ("L, PreLayer", "large,prefix_layer", "0.77M", f"nominal: 36·1280 l is 0.74M at 16, 0.78M at 17; {NOMINAL}"),
    ("L, LoRA", "large", "0.77M", f"nominal: 2·72·1280·4; {NOMINAL}"),
]

_PRE_LAYER = "differs: 96·12,288·{}; the excess follows no rule that is known"
_GPT3_FULL = "differs: the head is tied here; untied it is 175,221,817,344, and 34.0M are not explained"
GPT3 = [
    ("FT", "full", "175,255.8M", _GPT3_FULL),
    ("BitFit", "bitfit", "14.2M", "differs: (96·11 + 1) d biases with d = 12,288; 96·12 d would be 14.2M"),
    ("PreEmbed 256, 8", "prefix_embedding_256_8", "3.2M", ""),
    ("PreLayer 8, 8", "prefix_layer_8_8", "20.2M", _PRE_LAYER.format(16)),
    ("AdapterH r=1", "adapter_h_r1", "7.1M", ""),
    ("AdapterH r=8", "adapter_h_r8", "40.1M", ""),
    ("LoRA v r=2", "lora_v_r2", "4.7M", ""),
    ("LoRA q,k,v,o r=4", "lora_qkvo_r4", "37.7M", "as q,v r=8, whose MNLI figure this row has"),
]
GPT3_SWEEP = [
    ("FT", "full", "175B", ""),
    ("PreEmbed 32, 8", "prefix_embedding_32_8", "0.4M", "truncated: 40·12,288"),
    ("PreEmbed 64, 8", "prefix_embedding_64_8", "0.9M", ""),
    ("PreEmbed 128, 8", "prefix_embedding_128_8", "1.7M", ""),
    ("PreEmbed 256, 8", "prefix_embedding_256_8", "3.2M", ""),
    ("PreEmbed 512, 8", "prefix_embedding_512_8", "6.4M", ""),
    ("PreLayer 2, 2", "prefix_layer_2_2", "5.1M", _PRE_LAYER.format(4)),
    ("PreLayer 8, 0", "prefix_layer_8_0", "10.1M", _PRE_LAYER.format(8)),
    ("PreLayer 8, 8", "prefix_layer_8_8", "20.2M", _PRE_LAYER.format(16)),
    ("PreLayer 32, 4", "prefix_layer_32_4", "44.1M", _PRE_LAYER.format(36)),
    ("PreLayer 64, 0", "prefix_layer_64_0", "76.1M", _PRE_LAYER.format(64)),
    ("AdapterH r=1", "adapter_h_r1", "7.1M", ""),
    ("AdapterH r=4", "adapter_h_r4", "21.2M", ""),
    ("AdapterH r=8", "adapter_h_r8", "40.1M", ""),
    ("AdapterH r=16", "adapter_h_r16", "77.9M", ""),
    ("AdapterH r=64", "adapter_h_r64", "304.4M", ""),
    ("LoRA v r=2", "lora_v_r2", "4.7M", ""),
    ("LoRA q,v r=1", "lora_qv_r1", "4.7M", ""),
    ("LoRA q,v r=2", "lora_qv_r2", "9.4M", ""),
    ("LoRA q,v r=4", "lora_qv_r4", "18.8M", "truncated: 2·192·12,288·4"),
    ("LoRA q,v r=8", "lora_qv_r8", "37.7M", ""),
    ("LoRA q,v r=64", "lora_qv_r64", "301.9M", "truncated: 2·192·12,288·64"),
    ("LoRA q,k,v,o r=1", "lora_qkvo_r1", "9.4M", ""),
    ("LoRA q,k,v,o r=2", "lora_qkvo_r2", "18.8M", "truncated: 2·384·12,288·2"),
    ("LoRA q,k,v,o r=4", "lora_qkvo_r4", "37.7M", ""),
    (
        "LoRA q,k,v,o r=64",
        "lora_qkvo_r64",
        "603.8M",
        "differs: 2·384·12,288·64; the figure is twice the truncated 301.9M",
    ),
    ("LoRA+PE r=8", "lora_pe_r8", "37.8M", "truncated: LoRA's 37,748,736 and 12·12,288"),
    ("LoRA+PE r=32", "lora_pe_r32", "151.1M", ""),
    ("LoRA+PE r=64", "lora_pe_r64", "302.1M", ""),
    ("LoRA+PL r=8", "lora_pl_r8", "52.8M", "differs: LoRA's 37,748,736 and 96·12,288·12"),
]


def _rows(table: int, model: str, file: str, rows: list[tuple[str, str, str, str]]) -> list[PaperRow]:
    return [
        PaperRow(table, f"{model} {label}", f"configs/{file}.py:{name}", printed, note)
        for label, name, printed, note in rows
    ]


ROWS = [
    *_rows(2, "RoBERTa", "glue", ROBERTA),
    *DEBERTA,
    *_rows(3, "GPT-2", "e2e", GPT2),
    *_rows(4, "GPT-3,", "gpt3", GPT3),
    *_rows(15, "GPT-3,", "gpt3", GPT3_SWEEP),
]


def compared(row: PaperRow, number: int | None) -> dict[str, Any]:
    """A row and the number of parameters that its config trains, as JSON: label, table, config, trained, printed,
    verdict.

    Raises:
      ValueError: the number is not the paper's, and the row does not say why.
    """
    if number is not None and agrees(number, row.printed):
        verdict = "; ".join(filter(None, ["equal", row.note]))
    elif row.note:
        verdict = row.note
    else:
        raise ValueError(f"Table {row.table}, {row.label}: {number:,} is not {row.printed}, and no note says why")
    counted = {"label": row.label, "table": row.table, "config": row.config, "trained": number}
    return counted | {"printed": row.printed, "verdict": verdict}


def agrees(number: int, printed: str) -> bool:
    """Whether a number rounds to a printed figure.

    >>> agrees(11_089_152, "11.09M"), agrees(11_064_576, "11.09M")
    (True, False)
    """
    figure, unit = printed[:-1], printed[-1]
    decimals = len(figure.partition(".")[2])
    return f"{number / {'M': 1e6, 'B': 1e9}[unit]:,.{decimals}f}" == figure
