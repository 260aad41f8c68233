"""What a run shows and writes: its directory, metrics, console, signals and report."""
