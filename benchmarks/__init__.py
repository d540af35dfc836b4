"""Benchmarks of stiefel_lora: ``python -m benchmarks list``. The package itself never imports this."""
