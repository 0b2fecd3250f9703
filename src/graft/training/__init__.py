"""The one training loop and what it needs: settings, optimizer, schedule, checkpoints, stopping, monitors."""
