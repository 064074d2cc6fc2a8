"""Scoring models, comparing them and reporting what runs show.

perplexity   a model and a token dataset -> Evaluation. Its steps: model, dataset, selection and
             domain_weights; chunks (windows, scores) written into a journal by ranks; tally,
             buckets and passage; evaluation holds the result and its files
compare      folders -> differences. Its steps: comparison, inference; runs reads run folders
runlog       Megatron's console log -> numbers by iteration (light: standard library only)
report       run folders -> one HTML page and the JSON behind it
"""
