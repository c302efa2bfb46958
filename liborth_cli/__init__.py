"""liborth: take skill and memorised text apart in the weights of a language model."""

__version__ = "0.1.0"
