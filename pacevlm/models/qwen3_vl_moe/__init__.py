"""Qwen3-VL with mixture-of-experts blocks, run on transformers' own modules."""
