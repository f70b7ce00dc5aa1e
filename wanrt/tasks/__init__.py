"""What a task needs before sampling: sizes, legal settings and conditioning tensors."""
