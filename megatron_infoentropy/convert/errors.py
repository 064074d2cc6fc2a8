"""What can be wrong with a model to convert; each is a ValueError whose message says what to do."""


class UnsupportedModelError(ValueError):
    """The other side has no model that computes exactly the same."""


class UnreadableCheckpointError(ValueError):
    """The files are there, but not in a format that can be read."""


class IncompleteCheckpointError(ValueError):
    """A file, a part of a file or a tensor is missing."""


class UnprovenConversionError(ValueError):
    """The two sides do not compute the same."""


class InvalidWeightsError(ValueError):
    """Numbers that no model could compute with: NaN or infinity."""
