"""InternLM2 for transformers 5: one file each for config, model and tokenizer.

configuration_internlm2.py and modeling_internlm2.py are also copied into every export, so they import nothing of ours
but each other (and that by a relative import there).
"""
