"""Memory, time and traffic of a run before it starts: `python train.py ... plan=true`. Imports no torch."""
