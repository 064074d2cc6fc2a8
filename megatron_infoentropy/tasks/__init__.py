"""Questions to a model, asked by lm-evaluation-harness: named suites, results that are kept.

ask       the paper's families by name, and what has not been answered yet, task by task
harness   the only module that knows lm_eval
results   one file a task and its items, light to read
"""
