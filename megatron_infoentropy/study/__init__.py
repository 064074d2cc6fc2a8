"""A study: one file that says what to train, one command that trains, scores and compares it all.

plan      the YAML file, read and checked: recipe, grid, seeds, data, evaluation
ledger    which steps of a run are finished, proven by the hashes of what they wrote
steps     what is done: data, and of every run: train, export, evaluate, tasks
runner    how far each run is; the runs in processes of their own, some side by side; the report at
          the end; the same as a Slurm job array
"""
