"""Direct Preference Optimization in native PyTorch: `python -m dpo --help`."""
