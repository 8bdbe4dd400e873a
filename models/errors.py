"""The error of checkpoints and tokenizers on disk."""


class CheckpointError(ValueError):
    """A model directory that cannot be used; the message names the file, tensor or option, and what to do."""
