"""Commands of `infoentropy`, by room; each imports its room inside itself."""
