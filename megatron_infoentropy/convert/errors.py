"""The error of this room, which tells a refusal from what fails by chance."""


class ConversionError(ValueError):
    """A model that cannot be read, converted or proved to be the same; says why and what to do."""
