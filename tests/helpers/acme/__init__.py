"""A package of somebody else's, which `tests/test_extension.py` copies out of here and extends the library with.

Each of its modules registers one thing: model.py and hf_format.py a model family, diagonal.py a method, next_word.py a
task, top_three.py a metric, ln_tuning.py a kind of PEFT adapter.
"""
