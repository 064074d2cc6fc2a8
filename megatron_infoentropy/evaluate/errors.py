"""What can be wrong with an evaluation's inputs, by name. All are ValueErrors."""


class ModelFolderError(ValueError):
    """The model folder is not one that can be scored."""


class TokenizerMismatchError(ValueError):
    """The model was trained with another tokenizer than the data was written with."""


class VocabularyMismatchError(ValueError):
    """Model, data and token counts do not agree on the size of the vocabulary."""


class TokenCountsError(ValueError):
    """The table of token counts is missing or unreadable."""


class ContextOverflowError(ValueError):
    """A window is longer than the positions the model has."""


class EmptyDomainError(ValueError):
    """A domain without a single token: it has no perplexity."""


class DomainWeightsError(ValueError):
    """Weights of domains that do not fit the domains scored."""


class NonFiniteScoreError(ValueError):
    """The model gave NaN logits or probability zero to a token."""


class EvaluationFormatError(ValueError):
    """The files of an evaluation are missing, damaged or of another format."""


class UnfinishedEvaluationError(ValueError):
    """An evaluation that was interrupted, or one of other inputs that lies in the way."""


class FinishedEvaluationError(ValueError):
    """A finished evaluation lies where another would be written."""


class DifferentDataError(ValueError):
    """Two evaluations that scored different tokens, or in another way, cannot be paired."""


class RunFolderError(ValueError):
    """A run folder lacks what the report needs from it."""
