"""Creates a live pipeline from the store."""
