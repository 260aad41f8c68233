"""COOL RLHF (report 4.2): conditional reward model, and online PPO in rounds."""
