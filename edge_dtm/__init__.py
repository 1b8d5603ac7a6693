"""edge-dtm: a smaller Llama that still says the same words, proved on the device."""

__version__ = "0.1.0"
