"""What prepares a simulator: rows collected from a real search engine, and the fine-tuning on them."""
