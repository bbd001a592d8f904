"""What prepares a simulator: rows collected from a real engine, and the fine-tuning on them."""
