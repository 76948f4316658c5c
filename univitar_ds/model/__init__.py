"""The encoder, the text tower and what joins them."""
