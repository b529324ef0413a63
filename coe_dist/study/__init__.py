"""Studies: grids of trainings that answer one question, one row of a committed table per training.

schema.py      a study's YAML file
trainings.py   its grid: one configuration per point and seed
cost.py        seconds a training will take
results.py     docs/results/NAME.csv and NAME-curves.csv: what is finished
outcome.py     a finished run folder -> a row and its early-exit curve
slot.py        a process that trains one configuration after another
running.py     the trainings that are left, as many at a time as there are slots
record.py      MLflow: one run per training below one run of the study
statistics.py  means, spreads, the single networks' curve and the saving on it
frontier.py    the saving in MACs at equal accuracy
study.py       what is left of a study, and its turns
tables.py, plots.py, verify.py, command.py
"""
