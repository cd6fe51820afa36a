"""Sharing a trained model on the Hugging Face Hub: its card, the push, a Space."""
