"""Scoring exported models and reporting what runs show; start with `perplexity` and `report`.

perplexity   a Hugging Face folder and a token dataset -> Evaluation (model, dataset, selection,
             windows, buckets and tally are its steps; evaluation holds the result and its files)
bootstrap    two evaluations of the same tokens -> differences with intervals over documents
runlog       Megatron's console log -> numbers by iteration (light: standard library only)
report       run folders -> one HTML page and the JSON behind it (runs, comparison, verdict,
             plots are its steps)
"""
