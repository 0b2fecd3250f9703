"""What training rows pass through: duplicates, rows of the evaluation data, odd rows."""
