"""What runs without a download: a real pretrained model and real text, from packages on disk."""
