"""From a recipe to a running job: flags, torchrun, progress, a run folder with what happened."""
