"""The studies of experiments.study, a module each: its question, its source's claim, its members, rows and plot.

A module has `members(config, data) -> {name: the config of a run, or of a sweep}`, where `data(n)` is the folder of the
first n training pairs, `rows(config, runs) -> rows of the table` and `plot(config, runs, rows, file)`.
"""
