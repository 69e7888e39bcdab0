"""Qwen3-VL without experts, run on transformers' own modules."""
