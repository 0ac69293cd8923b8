"""The studies of experiments.study, a module each: its question, its source's claim, its members, rows and plot.

A module has `members(config, data) -> {name: the config of a run, or of a sweep}`, where `data(n)` is the folder of the
first n training pairs, `rows(config, runs) -> rows of the table` and `plot(config, runs, rows, file)`. In place of
`members` it may have `train(config, folder) -> runs`, for runs of another kind; and `read(config, runs)`, which makes
of the runs what `rows` and `plot` then take in their place.
"""
