"""What low-rank adapters change, and how: section 7 of the paper and what was found since, from their factors."""

from lora_jax.analysis.comparison import (
    Comparison,
    Similarity,
    alignment,
    compare,
    distance,
    of_adapters,
    random_similarity,
    subspace_similarity,
)
from lora_jax.analysis.conversion import extract, to_lora
from lora_jax.analysis.intruder_dimensions import Intruders, intruders, scale_intruders
from lora_jax.analysis.spectra import amplification, effective_rank, rank_of_share, spectrum, weights
from lora_jax.methods.changes import Update, matrix, updates

__all__ = ["Comparison", "Intruders", "Similarity", "Update", "alignment", "amplification", "compare", "distance"]
__all__ += ["effective_rank", "extract", "intruders", "matrix", "of_adapters", "random_similarity", "rank_of_share"]
__all__ += ["scale_intruders", "spectrum", "subspace_similarity", "to_lora", "updates", "weights"]
