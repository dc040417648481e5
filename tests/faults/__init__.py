"""A harness that looks for faults by itself: calls that fail, inputs that are wrong, files that are damaged."""
