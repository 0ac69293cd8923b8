"""The sizes of small models, as the configs of transformers name them."""

GPT2 = {"vocab_size": 31, "n_positions": 12, "n_embd": 12, "n_layer": 2, "n_head": 3}
ENCODER = {
    "vocab_size": 37,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}
