"""colm-serve: a prefill/decode disaggregated serving cluster for Chain-of-Language-Models."""

__version__ = "0.1.0"
