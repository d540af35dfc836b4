"""Riemannian optimizers and Fisher-selected, Stiefel-constrained LoRA adapters for PyTorch."""

__version__ = "0.1.0"
