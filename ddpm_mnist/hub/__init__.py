"""Sharing a trained model on the Hugging Face Hub: its card and the push."""
