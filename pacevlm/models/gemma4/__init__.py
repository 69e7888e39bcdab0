"""Gemma 4 with mixture-of-experts or dense blocks, run on transformers' own modules."""
