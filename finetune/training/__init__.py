"""Fine-tuning: heads, losses, what is varied, and the loop."""
