"""Scoring models, comparing them and reporting what runs show.

perplexity   a model and a token dataset -> Evaluation. Its steps: model, dataset; scoring of chunks
             into a journal; tally; evaluation holds the result and its files
compare      run folders -> differences. Its steps: runs, groups, comparison of tokens and
             task_comparison of answers, inference
runlog       Megatron's console log -> numbers by iteration (light: standard library only)
report       run folders -> one HTML page and the JSON behind it: report_data, verdict, plots
"""
