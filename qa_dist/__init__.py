"""Fine-tune extractive question-answering models on many accelerators."""

__version__ = "0.1.0"
