"""Scoring models, comparing them and reporting what runs show.

perplexity   a model and a token dataset -> Evaluation. Its steps: job (model, dataset, selection,
             domain_weights), chunks (windows, scores, tally) written into a journal by ranks,
             result (buckets, summary, passage); evaluation holds the result and its files
compare      folders -> differences. Its steps: comparison (statistics, difficulty), inference
             (bootstrap); runs reads run folders
runlog       Megatron's console log -> numbers by iteration (light: standard library only)
report       run folders -> one HTML page and the JSON behind it
"""
