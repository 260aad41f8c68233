"""Measures what a checkpoint can do: `python -m internlm2.evaluate RUN suite=...`, and `lm_eval --model internlm2`."""
