"""What a model can do: losses, generation, metrics of tasks, and pages that show them."""
