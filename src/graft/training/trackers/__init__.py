"""Trackers: other programs that keep and show the figures of runs (TensorBoard, W&B, MLflow, your own)."""
