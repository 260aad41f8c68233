"""`dry_run=true`: the real code at the real shapes and ranks, on tensors without contents; trains nothing."""
