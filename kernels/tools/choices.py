"""The flags that both of the kernels' commands have: which kernel files, for which models."""

from cli.parser import Flag

from .measure import FILES, MODELS

CHOICES = [
    Flag("files", FILES, FILES, "the kernels (all)", many="+"),
    Flag("models", tuple(MODELS), (), "whose dimensions (all)", many="+"),
]
